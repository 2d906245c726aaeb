"""Turns a user's configuration into the sizes of an engine: what fits, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.adapters.bank import BankShape
from jaxserve.config import EngineConfig
from jaxserve.engine.activations import (
    DEFAULT_REMAT,
    STASH_SHARE,
    activation_bytes,
    stash_bytes,
    stash_tokens,
    window_remat,
)
from jaxserve.engine.specs import CoreConfig
from jaxserve.errors import ConfigError
from jaxserve.finetune.windows import rounded
from jaxserve.kvcache.pool import page_bytes
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import param_specs
from jaxserve.scheduler.request import NEVER, Objective
from pallas_kernels.lora_matmul import PAGE_RANK

HOST_POOL_BYTES = 1 << 30  # most the KV pool takes by default where the device is the host itself
HOST_STASH_BYTES = 1 << 30  # and the stash
STEP_BYTES = 1 << 30  # left free on an accelerator for the temporaries of a step without gradient rows
ROW_BLOCKS = {"cpu": 16}  # rows of a chunk block; 64 on accelerators, the kernels' tile


def core_config(
    config: EngineConfig, model: ModelConfig, params: Any, mesh: Mesh, budget: int | None = None
) -> CoreConfig:
    """Resolves every size.

    Args:
      budget: bytes of one device that may be used; None: what it has, as far as the configuration says.

    Raises:
      ConfigError: a length the model was not made for, or a KV pool too small for one sequence.
    """
    max_model_len = config.max_model_len or model.max_position_embeddings
    check_length(max_model_len, model)
    row_block = ROW_BLOCKS.get(mesh.devices.flat[0].platform, 64)
    if budget is None and None in (config.num_kv_pages, config.finetune_stash_tokens):
        budget = _budget(config, mesh)
    stash = rounded(_stash_tokens(config, model, mesh, max_model_len, budget), row_block)
    num_pages = config.num_kv_pages or _pages_that_fit(config, model, params, mesh, max_model_len, stash, budget)
    fitting = num_pages * config.block_size
    if fitting < max_model_len:
        if config.max_model_len is not None:
            raise ConfigError(
                [f"max_model_len {max_model_len} needs more than {num_pages} KV pages of {config.block_size} tokens"]
            )
        max_model_len = fitting
    return CoreConfig(
        dtype=str(config.dtype),
        num_pages=num_pages,
        page_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max(config.max_num_batched_tokens, row_block),
        row_block=row_block,
        max_logprobs=min(config.max_logprobs, model.vocab_size),
        policy=config.scheduling_policy,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        max_queue=config.max_queue,
        max_loras=config.max_loras if config.enable_lora else 0,
        max_lora_rank=config.max_lora_rank if config.enable_lora else 0,
        max_grad_rows=max(config.finetune_window, row_block),
        remat=config.finetune_remat or DEFAULT_REMAT,
        stash_tokens=stash,
        objectives=objectives(config),
        finetune_floor=config.finetune_floor,
    )


def check_length(max_model_len: int, model: ModelConfig) -> None:
    """Raises ConfigError for a length the model was not made for."""
    made_for = model.max_position_embeddings
    if max_model_len > model.max_length:
        stretched = f", with its rope scaling {model.max_length}" if model.max_length > made_for else ""
        raise ConfigError([f"max_model_len {max_model_len} exceeds max_position_embeddings {made_for}{stretched}"])


def objectives(config: EngineConfig) -> dict[str, Objective]:
    """What requests are promised, by the name of their class; "" is those that name none."""
    promised = {"": (config.ttft_objective_ms, config.tpot_objective_ms)}
    promised |= {each.name: (each.ttft_ms, each.tpot_ms) for each in config.slo_classes}
    return {
        name: Objective(*(NEVER if ms is None else ms / 1000 for ms in milliseconds))
        for name, milliseconds in promised.items()
    }


def _budget(config: EngineConfig, mesh: Mesh) -> int | None:
    """Bytes of one device that may be used; None: the device is the host itself, or does not say what it has."""
    device = mesh.devices.flat[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return int(stats["bytes_limit"] * config.gpu_memory_utilization) if stats else None


def _stash_tokens(config: EngineConfig, model: ModelConfig, mesh: Mesh, max_model_len: int, budget: int | None) -> int:
    """Tokens of the stash. Without a number given, an accelerator has one only if jobs were asked for: it takes memory
    that pages could have."""
    if not config.enable_lora:
        return 0
    itemsize = jnp.dtype(str(config.dtype)).itemsize
    room = HOST_STASH_BYTES
    if budget is not None:
        left = budget - _weight_elements(model, mesh.size) * itemsize // mesh.size
        room = left // STASH_SHARE if config.max_finetune_jobs else 0
    each = stash_bytes(model, itemsize, mesh.size)
    return stash_tokens(config.finetune_stash_tokens, config.finetune_remat, max_model_len, room, each)


def _weight_elements(model: ModelConfig, tensor_parallel: int) -> int:
    specs = jax.tree.leaves(param_specs(model, tensor_parallel), is_leaf=lambda x: hasattr(x, "axes"))
    return sum(int(np.prod(spec.shape)) for spec in specs)


def _pages_that_fit(
    config: EngineConfig, model: ModelConfig, params: Any, mesh: Mesh, max_model_len: int, stash: int,
    budget: int | None,
) -> int:  # fmt: skip
    """Pages for every sequence at full length, or as many as there is memory for."""
    each = page_bytes(model, config.block_size, mesh.size, str(config.dtype))
    wanted = config.max_num_seqs * -(-max_model_len // config.block_size)
    return int(max(min(wanted, _free_bytes(config, model, params, mesh, max_model_len, stash, budget) // each), 1))


def _free_bytes(
    config: EngineConfig, model: ModelConfig, params: Any, mesh: Mesh, max_model_len: int, stash: int,
    budget: int | None,
) -> int:  # fmt: skip
    """Memory for the KV pool over all devices."""
    if budget is None:
        return HOST_POOL_BYTES
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    kept = weights + _finetune_bytes(config, model, mesh, max_model_len, stash) + STEP_BYTES * mesh.size
    if config.enable_lora:
        kept += _bank_bytes(config, model, mesh, 1 + config.max_loras * _adapter_pages(config))
    return max(budget * mesh.size - kept, 0)


def _finetune_bytes(config: EngineConfig, model: ModelConfig, mesh: Mesh, max_model_len: int, stash: int) -> int:
    """Of the jobs that were asked for, over all devices: sums of gradients, and activations."""
    if not (config.enable_lora and config.max_finetune_jobs):
        return 0
    itemsize = jnp.dtype(str(config.dtype)).itemsize
    sums = 2 * -(-max_model_len // config.block_size) * page_bytes(model, config.block_size, mesh.size, "float32")
    lanes = _bank_bytes(config, model, mesh, config.max_finetune_jobs * _adapter_pages(config)) * 4 // itemsize
    remat = window_remat(stash, config.finetune_remat)
    kept = activation_bytes(model, config.finetune_window, remat, itemsize, mesh.size)
    kept += stash * stash_bytes(model, itemsize, mesh.size)
    return sums + lanes + kept * mesh.size


def _adapter_pages(config: EngineConfig) -> int:
    return -(-config.max_lora_rank // PAGE_RANK)


def _bank_bytes(config: EngineConfig, model: ModelConfig, mesh: Mesh, pages: int) -> int:
    bank = BankShape(model, pages, mesh.size, str(config.dtype))
    leaves = jax.tree.leaves(bank.specs(), is_leaf=lambda x: hasattr(x, "axes"))
    return sum(int(np.prod(spec.shape)) for spec in leaves) * jnp.dtype(str(config.dtype)).itemsize
