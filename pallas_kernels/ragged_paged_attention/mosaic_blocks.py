"""Row blocks on Hopper: prefill chunks and finetune windows over paged keys (FlashAttention-3, Shah et al. 2024).

Two warpgroups compute, each with one query head of one block of 64 rows (a unit of ``work.BlockWork``), a third copies
pages for both. While one of them is at its softmax, the other one has the tensor cores.

Shapes: T rows, H query heads, K kv heads, g = H / K, C head dim, P pages, G tokens per page, B sequences, M pages per
sequence, Q = 64 rows of a unit, S keys per block, X tiles.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.mosaic import LN2, LOG2E, MASKED, ROW, along, full, index, plgpu
from pallas_kernels.ragged_paged_attention.mosaic_pages import KernelShape, Pages, num_copies
from pallas_kernels.ragged_paged_attention.work import BlockWork

Q = mosaic.WARPGROUP_ROWS
COMPUTE, COPY = 2, 2  # two warpgroups compute, the one after them copies


@dataclass(frozen=True, kw_only=True)
class BlockShape(KernelShape):
    """What the kernel is compiled for."""

    window: int | None

    @property
    def block_keys(self) -> int:
        return 128 if self.head_dim <= 128 else 64

    @property
    def stages(self) -> int:
        return 2 if self.head_dim > 64 else 3


def block_attention(
    q_THC: Float[Array, "T H C"],
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    page_table_BM: Int[Array, "B M"],
    work: BlockWork,
    shape: BlockShape,
    *,
    interpret: bool,
) -> tuple[Float[Array, "T H C"], Float[Array, "T H"]]:
    """Returns attention of the rows in blocks, and the log-sum-exp of their scores.

    The outputs have a place for all T rows; those past the blocks are left as they are, whatever that is.
    """
    T, H, C = q_THC.shape
    S, stages = shape.block_keys, shape.stages
    copies = num_copies(shape.page_size, S)
    tiles = work.unit_X2.shape[0]
    lists = (work.unit_X2, work.first_X, work.stop_X, work.last_X, work.sequence_X, work.start_N, work.rows_N)
    out_THC, lse_HT = mosaic.kernel(
        _block_attention(shape),
        out=(jax.ShapeDtypeStruct((T, H, C), q_THC.dtype), jax.ShapeDtypeStruct((H, T), jnp.float32)),
        scratch={
            "q_sm": mosaic.operand(COMPUTE, Q, C, dtype=shape.dtype),
            "k_sm": mosaic.operand(stages, S, C, dtype=shape.dtype),
            "v_sm": mosaic.operand(stages, S, C, dtype=shape.dtype),
            "lse_sm": plgpu.SMEM((COMPUTE, Q), jnp.float32),
            "weight_sm": mosaic.operand(COMPUTE, Q, S, dtype=shape.dtype) if interpret else None,
            "q_full": plgpu.Barrier(num_barriers=COMPUTE),
            "k_full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            "v_full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            "k_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            "v_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            "turn": plgpu.Barrier(num_arrivals=COMPUTE),
            "v_tail": plgpu.Barrier(num_arrivals=copies),
        },
        grid={"tile": tiles, "head": shape.num_kv_heads},
        threads=COMPUTE + 1,
        interpret=interpret,
    )(q_THC, k_PKGC, v_PKGC, page_table_BM, *lists)
    return out_THC, lse_HT.T


def _block_attention(shape: BlockShape):
    S, C, stages, group = shape.block_keys, shape.head_dim, shape.stages, shape.group
    # scores times this are exponents of 2; with a soft cap they already are
    row_scale = shape.scale * LOG2E if shape.softcap is None else 1.0

    def block_attention(
        q_ref, k_ref, v_ref, table_ref, unit_ref, first_ref, stop_ref, last_ref, sequence_ref, start_ref, rows_ref,
        out_ref, lse_ref, *, q_sm, k_sm, v_sm, lse_sm, weight_sm, q_full, k_full, v_full, k_free, v_free, turn, v_tail,
    ):  # fmt: skip
        tile, head, warpgroup = lax.axis_index("tile"), lax.axis_index("head"), lax.axis_index("warpgroup")
        first, stop, last = first_ref[tile], stop_ref[tile], last_ref[tile]

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute():
            plgpu.set_max_registers(232, action="increase")
            unit = unit_ref[tile, warpgroup]
            own = (warpgroup == 0) | (unit != unit_ref[tile, 0])  # else the same unit twice
            block = lax.div(unit, group)
            query_head = head * group + lax.rem(unit, group)
            start, rows = start_ref[block], rows_ref[block]
            own_q_sm, own_lse_sm = q_sm.at[warpgroup], lse_sm.at[warpgroup]
            own_weight_sm = None if weight_sm is None else (weight_sm.at[warpgroup],)
            own_rows = pl.ds(block * Q, Q)
            plgpu.copy_gmem_to_smem(q_ref.at[own_rows, query_head], own_q_sm, q_full.at[warpgroup])
            plgpu.barrier_wait(q_full.at[warpgroup])

            def attend(i, carry, edge: bool):
                """Adds key block i; at an edge some keys are not for every row."""
                top_Q, total_Q, out_QC = carry
                slot = lax.rem(i - first, stages)

                def scores(acc):
                    plgpu.wgmma(acc, own_q_sm, k_sm.at[slot].T)
                    take_turn()
                    return acc[...]

                score_QS = pl.run_scoped(scores, plgpu.ACC((Q, S), jnp.float32))

                @pl.when(i + stages < stop)
                def _():
                    plgpu.barrier_arrive(k_free.at[slot])

                if shape.softcap is not None:
                    score_QS = jnp.tanh(score_QS * (shape.scale / shape.softcap)) * (shape.softcap * LOG2E)
                if edge:
                    key_QS, position_QS = index(1, (Q, S)) + i * S, index(0, (Q, S)) + start
                    seen_QS = key_QS <= position_QS
                    if shape.window is not None:
                        seen_QS &= key_QS > position_QS - shape.window
                    score_QS = jnp.where(seen_QS, score_QS, MASKED)
                new_top_Q = jnp.maximum(top_Q, score_QS.max(axis=1) * row_scale)
                decay_Q = jnp.exp2(top_Q - new_top_Q)
                weight_QS = jnp.exp2(score_QS * row_scale - along(0, new_top_Q, (Q, S)))
                out_QC *= along(0, decay_Q, (Q, C))
                total_Q = total_Q * decay_Q + weight_QS.sum(axis=1)
                weight16_QS = weight_QS.astype(shape.dtype)
                total_Q, out_QC, weight16_QS = lax.optimization_barrier((total_Q, out_QC, weight16_QS))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turn)

                def add_values(add):
                    add(0, weight16_QS, v_sm.at[slot])

                    @pl.when(i + 1 < stop)
                    def _():
                        plgpu.barrier_wait(k_full.at[lax.rem(i + 1 - first, stages)])

                (out_QC,) = mosaic.accumulate((out_QC,), add_values, own_weight_sm)

                @pl.when(i + stages < stop)
                def _():
                    plgpu.barrier_arrive(v_free.at[slot])

                return new_top_Q, total_Q, out_QC

            @pl.when(first < stop)
            def _():
                plgpu.barrier_wait(k_full.at[0])

            pl.when(warpgroup == 1)(take_turn)
            carry = full((Q,), MASKED, ROW), full((Q,), 0, ROW), full((Q, C), 0)
            inner = first
            if shape.window is not None:
                inner = jnp.clip(lax.div(start + rows - shape.window + S - 1, S), first, stop)
                carry = lax.fori_loop(first, inner, lambda i, c: attend(i, c, edge=True), carry)
            outer = jnp.clip(lax.div(start + 1, S), inner, stop)
            carry = lax.fori_loop(inner, outer, lambda i, c: attend(i, c, edge=False), carry)
            top_Q, total_Q, out_QC = lax.fori_loop(outer, stop, lambda i, c: attend(i, c, edge=True), carry)
            pl.when(warpgroup == 0)(take_turn)

            total_Q = jnp.where(total_Q == 0, 1.0, total_Q)
            out_QC /= along(0, total_Q, (Q, C))
            own_q_sm[...] = jnp.where(index(0, (Q, C)) < rows, out_QC, 0.0).astype(shape.dtype)
            row_Q = plgpu.broadcasted_iota(jnp.int32, (Q,), 0, layout=ROW)
            own_lse_sm[...] = jnp.where(row_Q < rows, (top_Q + jnp.log2(total_Q)) * LN2, -jnp.inf)
            plgpu.commit_smem()

            @pl.when(own)
            def _():
                plgpu.copy_smem_to_gmem(own_q_sm, out_ref.at[own_rows, query_head])
                plgpu.copy_smem_to_gmem(own_lse_sm, lse_ref.at[query_head, own_rows])
                plgpu.wait_smem_to_gmem(0)

        def copy():
            plgpu.set_max_registers(40, action="decrease")
            pages = Pages(table_ref, sequence_ref[tile], head, last, shape.page_size)

            def copy_block(i, _):
                slot = lax.rem(i - first, stages)
                used = i - first >= stages
                pl.when(used)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                pages.fetch(k_ref, k_sm.at[slot], k_full.at[slot], i * S)
                pl.when(used)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                pages.fetch_clean(v_ref, v_sm.at[slot], v_full.at[slot], i * S, v_tail)

            lax.fori_loop(first, stop, copy_block, None)

        @pl.when(unit_ref[tile, 0] >= 0)
        def _():
            pl.when(warpgroup < COPY)(compute)
            pl.when(warpgroup == COPY)(copy)

    return block_attention
