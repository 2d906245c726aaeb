"""The step: (state, batch) -> (state, output), one program for decode tokens, prefill chunks and finetuning windows.

The decoder leaves slots open and this file fills them: ``linear`` adds each row's adapter to the base matmul,
``attend`` writes the rows' keys and values to their pages and attends through the page table, ``gate_up`` does with
gate and up in one pass what there is to do.

What the rows' hidden states say of the next token is for ``draw``, another program: nothing here waits for a number
that only the run knows, so the device is given its next step before this one has ended.

Shapes: T rows that run forward, W gradient rows, Tc chunk rows, R drawn tokens, B sequence slots, D hidden, V
vocabulary.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxserve.adapters.bank import BankShape
from jaxserve.adapters.scales import Scales, ScalesShape
from jaxserve.engine.batch import FROM_DEVICE, BatchLayout, TokenBatch
from jaxserve.engine.draw import Drawn, Scored
from jaxserve.engine.gradient import AutodiffTape, GradientRows, TrainShape, TrainState
from jaxserve.engine.hashing import hashed_once
from jaxserve.engine.linear import Linears
from jaxserve.engine.stash import StashTape, Tape
from jaxserve.engine.state import EngineState, state_specs
from jaxserve.models import decoder
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import param_specs
from pallas_kernels.paged_kv_write import paged_kv_write
from pallas_kernels.ragged_paged_attention import AttentionLayout, ragged_paged_attention
from pallas_kernels.token_sampling import VocabShard
from sharding import AXIS, tree_specs


@hashed_once
@dataclass(frozen=True)
class StepSpec:
    """Everything a compiled step is specific to; hashable, so that engines of one shape share programs."""

    config: ModelConfig
    mesh: Mesh
    layout: BatchLayout
    row_block: int
    page_size: int
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
    """What a step leaves to be drawn from, and what it tells the host."""

    hidden_RD: Float[Array, "R D"] | None  # of the rows that draw; None: on the host's side they are not kept
    chunk_hidden_TD: Float[Array, "Tc D"] | None
    finite_B: Bool[Array, "B"]  # all of the slot's rows were finite; true for slots without rows (all slots)
    loss_W: Float[Array, "W"]  # weighted loss of each gradient row
    train_logprob_W: Float[Array, "W"]  # of each gradient row's target
    drawn: Drawn | None = None  # what ``draw`` made of it
    scored: Scored | None = None


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
    linears, train = Linears(state.bank, scales, batch, spec), state.train
    gradient = GradientRows(params, batch, train, linears, spec) if bucket.grad_rows else None
    tape = None if gradient is None else gradient.tape
    if bucket.stashed and bucket.chunk_rows:
        tape = _stash_tape(linears, train, batch)
    hidden_TD, kv = forward_rows(params, state, batch, spec, linears, tape)
    finite_B = _finite_slots(hidden_TD, batch, spec)
    loss_W = logprob_W = jnp.zeros(0, jnp.float32)
    hidden_RD = hidden_TD.at[batch.sample_row_R].get(mode="clip")
    chunk_hidden_TD = hidden_TD[bucket.forward_block_rows - bucket.chunk_rows : bucket.forward_block_rows]
    if isinstance(tape, StashTape):
        train = replace(cast(TrainState, train), stash=tape.written())
    if gradient is not None:
        train, loss_W, logprob_W = gradient.backward(cast(TrainState, train), kv)
    state = replace(state, kv=kv, train=train)
    return state, StepOutput(hidden_RD, chunk_hidden_TD, finite_B, loss_W, logprob_W)


def _stash_tape(linears: Linears, train: TrainState | None, batch: TokenBatch) -> StashTape:
    assert train is not None, "a state without room for training"
    assert train.stash is not None, "a state without a stash"
    assert batch.stash_block_N is not None, "a batch that says nothing of the stash"
    return StashTape(linears, train.stash, batch.stash_block_N)


def forward_rows(
    params,
    state: EngineState,
    batch: TokenBatch,
    spec: StepSpec,
    linears: Linears,
    tape: Tape | None = None,
):
    """All layers over all rows that run forward. Returns final hidden states [T, D] and the written K/V pools."""
    last_T = state.last_token_B.at[batch.rows.slot_T].get(mode="clip")
    token_T = jnp.where(batch.token_T == FROM_DEVICE, last_T, batch.token_T)
    slot_T = jnp.minimum(batch.rows.slot_T, spec.layout.all_slots - 1)
    position_T = jnp.maximum(batch.rows.position_T, 0)
    layers = [{**p, "index": jnp.int32(i)} for i, p in enumerate(params["layers"])]
    attend = _make_attend(state, batch, slot_T, spec)

    def attend_rows(q, k, v, kv, layer):
        out_THC, lse_TH, kv = attend(q, k, v, kv, layer)
        if tape is not None:
            tape.attended(out_THC, lse_TH)
        return out_THC, kv

    if isinstance(tape, AutodiffTape):
        rope = partial(decoder.rotary, spec.config, position_T=position_T, dtype=params["embed"].dtype)
        tape.engine = attend, rope
    return decoder.forward(
        {**params, "layers": layers},
        token_T,
        position_T,
        config=spec.config,
        lookup=partial(_lookup, shard=spec.shard),
        linear=linears.all_rows if tape is None else tape.linear,
        attend=attend_rows,
        kv=state.kv,
        gate_up=linears.gate_up if tape is None else tape.gate_up,
        wrap=jax.jit if tape is None else tape.wrap,
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
    place_T, real_T = jnp.maximum(batch.rows.position_T, 0), batch.rows.position_T >= 0
    page_index_T = place_T // spec.page_size
    page_T = batch.page_table_BM.at[slot_T, page_index_T].get(mode="clip")
    page_T = jnp.where(real_T, page_T, num_pages)  # padding rows are dropped; a negative index would wrap around
    offset_T = place_T % spec.page_size
    layout = AttentionLayout(
        position_T=batch.rows.position_T,
        sequence_T=slot_T,
        page_table_BM=batch.page_table_BM,
        chunk_rows=spec.layout.bucket.forward_block_rows,
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
    finite_B = (
        jnp.ones(spec.layout.all_slots, jnp.int32).at[batch.rows.slot_T].min(finite_T.astype(jnp.int32), mode="drop")
    )
    return finite_B.astype(bool)
