"""Turns a user's configuration into the sizes of an engine: what fits, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.adapters.bank import BankShape
from jaxserve.config import EngineConfig
from jaxserve.engine.activations import activation_bytes
from jaxserve.engine.specs import CoreConfig
from jaxserve.errors import ConfigError
from jaxserve.kvcache.pool import page_bytes
from jaxserve.models.config import ModelConfig
from jaxserve.scheduler.request import NEVER, Objective
from pallas_kernels.lora_matmul import PAGE_RANK

HOST_POOL_BYTES = 1 << 30  # most the KV pool takes by default where the device is the host itself
STEP_BYTES = 1 << 30  # left free on an accelerator for the temporaries of a step without gradient rows
ROW_BLOCKS = {"cpu": 16}  # rows of a chunk block; 64 on accelerators, the kernels' tile


def core_config(config: EngineConfig, model: ModelConfig, params: Any, mesh: Mesh) -> CoreConfig:
    """Resolves every size.

    Raises:
      ConfigError: a length the model was not made for, or a KV pool too small for one sequence.
    """
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            [f"max_model_len {max_model_len} exceeds max_position_embeddings {model.max_position_embeddings}"]
        )
    num_pages = config.num_kv_pages or _pages_that_fit(config, model, params, mesh, max_model_len)
    fitting = num_pages * config.block_size
    if fitting < max_model_len:
        if config.max_model_len is not None:
            raise ConfigError(
                [f"max_model_len {max_model_len} needs more than {num_pages} KV pages of {config.block_size} tokens"]
            )
        max_model_len = fitting
    row_block = ROW_BLOCKS.get(mesh.devices.flat[0].platform, 64)
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
        remat=config.finetune_remat,
        stash_tokens=-(-(config.finetune_stash_tokens or 0) // row_block) * row_block if config.enable_lora else 0,
        objectives=objectives(config),
        finetune_floor=config.finetune_floor,
    )


def objectives(config: EngineConfig) -> dict[str, Objective]:
    """What requests are promised, by the name of their class; "" is those that name none."""
    promised = {"": (config.ttft_objective_ms, config.tpot_objective_ms)}
    promised |= {each.name: (each.ttft_ms, each.tpot_ms) for each in config.slo_classes}
    return {
        name: Objective(*(NEVER if ms is None else ms / 1000 for ms in milliseconds))
        for name, milliseconds in promised.items()
    }


def _pages_that_fit(config: EngineConfig, model: ModelConfig, params: Any, mesh: Mesh, max_model_len: int) -> int:
    """Pages for every sequence at full length, or as many as there is memory for."""
    each = page_bytes(model, config.block_size, mesh.size, str(config.dtype))
    wanted = config.max_num_seqs * -(-max_model_len // config.block_size)
    return int(max(min(wanted, _free_bytes(config, model, params, mesh, max_model_len) // each), 1))


def _free_bytes(config: EngineConfig, model: ModelConfig, params: Any, mesh: Mesh, max_model_len: int) -> int:
    """Memory for the KV pool over all devices."""
    device = mesh.devices.flat[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats:
        return HOST_POOL_BYTES
    total = int(stats["bytes_limit"] * config.gpu_memory_utilization) * mesh.size
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    kept = weights + _finetune_bytes(config, model, mesh, max_model_len) + STEP_BYTES * mesh.size
    if config.enable_lora:
        kept += _bank_bytes(config, model, mesh, 1 + config.max_loras * _adapter_pages(config))
    return max(total - kept, 0)


def _finetune_bytes(config: EngineConfig, model: ModelConfig, mesh: Mesh, max_model_len: int) -> int:
    """Of the jobs that were asked for, over all devices: sums of gradients, and activations of a window."""
    if not (config.enable_lora and config.max_finetune_jobs):
        return 0
    itemsize = jnp.dtype(str(config.dtype)).itemsize
    sums = 2 * -(-max_model_len // config.block_size) * page_bytes(model, config.block_size, mesh.size, "float32")
    lanes = _bank_bytes(config, model, mesh, config.max_finetune_jobs * _adapter_pages(config)) * 4 // itemsize
    kept = activation_bytes(model, config.finetune_window, config.finetune_remat, itemsize, mesh.size)
    return sums + lanes + kept * mesh.size


def _adapter_pages(config: EngineConfig) -> int:
    return -(-config.max_lora_rank // PAGE_RANK)


def _bank_bytes(config: EngineConfig, model: ModelConfig, mesh: Mesh, pages: int) -> int:
    bank = BankShape(model, pages, mesh.size, str(config.dtype))
    leaves = jax.tree.leaves(bank.specs(), is_leaf=lambda x: hasattr(x, "axes"))
    return sum(int(np.prod(spec.shape)) for spec in leaves) * jnp.dtype(str(config.dtype)).itemsize
