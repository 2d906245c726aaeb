"""How an engine sizes itself to an accelerator's memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models

from jaxserve.config import EngineConfig
from jaxserve.engine.activations import REMAT, activation_bytes
from jaxserve.engine.sizes import STEP_BYTES, core_config
from jaxserve.kvcache.pool import page_bytes
from jaxserve.models.config import ModelConfig

ROOM = 96 << 20
MEMORY = 2 * (STEP_BYTES + ROOM)
MODEL = ModelConfig.from_dict(tiny_models.config_dict("llama"))
OPTIONS = {
    "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 8192, "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.5,
}  # fmt: skip


def num_pages(**options):
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": MEMORY})
    mesh = SimpleNamespace(size=1, devices=SimpleNamespace(flat=[device]))
    params = {"w": np.zeros(1 << 20, np.int8)}
    return core_config(EngineConfig(**OPTIONS | options), MODEL, params, mesh).num_pages


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


def test_the_less_is_run_again_the_more_is_kept():
    sizes = [activation_bytes(MODEL, 256, remat) for remat in REMAT]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    halves = [activation_bytes(MODEL, 256, remat, tensor_parallel=2) for remat in REMAT]
    assert all(half < whole for half, whole in zip(halves, sizes, strict=True))
