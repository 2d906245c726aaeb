"""From hidden states to tokens: the head, what requests ask of their logits, and the draw; and the log-probabilities of
tokens that are there already.

A program for each number of rows and each kind of request, so that none of the common ones has a branch: where a branch
hangs on a number of the device, the host waits for it, and with it for everything that was sent before.

Shapes: R drawn tokens, Tc chunk rows, B sequence slots, D hidden, V vocabulary, Z logit edits, N top log-probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxserve.engine import batch as flags
from jaxserve.engine.batch import DrawBatch, DrawLayout
from jaxserve.engine.hashing import hashed_once
from jaxserve.engine.state import COUNT_AXES, EngineState
from jaxserve.models import decoder
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import param_specs
from pallas_kernels.numerics import map_rows
from pallas_kernels.token_sampling import COUNT_MASK, VocabShard, log_normaliser, penalise, pick, sample, top_tokens
from sharding import AXIS, partition_spec, tree_specs

HEAD_ROWS = 64  # rows of a prompt whose logits exist at one time
DRAW_BYTES = 8 << 20  # float32 logits that are drawn from at one time, at most: a draw holds several copies of them


class Asks(StrEnum):
    """What at least one row of a draw asks for."""

    GREEDY = "greedy"
    RANDOM = "random"  # a temperature
    FILTERED = "filtered"  # that, and top-k, top-p or min-p
    ANYTHING = "anything"  # penalties, logit edits or log-probabilities, and whatever else


def asks_of(flag: np.ndarray) -> Asks:
    """The program for these flags of a batch."""
    if flag[flags.PENALTIES] or flag[flags.EDITS] or flag[flags.LOGPROBS]:
        return Asks.ANYTHING
    if flag[flags.FILTER]:
        return Asks.FILTERED
    return Asks.RANDOM if flag[flags.RANDOM] else Asks.GREEDY


@hashed_once
@dataclass(frozen=True)
class HeadSpec:
    """Everything a compiled score is specific to."""

    config: ModelConfig
    mesh: Mesh
    max_logprobs: int

    @property
    def shard(self) -> VocabShard:
        return VocabShard(AXIS, self.mesh.size)


@hashed_once
@dataclass(frozen=True)
class DrawSpec(HeadSpec):
    """Everything a compiled draw is specific to."""

    layout: DrawLayout
    asks: Asks


@struct.dataclass
class Drawn:
    """The tokens of a draw."""

    token_R: Int[Array, "R"]
    logprob_R: Float[Array, "R"]  # of the drawn token under the model's own distribution
    finite_R: Bool[Array, "R"]  # the row's logits were finite, and something could be drawn
    top_token_RN: Int[Array, "R N"]
    top_logprob_RN: Float[Array, "R N"]


@struct.dataclass
class Scored:
    """What the model says of tokens that are given."""

    logprob_T: Float[Array, "Tc"]  # of the target after each row
    top_token_TN: Int[Array, "Tc N"]
    top_logprob_TN: Float[Array, "Tc N"]


def head_of(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The part of the parameters that makes logits."""
    name = decoder.head_name(config)
    return {name: params[name]}


def slots_of(state: EngineState) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """What a draw takes of the state: each slot's last token [B], its counts [B, V], and token, value and until of its
    logit edits [B, Z]."""
    return state.last_token_B, state.count_BV, (state.edit_token_BZ, state.edit_value_BZ, state.edit_until_BZ)


@partial(jax.jit, static_argnames="spec", donate_argnames=("last_token_B", "count_BV"))
def draw(
    head: dict[str, jax.Array],
    last_token_B: Int[Array, "B"],
    count_BV: Int[Array, "B V"],
    edits: tuple[jax.Array, jax.Array, jax.Array],
    hidden_RD: Float[Array, "R D"],
    ints: Int[Array, "I"],
    floats: Float[Array, "J"],
    *,
    spec: DrawSpec,
) -> tuple[Int[Array, "B"], Int[Array, "B V"], Drawn]:
    """Draws a token for each row. Returns each slot's last token and counts, in place, and what was drawn.

    Args:
      head: see ``head_of``; last_token_B, count_BV, edits: see ``slots_of``; ints, floats: the heads of a step's
        buffers, see ``DrawLayout``.
    """
    whole, count = PartitionSpec(), partition_spec(COUNT_AXES)
    local = _on_mesh(_draw, spec, (whole, count, whole, whole, whole, whole), (whole, count, whole))
    return local(head, last_token_B, count_BV, edits, hidden_RD, ints, floats)


@partial(jax.jit, static_argnames="spec")
def score(
    head: dict[str, jax.Array], hidden_TD: Float[Array, "Tc D"], target_T: Int[Array, "Tc"], *, spec: HeadSpec
) -> Scored:
    """The log-probability of each row's target, and the likeliest tokens; a few rows of logits at a time.

    Args:
      head: see ``head_of``; target_T: -1 where nothing is wanted.
    """
    whole = PartitionSpec()
    return _on_mesh(_score, spec, (whole, whole), whole)(head, hidden_TD, target_T)


def _on_mesh(function: Callable, spec: HeadSpec, in_specs: tuple, out_specs: Any) -> Callable:
    """``function``, which sees one shard, of whole arrays; its first argument is the head."""
    head_specs = tree_specs(head_of(param_specs(spec.config, spec.mesh.size), spec.config))
    return jax.shard_map(
        partial(function, spec=spec),
        mesh=spec.mesh,
        in_specs=(head_specs, *in_specs),
        out_specs=out_specs,
        check_vma=False,
    )


def _local_logits(head, hidden_RD, spec: HeadSpec) -> tuple[Float[Array, "R V"], Bool[Array, "R"]]:
    """This shard's logits, padding of the vocabulary at -inf, and which rows are finite on all shards."""
    logits_RV = decoder.logits(head, hidden_RD, spec.config).astype(jnp.float32)
    finite_R = spec.shard.min(jnp.all(jnp.isfinite(logits_RV), axis=1).astype(jnp.int32)) > 0
    return spec.shard.known(logits_RV, spec.config.vocab_size), finite_R


def _draw(head, last_token_B, count_BV, edits, hidden_RD, ints, floats, *, spec: DrawSpec):
    shard, batch = spec.shard, spec.layout.unpack(ints, floats)
    logits_RV, finite_R = _local_logits(head, hidden_RD, spec)
    slot_R = jnp.minimum(batch.slot_R, spec.layout.num_slots - 1)
    some = partial(_draw_rows, count_BV=count_BV, edits=edits, batch=batch, spec=spec)
    drawable_R, drawn = _by_rows(some, DRAW_BYTES // (4 * logits_RV.shape[1]), (
        logits_RV, slot_R, batch.rows, batch.edited_R
    ))  # fmt: skip
    token_R = drawn["token_R"]
    column_R = jnp.where(batch.counted_R > 0, token_R - shard.offset(logits_RV.shape[1]), logits_RV.shape[1])
    column_R = jnp.where(column_R < 0, logits_RV.shape[1], column_R)
    last_token_B = last_token_B.at[batch.slot_R].set(token_R, mode="drop")
    more_R = (count_BV.at[slot_R, column_R].get(mode="clip") & COUNT_MASK) < COUNT_MASK  # a full count stays
    count_BV = count_BV.at[batch.slot_R, column_R].add(more_R.astype(jnp.int16), mode="drop")
    return last_token_B, count_BV, Drawn(**drawn, finite_R=finite_R & drawable_R)


def _by_rows(function: Callable[[Any], Any], most: int, arrays: Any) -> Any:
    """``function`` of all rows, at most about ``most`` of them at a time."""
    R = jax.tree.leaves(arrays)[0].shape[0]
    size = next(n for n in range(min(max(most, 1), R), 0, -1) if R % n == 0)
    if size == R:
        return function(arrays)
    parts = lax.map(function, jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arrays))
    return jax.tree.map(lambda x: x.reshape(R, *x.shape[2:]), parts)


def _draw_rows(
    arrays, *, count_BV, edits, batch: DrawBatch, spec: DrawSpec
) -> tuple[Bool[Array, "R"], dict[str, jax.Array]]:
    """Penalties, edits and the draw: several arrays of the logits' size at one time."""
    logits_RV, slot_R, rows, edited_R = arrays
    shard, N = spec.shard, spec.max_logprobs
    adjusted_RV = logits_RV
    nothing = (jnp.zeros((slot_R.shape[0], N), jnp.float32), jnp.zeros((slot_R.shape[0], N), jnp.int32))
    random, filtered = spec.asks is not Asks.GREEDY, spec.asks is Asks.FILTERED
    top_RN, top_token_RN = nothing
    if spec.asks is Asks.ANYTHING:
        random, filtered = batch.flags[flags.RANDOM] > 0, batch.flags[flags.FILTER] > 0
        adjusted_RV = lax.cond(
            batch.flags[flags.PENALTIES] > 0,
            lambda x: penalise(x, count_BV[slot_R].astype(jnp.int32), rows),
            lambda x: x,
            adjusted_RV,
        )
        adjusted_RV = lax.cond(
            batch.flags[flags.EDITS] > 0,
            lambda x: _edit(x, edits, slot_R, rows.position_R, edited_R, shard),
            lambda x: x,
            adjusted_RV,
        )
        top_RN, top_token_RN = lax.cond(
            batch.flags[flags.LOGPROBS] > 0, lambda x: top_tokens(x, N, shard), lambda x: nothing, logits_RV
        )
    drawable_R = shard.max(jnp.any(jnp.isfinite(adjusted_RV), axis=1).astype(jnp.int32)) > 0
    token_R = sample(adjusted_RV, rows, random, filtered, shard)
    norm_R = log_normaliser(logits_RV, shard)
    return drawable_R, {
        "token_R": token_R,
        "logprob_R": pick(logits_RV, token_R, shard) - norm_R,
        "top_token_RN": top_token_RN,
        "top_logprob_RN": top_RN - norm_R[:, None],
    }


def _edit(logits_RV, edits, slot_R, position_R, edited_R, shard: VocabShard) -> Float[Array, "R V"]:
    """Adds logit_bias, and holds back the stop tokens of rows that have not reached min_tokens."""
    V, (token_BZ, value_BZ, until_BZ) = logits_RV.shape[1], edits
    active_RZ = (position_R[:, None] < until_BZ[slot_R]) & (edited_R > 0)[:, None]
    column_RZ = token_BZ[slot_R] - shard.offset(V)
    column_RZ = jnp.where(active_RZ & (column_RZ >= 0), column_RZ, V)
    row_R1 = jnp.arange(logits_RV.shape[0], dtype=jnp.int32)[:, None]
    return logits_RV.at[row_R1, column_RZ].add(value_BZ[slot_R], mode="drop")


def _score(head, hidden_TD, target_T, *, spec: HeadSpec) -> Scored:
    N = spec.max_logprobs

    def block(rows):
        hidden_QD, target_Q = rows
        logits_QV, _ = _local_logits(head, hidden_QD, spec)
        norm_Q = log_normaliser(logits_QV, spec.shard)
        top_QN, token_QN = top_tokens(logits_QV, N, spec.shard)
        return Scored(
            logprob_T=pick(logits_QV, jnp.maximum(target_Q, 0), spec.shard) - norm_Q,
            top_token_TN=token_QN,
            top_logprob_TN=top_QN - norm_Q[:, None],
        )

    return map_rows(block, HEAD_ROWS, (hidden_TD, target_T))
