"""How an engine sizes itself to an accelerator's memory."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_models

from jaxserve.config import EngineConfig
from jaxserve.engine.activations import REMAT, STASH_SHARE, activation_bytes, stash_bytes
from jaxserve.engine.sizes import STEP_BYTES, core_config
from jaxserve.engine.stash import StashShape
from jaxserve.errors import ConfigError
from jaxserve.kvcache.pool import page_bytes
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import param_specs
from sharding import make_mesh

ROOM = 96 << 20
MEMORY = 2 * (STEP_BYTES + ROOM)
MODEL = ModelConfig.from_dict(tiny_models.config_dict("llama"))
OPTIONS = {
    "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 8192, "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.5,
}  # fmt: skip


def is_spec(leaf):
    return hasattr(leaf, "axes")


def sized(platform="gpu", memory=MEMORY, **options):
    device = SimpleNamespace(platform=platform, memory_stats=lambda: {"bytes_limit": memory})
    mesh = SimpleNamespace(size=1, devices=SimpleNamespace(flat=[device]))
    params = {"w": np.zeros(1 << 20, np.int8)}
    return core_config(EngineConfig(**OPTIONS | options), MODEL, params, mesh)


def num_pages(**options):
    return sized(**options).num_pages


def test_a_length_beyond_the_rope_is_refused_and_one_within_is_taken():
    yarn = tiny_models.config_dict("llama", rope_scaling=tiny_models.YARN | {"factor": 32.0})
    device = SimpleNamespace(platform="cpu")
    mesh = SimpleNamespace(size=1, devices=SimpleNamespace(flat=[device]))

    def length(**options):
        options = {"enable_lora": False, "num_kv_pages": 64} | options
        return core_config(EngineConfig(**options), ModelConfig.from_dict(yarn), {}, mesh).max_model_len

    assert length() == 512
    assert length(max_model_len=1024) == 1024
    with pytest.raises(ConfigError, match="max_position_embeddings 512, with its rope scaling 1024"):
        length(max_model_len=1025)


def test_pages_take_what_weights_and_a_step_leave():
    each = page_bytes(MODEL, 16, 1, "bfloat16")
    assert num_pages(enable_lora=False, block_size=16) == (ROOM - (1 << 20)) // each


@pytest.mark.parametrize("remat", REMAT)
def test_jobs_that_are_prepared_for_have_their_memory_kept_back(remat):
    options = {"block_size": 16, "finetune_remat": remat, "finetune_window": 4096}
    each = page_bytes(MODEL, 16, 1, "bfloat16")
    without, beside = (num_pages(max_finetune_jobs=jobs, **options) for jobs in (0, 1))
    sums = 2 * 4 * page_bytes(MODEL, 16, 1, "float32")
    needed = activation_bytes(MODEL, 4096, remat) + sums
    assert needed <= (without - beside + 1) * each < needed + 1.1 * num_adapter_bytes() + 2 * each


def num_adapter_bytes():
    """Of one adapter's gradients in float32."""
    each = page_bytes(MODEL, 16, 1, "bfloat16")
    few, many = (num_pages(max_finetune_jobs=jobs, block_size=16) for jobs in (1, 2))
    return (few - many + 1) * each


def test_a_stash_has_room_for_two_examples_where_its_share_of_the_memory_holds_them():
    assert sized("cpu").stash_tokens == 2 * 64
    assert sized(max_finetune_jobs=1).stash_tokens == 2 * 64
    assert sized().stash_tokens == 0  # no job was asked for
    assert sized("cpu", enable_lora=False).stash_tokens == 0
    asked = sized("cpu", finetune_remat="full")
    assert (asked.stash_tokens, asked.remat) == (0, "full")
    with pytest.raises(ConfigError, match=r"finetune_remat 'full'.*finetune_stash_tokens is 64"):
        sized(finetune_remat="full", finetune_stash_tokens=64)
    weights = sum(int(np.prod(s.shape)) for s in jax.tree.leaves(param_specs(MODEL, 1), is_leaf=is_spec)) * 2
    for tokens, kept in ((63, 0), (64, 64), (127, 127), (400, 128)):
        memory = 2 * (weights + STASH_SHARE * tokens * stash_bytes(MODEL) + STASH_SHARE)
        found = sized(memory=memory, max_finetune_jobs=1, num_kv_pages=8)
        assert found.stash_tokens == -(-kept // 64) * 64
        assert found.max_example_len == 64


def test_a_given_stash_bounds_examples_and_takes_its_memory_from_the_pages():
    few, many = (sized(max_finetune_jobs=1, finetune_stash_tokens=n, block_size=16) for n in (64, 6400))
    assert sized("cpu", finetune_stash_tokens=40).stash_tokens == 48  # whole blocks
    assert sized("cpu", finetune_stash_tokens=40).max_example_len == 48
    assert sized("cpu", finetune_stash_tokens=0).max_example_len == 64
    more = (few.num_pages - many.num_pages) * page_bytes(MODEL, 16, 1, "bfloat16")
    assert more == pytest.approx(6336 * stash_bytes(MODEL), rel=0.01)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_tokens_bytes_in_the_stash_are_those_of_its_arrays(family, tensor_parallel):
    model = ModelConfig.from_dict(tiny_models.config_dict(family))
    stash = StashShape(model, 3, 16, tensor_parallel, "bfloat16").empty(make_mesh(tensor_parallel))
    whole = sum(shard.data.nbytes for array in jax.tree.leaves(stash) for shard in array.addressable_shards)
    assert whole == 3 * 16 * stash_bytes(model, 2, tensor_parallel) * tensor_parallel


def test_the_less_is_run_again_the_more_is_kept():
    sizes = [activation_bytes(MODEL, 256, remat) for remat in REMAT]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    halves = [activation_bytes(MODEL, 256, remat, tensor_parallel=2) for remat in REMAT]
    assert all(half < whole for half, whole in zip(halves, sizes, strict=True))
