"""The step: (state, batch) -> (state, output), one program for decode tokens, prefill chunks and finetuning windows.

The decoder leaves two slots open and this file fills them: ``linear`` adds each row's adapter to the base matmul,
``attend`` writes the rows' keys and values to their pages and attends through the page table.

Shapes: T packed rows, W gradient rows, Tc chunk rows, R drawn tokens, B sequence slots, D hidden, V vocabulary,
N top log-probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxserve.adapters.bank import BankShape
from jaxserve.adapters.scales import Scales, ScalesShape
from jaxserve.engine import batch as flags
from jaxserve.engine.batch import FROM_DEVICE, BatchLayout, TokenBatch
from jaxserve.engine.gradient import GradientRows, TrainShape
from jaxserve.engine.linear import Linears
from jaxserve.engine.state import EngineState, state_specs
from jaxserve.models import decoder
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import param_specs
from pallas_kernels.paged_kv_write import paged_kv_write
from pallas_kernels.ragged_paged_attention import AttentionLayout, ragged_paged_attention
from pallas_kernels.token_sampling import VocabShard, log_normaliser, penalise, pick, sample, top_tokens
from sharding import AXIS, tree_specs

HEAD_ROWS = 64  # rows of a prompt whose logits exist at one time
DRAW_BYTES = 8 << 20  # float32 logits that are drawn from at one time, at most: a draw holds several copies of them


@dataclass(frozen=True)
class StepSpec:
    """Everything a compiled step is specific to; hashable, so that engines of one shape share programs."""

    config: ModelConfig
    mesh: Mesh
    layout: BatchLayout
    row_block: int
    page_size: int
    max_logprobs: int
    bank: BankShape | None = None
    attention: str | None = None  # force an implementation
    lora: str | None = None
    train: TrainShape | None = None
    scaled: bool = False  # some rows have scales: (IA)3, DoRA

    @property
    def shard(self) -> VocabShard:
        return VocabShard(AXIS, self.mesh.size)


@struct.dataclass
class StepOutput:
    """What a step tells the host."""

    token_R: Int[Array, "R"]
    logprob_R: Float[Array, "R"]  # of the drawn token under the model's own distribution
    finite_R: Bool[Array, "R"]  # the row's logits were finite, and something could be drawn
    finite_B: Bool[Array, "B"]  # all of the slot's rows were finite; true for slots without rows (all slots)
    top_token_RN: Int[Array, "R N"]
    top_logprob_RN: Float[Array, "R N"]
    prompt_logprob_T: Float[Array, "Tc"]  # of target_T after each chunk row
    prompt_top_token_TN: Int[Array, "Tc N"]
    prompt_top_logprob_TN: Float[Array, "Tc N"]
    loss_W: Float[Array, "W"]  # weighted loss of each gradient row
    train_logprob_W: Float[Array, "W"]  # of each gradient row's target


# kernels want arrays at multiples of 256 bytes: the compiler must not hand them an address in the midst of another one
COMPILER_OPTIONS = {"xla_gpu_enable_dynamic_slice_fusion": False}


@partial(jax.jit, static_argnames="spec", donate_argnames="state", compiler_options=COMPILER_OPTIONS)
def step(
    params,
    state: EngineState,
    ints: Int[Array, "I"],
    floats: Float[Array, "J"],
    scales: Scales | None = None,
    *,
    spec: StepSpec,
):
    """Runs one step on the mesh. Returns (state, StepOutput); ``state`` is donated.

    ``scales`` is given to programs whose spec is scaled, and to no others.
    """
    assert (scales is not None) == spec.scaled, "scales go with a scaled spec"
    states = state_specs(state, spec.bank)
    params_specs = tree_specs(param_specs(spec.config, spec.mesh.size))
    scales_specs = tree_specs(ScalesShape(spec.bank).specs()) if spec.scaled and spec.bank is not None else None
    whole = PartitionSpec()
    local = jax.shard_map(
        partial(_local_step, spec=spec),
        mesh=spec.mesh,
        in_specs=(params_specs, states, whole, whole, scales_specs),
        out_specs=(states, whole),
        check_vma=False,
    )
    return local(params, state, ints, floats, scales)


def _local_step(params, state: EngineState, ints, floats, scales, *, spec: StepSpec) -> tuple[EngineState, StepOutput]:
    batch = spec.layout.unpack(ints, floats)
    bucket = spec.layout.bucket
    linears = Linears(state.bank, scales, batch, spec)
    gradient = GradientRows(params, batch, state.train, linears, spec) if bucket.grad_rows else None
    hidden_TD, kv = forward_rows(params, state, batch, spec, linears, gradient)
    finite_B = _finite_slots(hidden_TD, batch, spec)
    state = replace(state, kv=kv)
    state, drawn = _draw(params, state, hidden_TD, batch, spec)
    prompt = _prompt_logprobs(params, hidden_TD[bucket.grad_rows : bucket.block_rows], batch, spec)
    losses = {name: jnp.zeros(0, jnp.float32) for name in ("loss_W", "train_logprob_W")}
    if gradient is not None:
        train, losses = gradient.backward(kv)
        state = replace(state, train=train)
    return state, StepOutput(finite_B=finite_B, **drawn, **prompt, **losses)


def forward_rows(
    params,
    state: EngineState,
    batch: TokenBatch,
    spec: StepSpec,
    linears: Linears,
    gradient: GradientRows | None = None,
):
    """All layers over all rows. Returns final hidden states [T, D] and the written K/V pools."""
    last_T = state.last_token_B.at[batch.slot_T].get(mode="clip")
    token_T = jnp.where(batch.token_T == FROM_DEVICE, last_T, batch.token_T)
    slot_T = jnp.minimum(batch.slot_T, spec.layout.all_slots - 1)
    position_T = jnp.maximum(batch.position_T, 0)
    layers = [{**p, "index": jnp.int32(i)} for i, p in enumerate(params["layers"])]
    attend = _make_attend(state, batch, slot_T, spec)

    def attend_rows(q, k, v, kv, layer):
        out_THC, lse_TH, kv = attend(q, k, v, kv, layer)
        if gradient is not None:
            gradient.record_attention(out_THC, lse_TH)
        return out_THC, kv

    if gradient is not None:
        rope = partial(decoder.rotary, spec.config, position_T=position_T, dtype=params["embed"].dtype)
        gradient.all_rows = (attend, rope)
    return decoder.forward(
        {**params, "layers": layers},
        token_T,
        position_T,
        config=spec.config,
        lookup=partial(_lookup, shard=spec.shard),
        linear=linears.all_rows if gradient is None else gradient.linear,
        attend=attend_rows,
        kv=state.kv,
        wrap=jax.jit if gradient is None else gradient.record,
    )


def _lookup(table_VD: Float[Array, "V D"], token_T: Int[Array, "T"], *, shard: VocabShard) -> Float[Array, "T D"]:
    """Embedding rows from a table split by vocabulary: each shard has some rows, the sum has all."""
    V = table_VD.shape[0]
    local_T = token_T - shard.offset(V)
    mine_T = (local_T >= 0) & (local_T < V)
    rows_TD = table_VD.at[jnp.clip(local_T, 0, V - 1)].get(mode="clip")
    return shard.sum(jnp.where(mine_T[:, None], rows_TD, 0))


def _make_attend(state: EngineState, batch: TokenBatch, slot_T: Int[Array, "T"], spec: StepSpec):
    num_pages = state.kv[0][0].shape[0]
    real_T = batch.position_T >= 0
    page_index_T = jnp.maximum(batch.position_T, 0) // spec.page_size
    page_T = batch.page_table_BM.at[slot_T, page_index_T].get(mode="clip")
    page_T = jnp.where(real_T, page_T, num_pages)  # padding rows are dropped; a negative index would wrap around
    offset_T = jnp.maximum(batch.position_T, 0) % spec.page_size
    layout = AttentionLayout(
        position_T=batch.position_T,
        sequence_T=slot_T,
        page_table_BM=batch.page_table_BM,
        chunk_rows=spec.layout.bucket.block_rows,
        row_block=spec.row_block,
    )

    def attend(q_THC, k_TKC, v_TKC, kv, layer):
        k_PKGC, v_PKGC = kv
        k_PKGC, v_PKGC = paged_kv_write(k_PKGC, v_PKGC, k_TKC, v_TKC, page_T, offset_T, implementation=spec.attention)
        out_THC, lse_TH = ragged_paged_attention(
            q_THC,
            k_PKGC,
            v_PKGC,
            layout,
            scale=spec.config.attention_scale,
            softcap=spec.config.attention_softcap,
            window=layer.window,
            implementation=spec.attention,
        )
        return out_THC, lse_TH, (k_PKGC, v_PKGC)

    return attend


def _finite_slots(hidden_TD, batch: TokenBatch, spec: StepSpec) -> Bool[Array, "B"]:
    finite_T = jnp.all(jnp.isfinite(hidden_TD), axis=1)
    finite_B = jnp.ones(spec.layout.all_slots, jnp.int32).at[batch.slot_T].min(finite_T.astype(jnp.int32), mode="drop")
    return finite_B.astype(bool)


def _local_logits(params, hidden_RD, spec: StepSpec) -> tuple[Float[Array, "R V"], Bool[Array, "R"]]:
    """This shard's logits, padding of the vocabulary at -inf, and which rows are finite on all shards."""
    logits_RV = decoder.logits(params, hidden_RD, spec.config).astype(jnp.float32)
    token_V = spec.shard.offset(logits_RV.shape[1]) + jnp.arange(logits_RV.shape[1], dtype=jnp.int32)
    finite_R = spec.shard.min(jnp.all(jnp.isfinite(logits_RV), axis=1).astype(jnp.int32)) > 0
    return jnp.where((token_V < spec.config.vocab_size)[None], logits_RV, -jnp.inf), finite_R


def _draw(params, state: EngineState, hidden_TD, batch: TokenBatch, spec: StepSpec) -> tuple[EngineState, dict]:
    shard = spec.shard
    logits_RV, finite_R = _local_logits(params, hidden_TD.at[batch.sample_row_R].get(mode="clip"), spec)
    slot_R = jnp.minimum(batch.sample_slot_R, spec.layout.num_slots - 1)
    draw = partial(_draw_rows, state=state, batch_flags=batch.flags, spec=spec)
    drawable_R, drawn = _by_rows(draw, DRAW_BYTES // (4 * logits_RV.shape[1]), (
        logits_RV, slot_R, batch.rows, batch.edited_R
    ))  # fmt: skip
    token_R = drawn["token_R"]
    column_R = jnp.where(batch.counted_R > 0, token_R - shard.offset(logits_RV.shape[1]), logits_RV.shape[1])
    column_R = jnp.where(column_R < 0, logits_RV.shape[1], column_R)
    state = replace(
        state,
        last_token_B=state.last_token_B.at[batch.sample_slot_R].set(token_R, mode="drop"),
        count_BV=state.count_BV.at[batch.sample_slot_R, column_R].add(jnp.int16(1), mode="drop"),
    )
    return state, {**drawn, "finite_R": finite_R & drawable_R}


def _by_rows(function: Callable[[Any], Any], most: int, arrays: Any) -> Any:
    """``function`` of all rows, at most about ``most`` of them at a time."""
    R = jax.tree.leaves(arrays)[0].shape[0]
    size = next(n for n in range(min(max(most, 1), R), 0, -1) if R % n == 0)
    if size == R:
        return function(arrays)
    parts = lax.map(function, jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arrays))
    return jax.tree.map(lambda x: x.reshape(R, *x.shape[2:]), parts)


def _draw_rows(arrays, *, state: EngineState, batch_flags, spec: StepSpec) -> tuple[Bool[Array, "R"], dict]:
    """Penalties, edits and the draw: several arrays of the logits' size at one time."""
    logits_RV, slot_R, rows, edited_R = arrays
    shard = spec.shard
    adjusted_RV = lax.cond(
        batch_flags[flags.PENALTIES] > 0,
        lambda x: penalise(x, state.count_BV[slot_R].astype(jnp.int32), rows),
        lambda x: x,
        logits_RV,
    )
    adjusted_RV = lax.cond(
        batch_flags[flags.EDITS] > 0,
        lambda x: _edit(x, state, slot_R, rows.position_R, edited_R, shard),
        lambda x: x,
        adjusted_RV,
    )
    drawable_R = shard.max(jnp.any(jnp.isfinite(adjusted_RV), axis=1).astype(jnp.int32)) > 0
    token_R = sample(adjusted_RV, rows, batch_flags[flags.RANDOM] > 0, batch_flags[flags.FILTER] > 0, shard)
    norm_R = log_normaliser(logits_RV, shard)
    N = spec.max_logprobs
    nothing = (jnp.zeros((slot_R.shape[0], N), jnp.float32), jnp.zeros((slot_R.shape[0], N), jnp.int32))
    top_RN, top_token_RN = lax.cond(
        batch_flags[flags.LOGPROBS] > 0, lambda x: top_tokens(x, N, shard), lambda x: nothing, logits_RV
    )
    return drawable_R, {
        "token_R": token_R,
        "logprob_R": pick(logits_RV, token_R, shard) - norm_R,
        "top_token_RN": top_token_RN,
        "top_logprob_RN": top_RN - norm_R[:, None],
    }


def _edit(logits_RV, state: EngineState, slot_R, position_R, edited_R, shard: VocabShard) -> Float[Array, "R V"]:
    """Adds logit_bias, and holds back the stop tokens of rows that have not reached min_tokens."""
    V = logits_RV.shape[1]
    active_RZ = (position_R[:, None] < state.edit_until_BZ[slot_R]) & (edited_R > 0)[:, None]
    column_RZ = state.edit_token_BZ[slot_R] - shard.offset(V)
    column_RZ = jnp.where(active_RZ & (column_RZ >= 0), column_RZ, V)
    row_R1 = jnp.arange(logits_RV.shape[0], dtype=jnp.int32)[:, None]
    return logits_RV.at[row_R1, column_RZ].add(state.edit_value_BZ[slot_R], mode="drop")


def _prompt_logprobs(params, hidden_TD, batch: TokenBatch, spec: StepSpec) -> dict:
    """Log-probabilities of the prompt's own tokens, a few rows of logits at a time, where a row asks for them."""
    T, N = hidden_TD.shape[0], spec.max_logprobs

    def block(args):
        hidden_QD, target_Q = args
        logits_QV, _ = _local_logits(params, hidden_QD, spec)
        norm_Q = log_normaliser(logits_QV, spec.shard)
        top_QN, token_QN = top_tokens(logits_QV, N, spec.shard)
        return pick(logits_QV, jnp.maximum(target_Q, 0), spec.shard) - norm_Q, token_QN, top_QN - norm_Q[:, None]

    def compute(hidden_TD):
        size = min(HEAD_ROWS, T)
        blocks = -(-T // size)
        padded_TD = jnp.pad(hidden_TD, ((0, blocks * size - T), (0, 0)))
        target_T = jnp.pad(batch.target_T, (0, blocks * size - T))
        out = lax.map(block, (padded_TD.reshape(blocks, size, -1), target_T.reshape(blocks, size)))
        return tuple(x.reshape(blocks * size, *x.shape[2:])[:T] for x in out)

    nothing = (jnp.zeros(T, jnp.float32), jnp.zeros((T, N), jnp.int32), jnp.zeros((T, N), jnp.float32))
    if T:
        found = lax.cond(batch.flags[flags.PROMPT_LOGPROBS] > 0, compute, lambda _: nothing, hidden_TD)
    else:
        found = nothing
    return dict(zip(("prompt_logprob_T", "prompt_top_token_TN", "prompt_top_logprob_TN"), found, strict=True))
