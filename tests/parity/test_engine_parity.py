"""The engine against transformers (torch on the CPU, float32): greedy tokens and log-probabilities.

Shapes: T tokens, V vocab.
"""

import numpy as np
import pytest
import serving
import tiny_models
from tiny_models import LLAMA3, YARN

pytestmark = pytest.mark.quick_compiles

CASES = {
    "llama": ("llama", {}),
    "llama-mqa-tied-llama3-rope": (
        "llama",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
    "mistral": ("mistral", {"head_dim": 32, "num_key_value_heads": 4}),
    "mistral-window": ("mistral", {"sliding_window": 21, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2-window-tied": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-mqa-tied-yarn": ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_scaling": YARN}),
    "gemma2": ("gemma2", {}),
    "gemma2-mqa-untied-no-caps": (
        "gemma2",
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 17,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma3": ("gemma3", {}),
    "gemma3-mha-untied-linear-rope-cap": (
        "gemma3",
        {
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "final_logit_softcapping": 10.0,
            "num_hidden_layers": 3,
            "sliding_window_pattern": 3,
        },
    ),
    "gemma3-multimodal": ("gemma3_multimodal", {}),
    "gemma3-multimodal-mqa": ("gemma3_multimodal", {"num_key_value_heads": 1, "sliding_window": 33}),
}
FEW = (
    "llama",
    "llama-mqa-tied-llama3-rope",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gemma3-multimodal",
)
LENGTHS = (3, 16, 33, 100)  # shorter than a page, a page, past a page, longer than a step and than any window
PROMPTS = [serving.prompt(length) for length in LENGTHS]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in CASES]
)
def path(request):
    family, overrides = CASES[request.param]
    return serving.model_dir(family, tokenizer=False, **overrides)


@pytest.fixture(scope="module")
def expected(path):
    return [tiny_models.reference_greedy(path, prompt, 32) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def engine(path):
    """Small chunks, few pages: prompts are cut, sequences are preempted, prefixes are found again."""
    made = serving.engine(path, enable_lora=False)
    return serving.limit(made, pages=9, budget=48)


@pytest.fixture(scope="module")
def outputs(engine):
    params = [serving.greedy(prompt_logprobs=2 if i % 2 else None) for i in range(len(PROMPTS))]
    return engine.generate(PROMPTS, params)


def test_32_greedy_tokens_are_those_of_transformers(outputs, expected):
    assert [output.token_ids for output in outputs] == expected
    assert all(output.finish_reason == "length" for output in outputs)


def test_after_preemption_and_on_cached_prefixes_the_tokens_stay_the_same(engine, outputs, expected):
    again = engine.generate(PROMPTS, serving.greedy())
    assert [output.token_ids for output in again] == expected
    assert [output.logprobs for output in again] == [output.logprobs for output in outputs]
    assert engine.stats()["preemptions"] > 0
    twice = engine.generate([PROMPTS[3]] * 2, serving.greedy())  # one after the other: there are pages for one
    assert [output.token_ids for output in twice] == [expected[3]] * 2
    assert twice[1].num_cached_tokens == 96
    serving.check_idle(engine)


def test_log_probabilities_of_prompt_and_outputs_are_those_of_transformers(path, outputs):
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        logits_TV = tiny_models.reference_logits(path, prompt + output.token_ids)
        theirs_TV = log_softmax(logits_TV)
        if output.prompt_logprobs is not None:
            assert output.prompt_logprobs[0] is None
            for position, ours in enumerate(output.prompt_logprobs[1:], 1):
                check_logprobs(ours, theirs_TV[position - 1], prompt[position], top=2)
        for position, (token, ours) in enumerate(zip(output.token_ids, output.logprobs, strict=True), len(prompt)):
            check_logprobs(ours, theirs_TV[position - 1], token, top=3)


def log_softmax(logits_TV):
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(1, keepdims=True))


def check_logprobs(ours, theirs_V, token, top):
    """``ours`` has the token, first, and the ``top`` likeliest ones, each within 1e-4 of theirs."""
    assert next(iter(ours)) == token
    ids = list(ours)
    np.testing.assert_allclose([ours[i] for i in ids], theirs_V[ids], atol=1e-4)
    likeliest = set(np.argsort(-theirs_V)[:top].tolist())
    assert len(ours) == len(likeliest | {token})
    least = np.sort(theirs_V)[-top]
    assert all(theirs_V[i] >= least - 1e-4 for i in ids if i != token)
