"""What lives on the device between steps; donated to each step and returned by it.

Shapes: P pages, K kv heads, G tokens per page, C head dim, B sequence slots, V vocabulary, Z logit edits per slot.
"""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxserve.adapters.bank import Bank, BankShape
from jaxserve.engine.gradient import TrainShape, TrainState, empty_train_state, train_specs
from jaxserve.kvcache.pool import KV_AXES, LayerKV, empty_pool
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import padded_vocab
from pallas_kernels.token_sampling import COUNT_MASK, PROMPT_BIT
from sharding import named_sharding, partition_spec, zeros

MAX_EDITS = 384  # logit_bias entries plus tokens held back until min_tokens, per sequence


@struct.dataclass
class EngineState:
    """The device's side of the engine."""

    kv: list[LayerKV]
    bank: Bank | None  # None: the engine serves the base model only
    last_token_B: Int[Array, "B"]  # the latest token drawn in each slot
    count_BV: Int[Array, "B V"]  # PROMPT_BIT and output count, to COUNT_MASK, of each token; of slots with penalties
    edit_token_BZ: Int[Array, "B Z"]
    edit_value_BZ: Float[Array, "B Z"]  # added to the logit ...
    edit_until_BZ: Int[Array, "B Z"]  # ... of tokens drawn at a position below this
    train: TrainState | None  # None: the engine does not finetune


COUNT_AXES = (None, "vocab")


def empty_state(
    config: ModelConfig,
    mesh: Mesh,
    *,
    num_pages: int,
    page_size: int,
    num_slots: int,
    dtype: str,
    bank: BankShape | None,
    train: TrainShape | None = None,
) -> EngineState:
    """A state with nothing in it, placed on the mesh."""
    replicated = named_sharding(mesh, ())

    def put(x):
        return jax.device_put(x, replicated)

    vocab = padded_vocab(config.vocab_size, mesh.size)
    return EngineState(
        kv=empty_pool(config, num_pages, page_size, mesh, dtype),
        bank=None if bank is None else bank.empty(mesh),
        last_token_B=put(np.zeros(num_slots, np.int32)),
        count_BV=zeros(mesh, (num_slots, vocab), COUNT_AXES, jnp.int16),
        edit_token_BZ=put(np.zeros((num_slots, MAX_EDITS), np.int32)),
        edit_value_BZ=put(np.zeros((num_slots, MAX_EDITS), np.float32)),
        edit_until_BZ=put(np.zeros((num_slots, MAX_EDITS), np.int32)),
        train=None if train is None or bank is None else empty_train_state(train, bank, config, mesh, page_size, dtype),
    )


def state_specs(state: EngineState, bank: BankShape | None) -> Any:
    """The PartitionSpec of every array of the state."""
    whole = PartitionSpec()
    pool = partition_spec(KV_AXES)
    bank_specs = None
    if bank is not None:
        bank_specs = jax.tree.map(lambda s: partition_spec(s.axes), bank.specs(), is_leaf=lambda x: hasattr(x, "axes"))
    return cast(Any, EngineState)(
        kv=[(pool, pool) for _ in state.kv],
        bank=bank_specs,
        last_token_B=whole,
        count_BV=partition_spec(COUNT_AXES),
        edit_token_BZ=whole,
        edit_value_BZ=whole,
        edit_until_BZ=whole,
        train=None if state.train is None or bank is None else train_specs(state.train, bank),
    )


@partial(jax.jit, donate_argnames="state")
def write_slot(state: EngineState, slot, token_S, kind_S, edit_token_Z, edit_value_Z, edit_until_Z) -> EngineState:
    """Gives a slot its logit edits and the token counts of its sequence so far.

    Args:
      token_S: the sequence's known tokens, padded; kind_S: 2 prompt, 1 output, 0 padding.
      edit_*_Z: MAX_EDITS entries; an unused one has edit_until 0.
    """
    width = state.count_BV.shape[1]
    column_S = jnp.where(kind_S > 0, token_S, width)
    output_V = jnp.zeros(width, jnp.int32).at[column_S].add((kind_S == 1).astype(jnp.int32), mode="drop")
    in_prompt_V = jnp.zeros(width, jnp.int32).at[jnp.where(kind_S == 2, token_S, width)].set(PROMPT_BIT, mode="drop")
    count_V = (jnp.minimum(output_V, COUNT_MASK) | in_prompt_V).astype(jnp.int16)
    return replace(
        state,
        count_BV=state.count_BV.at[slot].set(count_V),
        edit_token_BZ=state.edit_token_BZ.at[slot].set(edit_token_Z),
        edit_value_BZ=state.edit_value_BZ.at[slot].set(edit_value_Z),
        edit_until_BZ=state.edit_until_BZ.at[slot].set(edit_until_Z),
    )


@partial(jax.jit, donate_argnames="state")
def copy_pages(state: EngineState, source_X: Int[Array, "X"], target_X: Int[Array, "X"]) -> EngineState:
    """Copies whole K/V pages (copy-on-write when a request forks); a target of P or more is dropped."""

    def copy(pool):
        return pool.at[target_X].set(pool.at[source_X].get(mode="clip"), mode="drop")

    return replace(state, kv=[(copy(k), copy(v)) for k, v in state.kv])
