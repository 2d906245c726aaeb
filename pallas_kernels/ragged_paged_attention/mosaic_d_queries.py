"""dQ of row blocks, tile by tile of rows over the keys that they see.

Two warpgroups compute, each with one query head of one block of rows (a unit of ``work.BlockWork``), a third one copies
pages for both.

Shapes: W rows, H query heads, K kv heads, g = H / K, C head dim, P pages, G tokens per page, B sequences, M pages per
sequence, Q = 64 rows of a unit, S keys per block, X tiles.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.mosaic import ROW, along, full, index, plgpu
from pallas_kernels.ragged_paged_attention.mosaic_pages import Pages, num_copies
from pallas_kernels.ragged_paged_attention.work import BlockWork

Q = mosaic.WARPGROUP_ROWS
COMPUTE, COPY = 2, 2  # two warpgroups compute, the one after them copies


def d_queries(
    rows: Any,
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    page_table_BM: Int[Array, "B M"],
    work: BlockWork,
    shape: Any,
    *,
    interpret: bool,
) -> Float[Array, "W H C"]:
    """Returns dQ; ``rows`` and ``shape`` are ``mosaic_backward``'s Rows and BackwardShape."""
    S, C, dtype = shape.block_keys, shape.head_dim, shape.dtype
    k_stages, v_stages, copies = shape.stages, shape.value_stages, num_copies(shape.page_size, shape.block_keys)
    lists = (work.unit_X2, work.first_X, work.stop_X, work.last_X, work.sequence_X, work.start_N, work.rows_N)
    return mosaic.kernel(
        _kernel(shape),
        out=jax.ShapeDtypeStruct(rows.q_WHC.shape, rows.q_WHC.dtype),
        scratch={
            "q_sm": mosaic.operand(COMPUTE, Q, C, dtype=dtype),
            "d_out_sm": mosaic.operand(COMPUTE, Q, C, dtype=dtype),
            "k_sm": mosaic.operand(k_stages, S, C, dtype=dtype),
            "v_sm": mosaic.operand(v_stages, S, C, dtype=dtype),
            "left_sm": mosaic.operand(COMPUTE, Q, S, dtype=dtype) if interpret else None,
            "rows_full": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            "k_full": plgpu.Barrier(num_arrivals=copies, num_barriers=k_stages),
            "v_full": plgpu.Barrier(num_arrivals=copies, num_barriers=v_stages),
            "k_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=k_stages),
            "v_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=v_stages),
            "tail": plgpu.Barrier(num_arrivals=copies),
        },
        grid={"tile": work.unit_X2.shape[0], "head": shape.num_kv_heads},
        threads=COMPUTE + 1,
        interpret=interpret,
    )(
        rows.q_WHC, rows.d_out_WHC, rows.lse_HW, rows.delta_HW, rows.position_W, k_PKGC, v_PKGC, page_table_BM, *lists
    )  # fmt: skip


def _kernel(shape: Any):
    S, C, group, k_stages, v_stages = shape.block_keys, shape.head_dim, shape.group, shape.stages, shape.value_stages

    def attention_d_queries(
        q_ref, d_out_ref, lse_ref, delta_ref, position_ref, k_ref, v_ref, table_ref, unit_ref, first_ref, stop_ref,
        last_ref, sequence_ref, start_ref, rows_ref, d_q_ref,
        *, q_sm, d_out_sm, k_sm, v_sm, left_sm, rows_full, k_full, v_full, k_free, v_free, tail,
    ):  # fmt: skip
        tile, head, warpgroup = lax.axis_index("tile"), lax.axis_index("head"), lax.axis_index("warpgroup")
        first, stop, last = first_ref[tile], stop_ref[tile], last_ref[tile]

        def compute():
            plgpu.set_max_registers(232, action="increase")
            unit = unit_ref[tile, warpgroup]
            mine = (warpgroup == 0) | (unit != unit_ref[tile, 0])  # else the same unit twice
            block = lax.div(unit, group)
            query_head, own_rows = head * group + lax.rem(unit, group), pl.ds(block * Q, Q)
            start, rows = start_ref[block], rows_ref[block]
            own_q_sm, own_d_out_sm, done = q_sm.at[warpgroup], d_out_sm.at[warpgroup], rows_full.at[warpgroup]
            left_sms = None if left_sm is None else (left_sm.at[warpgroup],)
            plgpu.copy_gmem_to_smem(q_ref.at[own_rows, query_head], own_q_sm, done)
            plgpu.copy_gmem_to_smem(d_out_ref.at[own_rows, query_head], own_d_out_sm, done)
            lse_Q = plgpu.load(lse_ref.at[query_head, own_rows], layout=ROW, optimized=False)
            delta_Q = plgpu.load(delta_ref.at[query_head, own_rows], layout=ROW, optimized=False)
            position_Q = plgpu.load(position_ref.at[own_rows], layout=ROW, optimized=False)
            plgpu.barrier_wait(done)

            def pull(i, d_q_QC, edge: bool):
                """Adds key block i; at an edge some keys are not for every row."""
                own, k_slot, v_slot = map(
                    mosaic.opaque, (warpgroup, lax.rem(i - first, k_stages), lax.rem(i - first, v_stages))
                )
                plgpu.barrier_wait(k_full.at[k_slot])
                plgpu.barrier_wait(v_full.at[v_slot])

                def slope(score_QS):
                    seen_QS = shape.seen(index(1, (Q, S)) + i * S, along(0, position_Q, (Q, S))) if edge else None
                    return shape.weights(score_QS, lse_Q, 0, seen_QS)[1]

                slope_QS, d_weight_QS = mosaic.matmul_pair(
                    (q_sm.at[own], k_sm.at[k_slot].T), (d_out_sm.at[own], v_sm.at[v_slot].T), slope
                )
                pl.when(i + v_stages < stop)(lambda: plgpu.barrier_arrive(v_free.at[v_slot]))
                d_score_QS = (slope_QS * (d_weight_QS - along(0, delta_Q, (Q, S)))).astype(shape.dtype)
                (d_q_QC,) = mosaic.accumulate((d_q_QC,), lambda add: add(0, d_score_QS, k_sm.at[k_slot]), left_sms)
                pl.when(i + k_stages < stop)(lambda: plgpu.barrier_arrive(k_free.at[k_slot]))
                return d_q_QC

            d_q_QC = full((Q, C), 0)
            inner = first
            if shape.window is not None:
                inner = jnp.clip(lax.div(start + rows - shape.window + S - 1, S), first, stop)
                d_q_QC = lax.fori_loop(first, inner, lambda i, d: pull(i, d, edge=True), d_q_QC)
            outer = jnp.clip(lax.div(start + 1, S), inner, stop)
            d_q_QC = lax.fori_loop(inner, outer, lambda i, d: pull(i, d, edge=False), d_q_QC)
            d_q_QC = lax.fori_loop(outer, stop, lambda i, d: pull(i, d, edge=True), d_q_QC)
            real_QC = along(0, position_Q, (Q, C)) >= 0
            own_q_sm[...] = jnp.where(real_QC, d_q_QC * shape.scale, 0.0).astype(shape.dtype)
            plgpu.commit_smem()

            @pl.when(mine)
            def _():
                plgpu.copy_smem_to_gmem(own_q_sm, d_q_ref.at[own_rows, query_head])
                plgpu.wait_smem_to_gmem(0)

        def copy():
            plgpu.set_max_registers(40, action="decrease")
            pages = Pages(table_ref, sequence_ref[tile], head, last, shape.page_size)

            def copy_block(i, _):
                k_slot, v_slot = lax.rem(i - first, k_stages), lax.rem(i - first, v_stages)
                pl.when(i - first >= k_stages)(lambda: plgpu.barrier_wait(k_free.at[k_slot]))
                pages.fetch_clean(k_ref, k_sm.at[k_slot], k_full.at[k_slot], i * S, tail)
                pl.when(i - first >= v_stages)(lambda: plgpu.barrier_wait(v_free.at[v_slot]))
                pages.fetch_clean(v_ref, v_sm.at[v_slot], v_full.at[v_slot], i * S, tail)

            lax.fori_loop(first, stop, copy_block, None)

        @pl.when(unit_ref[tile, 0] >= 0)
        def _():
            pl.when(warpgroup < COPY)(compute)
            pl.when(warpgroup == COPY)(copy)

    return attention_d_queries
