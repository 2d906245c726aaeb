"""Every family against transformers (torch on the CPU, float32), at four depths.

Shapes: T tokens, D hidden, V vocab.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from tiny_models import LLAMA3, YARN

from jaxserve.models import decoder
from jaxserve.models.loader import load_config, load_params
from sharding import make_mesh

pytestmark = pytest.mark.quick_compiles

NUM_TOKENS = 40  # longer than every window below
CASES = {
    "llama-gqa": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-llama3-rope": ("llama", {"num_key_value_heads": 1, "rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama-linear-rope-biases": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.5}, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-dynamic-rope-head-dim": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "head_dim": 24}),
    "llama-yarn-rope": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-rope-all-options": (
        "llama",
        {
            "rope_parameters": YARN
            | {"rope_theta": 3e4, "beta_fast": 8, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.3}
            | {"truncate": False}
        },
    ),
    "mistral": ("mistral", {"head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 7, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2-window-tied": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2-layer-types-yarn": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": YARN,
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-mqa-tied-biases": (
        "qwen3",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True, "rope_scaling": YARN},
    ),
    "gemma2": ("gemma2", {}),
    "gemma2-mqa-no-caps-full": (
        "gemma2",
        {
            "num_key_value_heads": 1,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma3": ("gemma3", {}),
    "gemma3-mha-linear-rope-cap": (
        "gemma3",
        {
            "num_key_value_heads": 4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "final_logit_softcapping": 10.0,
            "num_hidden_layers": 3,
            "sliding_window_pattern": 3,
        },
    ),
    "gemma3-nested-rope": (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e5},
            },
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma3-multimodal": ("gemma3_multimodal", {}),
}


@pytest.fixture(scope="module")
def directory(request, tmp_path_factory):
    family, overrides = CASES[request.param]
    return tiny_models.build(tmp_path_factory.mktemp(request.param), family, tokenizer=False, **overrides)


def token_ids(length=NUM_TOKENS, vocab_size=tiny_models.VOCAB_SIZE):
    return np.random.default_rng(1).integers(0, vocab_size, length).tolist()


def our_states(directory, ids, dtype="float32"):
    """Embedding, each layer's output, final norm and logits."""
    config = load_config(directory)
    params = load_params(directory, config, make_mesh(1), dtype)

    @jax.jit
    def run(params, token_T):
        states = []

        def record(step):
            def wrapped(p, x_TD, kv):
                states.append(x_TD)
                return step(p, x_TD, kv)

            return wrapped

        x_TD, _ = decoder.forward(
            params,
            token_T,
            jnp.arange(token_T.shape[0]),
            config=config,
            lookup=decoder.plain_lookup,
            linear=decoder.plain_linear,
            attend=decoder.plain_attend(config),
            kv=[None] * config.num_layers,
            wrap=record,
        )
        return [*states, x_TD, decoder.logits(params, x_TD, config)]

    *states, logits = run(params, jnp.asarray(ids, jnp.int32))
    return [np.asarray(state) for state in states], np.asarray(logits)[:, : config.vocab_size]


def their_states(directory, ids):
    """The same from transformers: the last hidden state it returns is already normed."""
    model = tiny_models.reference(directory)
    import torch

    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return [state[0].numpy() for state in out.hidden_states], out.logits[0].numpy()


@pytest.mark.parametrize("directory", CASES, indirect=True)
def test_hidden_states_and_logits_equal_those_of_transformers(directory):
    ids = token_ids()
    ours, our_logits = our_states(directory, ids)
    theirs, their_logits = their_states(directory, ids)
    assert len(ours) == len(theirs)
    for depth, (a_TD, b_TD) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(a_TD, b_TD, atol=1e-5, rtol=1e-5, err_msg=f"depth {depth}")
    np.testing.assert_allclose(our_logits, their_logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("directory", ["llama-mha-tied", "qwen3", "gemma2", "gemma3"], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_we_are_as_near_to_the_truth_as_transformers(directory, dtype):
    ids = token_ids()
    truth = tiny_models.reference_logits(directory, ids)
    _, ours = our_states(directory, ids, dtype)
    theirs = tiny_models.reference_logits(directory, ids, dtype)
    assert np.abs(ours - truth).mean() <= 1.1 * np.abs(theirs - truth).mean()


@pytest.mark.parametrize("directory", ["llama-yarn-rope", "qwen2-window-tied", "gemma3"], indirect=True)
def test_in_double_precision_the_model_is_the_same_to_single_precision(directory):
    ids = token_ids()
    with jax.enable_x64(True):
        _, double = our_states(directory, ids, "float64")
    assert double.dtype == np.float64
    np.testing.assert_allclose(double, tiny_models.reference_logits(directory, ids), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("directory", ["llama-dynamic-rope-head-dim"], indirect=True)
def test_dynamic_rope_agrees_up_to_the_last_position_of_the_model(directory):
    length = load_config(directory).max_position_embeddings
    ids = token_ids(length)
    _, ours = our_states(directory, ids)
    np.testing.assert_allclose(ours, tiny_models.reference_logits(directory, ids), atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("directory", ["gemma2"], indirect=True)
def test_prompts_shorter_and_as_long_as_the_window_agree(directory, length):
    ids = token_ids(length)
    _, ours = our_states(directory, ids)
    np.testing.assert_allclose(ours, tiny_models.reference_logits(directory, ids), atol=2e-5)
