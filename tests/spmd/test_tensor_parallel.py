"""One device against 2, 4 and 8 fake ones: the same tokens, and adapters that cost no collective."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
import serving

from jaxserve.engine.step import step
from jaxserve.sampling import SamplingParams

pytestmark = pytest.mark.quick_compiles

HEADS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "tokenizer": False,
}  # 8 shards: heads repeat
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
ADAPTERS = (None, "small", "large")


@pytest.fixture(scope="module")
def path():
    return serving.model_dir("qwen2", **HEADS)  # with biases: they must be added once, not once per shard


def with_adapters(engine, path):
    for seed, (name, rank) in enumerate(zip(ADAPTERS[1:], (4, 24), strict=True)):
        engine.load_adapter(name, serving.adapter_dir(path, seed=seed, rank=rank))
    return engine


def requests():
    """Greedy and drawn tokens, every kind of logit edit, with and without adapters."""
    for i, length in enumerate((5, 30, 70, 12, 44, 9)):
        params = SamplingParams(
            max_tokens=32,
            temperature=0.0 if i % 2 == 0 else 0.9,
            top_k=20 if i == 1 else 0,
            top_p=0.9 if i == 3 else 1.0,
            min_p=0.02 if i == 5 else 0.0,
            repetition_penalty=1.2 if i > 2 else 1.0,
            frequency_penalty=0.1 if i == 4 else 0.0,
            logit_bias={3: 2.0, 290: 2.0} if i == 2 else None,
            seed=i,
            logprobs=3,
            prompt_logprobs=2,
            ignore_eos=True,
        )
        yield serving.prompt(length), params, ADAPTERS[i % 3]


def run(engine):
    prompts, params, adapters = zip(*requests(), strict=True)
    return engine.generate(list(prompts), list(params), adapter=list(adapters))


@pytest.fixture(scope="module")
def one_device(path):
    return run(with_adapters(serving.engine(path), path))


@pytest.fixture(scope="module", params=[2, 4, 8])
def engine(request, path, one_device):  # one_device first: what it compiles is not this engine's
    return with_adapters(serving.engine(path, tensor_parallel=request.param), path)


def test_all_shards_together_give_the_tokens_of_one_device(engine, one_device):
    outputs = run(engine)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in one_device]
    for ours, theirs in zip(outputs, one_device, strict=True):
        pairs = zip(ours.prompt_logprobs[1:] + ours.logprobs, theirs.prompt_logprobs[1:] + theirs.logprobs, strict=True)
        for a, b in pairs:
            common = sorted(a.keys() & b.keys())
            assert len(common) >= len(a) - 1  # a tie for the last place may fall either way
            np.testing.assert_allclose([a[i] for i in common], [b[i] for i in common], atol=1e-4)
    assert engine.stats()["recompiles"] == 0
    serving.check_idle(engine)


def test_one_sick_adapter_is_noticed_on_every_shard(engine):
    """The bad number lies in one shard's rows of B."""
    weights = engine.adapters.get("small").weights
    engine.put_adapter("sick", serving.poison(weights))
    prompts = [serving.prompt(20)] * 3
    outputs = engine.generate(prompts, serving.greedy(8), adapter=["small", "sick", None])
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    engine.unload_adapter("sick")


def collectives(core):
    """How often the compiled chunk step calls each collective."""
    (bucket, _), spec = max(core.specs.items())
    ints, _, floats, _ = spec.layout.empty()
    text = step.lower(core.params, core.state, ints, floats, spec=spec).compile().as_text()
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    assert bucket.chunk_rows
    return Counter(found)


@pytest.mark.parametrize("tensor_parallel", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_adapters_add_no_collective(path, tensor_parallel):
    with_lora = collectives(serving.core(path, tensor_parallel=tensor_parallel))
    without = collectives(serving.core(path, tensor_parallel=tensor_parallel, enable_lora=False))
    assert with_lora == without
    assert with_lora["all-reduce"] >= 1 + 2 * 2  # the embedding, and attention and ffn of each layer


def test_the_state_is_spread_evenly(path):
    core = serving.core(path, tensor_parallel=4)
    for leaf in (*jax.tree.leaves(core.state.kv), core.state.count_BV):
        assert leaf.addressable_shards[0].data.nbytes * 4 == leaf.nbytes
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(core.params))
    assert serving.leaves_nbytes(core.params) < 0.3 * whole
