"""dK and dV of row blocks, tile by tile of keys over the rows that see them, added to the keys' pages in place.

Scores are transposed, S^T = K Q^T, so that P^T and dS^T are left operands. Two warpgroups compute, each with 64 keys of
a tile, or, where the head dim is too wide for its registers, with half of the columns of the same 64; a third one
copies keys and rows for both. Thread blocks go through (tile, kv head) pairs until there are no more.

Shapes: W rows, H query heads, K kv heads, g = H / K, C head dim, P pages, A accumulator pages, G tokens per page,
B sequences, M pages per sequence, Q = 64 rows of a unit, S = 64 keys of a warpgroup, X tiles.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.mosaic import COLUMN, along, full, index, plgpu
from pallas_kernels.ragged_paged_attention.layout import Accumulators
from pallas_kernels.ragged_paged_attention.mosaic_pages import Pages, num_copies
from pallas_kernels.ragged_paged_attention.work import KeyWork

Q = S = mosaic.WARPGROUP_ROWS
COMPUTE, COPY = 2, 2  # two warpgroups compute, the one after them copies
SUM_COLUMNS = 32  # of dK or dV that go through shared memory at a time


def add_d_keys(
    rows: Any,
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    page_table_BM: Int[Array, "B M"],
    acc_table_BM: Int[Array, "B M"],
    accumulators: Accumulators,
    work: KeyWork,
    shape: Any,
    *,
    workers: int,
    interpret: bool,
) -> Accumulators:
    """Returns the accumulators; ``rows`` and ``shape`` are ``mosaic_backward``'s Rows and BackwardShape."""
    C, dtype, stages, tile_keys = shape.head_dim, shape.dtype, shape.stages, shape.tile_keys
    copies = num_copies(shape.page_size, tile_keys)
    d_k_ref, d_v_ref = map(jax.new_ref, accumulators)
    mosaic.kernel(
        _kernel(shape, workers),
        scratch={
            "k_sm": mosaic.operand(tile_keys, C, dtype=dtype),
            "v_sm": mosaic.operand(tile_keys, C, dtype=dtype),
            "q_sm": mosaic.operand(stages, Q, C, dtype=dtype),
            "d_out_sm": mosaic.operand(stages, Q, C, dtype=dtype),
            "lse_sm": plgpu.SMEM((stages, Q), jnp.float32),
            "delta_sm": plgpu.SMEM((stages, Q), jnp.float32),
            "position_sm": plgpu.SMEM((stages, Q), jnp.int32),
            "sum_sm": mosaic.operand(COMPUTE, S, SUM_COLUMNS, dtype=jnp.float32),
            "left_sm": mosaic.operand(COMPUTE, S, Q, dtype=dtype) if interpret else None,
            "keys_full": plgpu.Barrier(num_arrivals=2 * copies),
            "keys_free": plgpu.Barrier(num_arrivals=COMPUTE),
            "rows_full": plgpu.Barrier(num_arrivals=5, num_barriers=stages),
            "rows_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            "sum_full": plgpu.Barrier(num_arrivals=num_copies(shape.page_size, S), num_barriers=COMPUTE),
            "tail": plgpu.Barrier(num_arrivals=copies),
        },
        grid={"worker": workers},
        threads=COMPUTE + 1,
        interpret=interpret,
    )(
        rows.q_WHC, rows.d_out_WHC, rows.lse_HW, rows.delta_HW, rows.position_W, k_PKGC, v_PKGC, page_table_BM,
        acc_table_BM, work.key_X, work.first_X, work.stop_X, work.last_X, work.sequence_X, work.tiles_1,
        d_k_ref, d_v_ref,
    )  # fmt: skip
    return jax.freeze(d_k_ref), jax.freeze(d_v_ref)


def _kernel(shape: Any, workers: int):
    stages, group, K = shape.stages, shape.group, shape.num_kv_heads
    width = shape.head_dim // shape.halves  # columns of dK and dV in one warpgroup's registers

    def attention_d_keys(
        q_ref, d_out_ref, lse_ref, delta_ref, position_ref, k_ref, v_ref, table_ref, acc_table_ref, key_ref, first_ref,
        stop_ref, last_ref, sequence_ref, tiles_ref, d_k_ref, d_v_ref,
        *, k_sm, v_sm, q_sm, d_out_sm, lse_sm, delta_sm, position_sm, sum_sm, left_sm, keys_full, keys_free, rows_full,
        rows_free, sum_full, tail,
    ):  # fmt: skip
        worker, warpgroup = lax.axis_index("worker"), lax.axis_index("warpgroup")
        mine = lax.div(tiles_ref[0] * K - worker + workers - 1, workers)  # (tile, head) pairs of this worker

        def pair(i):
            at = worker + i * workers
            return lax.div(at, K), lax.rem(at, K)

        def units(tile):
            """All query heads of all blocks whose rows see the tile."""
            return first_ref[tile] * group, stop_ref[tile] * group

        def compute():
            plgpu.set_max_registers(232, action="increase")
            if shape.halves == 1:
                own_half, first_column, own_columns = warpgroup, 0, slice(None)
            else:
                own_half, first_column, own_columns = jnp.int32(0), warpgroup * width, pl.ds(warpgroup * width, width)
            own_sum_sm, own_sum_full = sum_sm.at[warpgroup], sum_full.at[warpgroup]
            left_sms = None if left_sm is None else (left_sm.at[warpgroup],) * 2

            def add_tile(i, step):
                tile, head = pair(i)
                key = key_ref[tile] + own_half * S
                plgpu.barrier_wait(keys_full)

                def pull(_, carry):
                    """Adds the rows of one unit."""
                    step, d_k_SC, d_v_SC = carry
                    slot = lax.rem(step, stages)
                    own_k_sm, own_v_sm = (x.at[pl.ds(mosaic.opaque(own_half) * S, S)] for x in (k_sm, v_sm))
                    own_q_sm, own_d_out_sm = (x.at[slot, :, own_columns] for x in (q_sm, d_out_sm))
                    plgpu.barrier_wait(rows_full.at[slot])

                    def weigh(score_SQ):
                        lse_Q = plgpu.load(lse_sm.at[slot], layout=COLUMN)
                        position_Q = plgpu.load(position_sm.at[slot], layout=COLUMN)
                        seen_SQ = shape.seen(index(0, (S, Q)) + key, along(1, position_Q, (S, Q)))
                        weight_SQ, slope_SQ = shape.weights(score_SQ, lse_Q, 1, seen_SQ)
                        return weight_SQ.astype(shape.dtype), slope_SQ

                    (weight_SQ, slope_SQ), d_weight_SQ = mosaic.matmul_pair(
                        (own_k_sm, q_sm.at[slot].T), (own_v_sm, d_out_sm.at[slot].T), weigh
                    )

                    def add_both(add):
                        add(1, weight_SQ, own_d_out_sm)
                        delta_Q = plgpu.load(delta_sm.at[slot], layout=COLUMN)
                        d_score_SQ = slope_SQ * (d_weight_SQ - along(1, delta_Q, (S, Q)))
                        add(0, d_score_SQ.astype(shape.dtype), own_q_sm)

                    d_k_SC, d_v_SC = mosaic.accumulate((d_k_SC, d_v_SC), add_both, left_sms)
                    plgpu.barrier_arrive(rows_free.at[slot])
                    return step + 1, d_k_SC, d_v_SC

                init = step, full((S, width), 0), full((S, width), 0)
                step, d_k_SC, d_v_SC = lax.fori_loop(*units(tile), pull, init)
                plgpu.barrier_arrive(keys_free)
                pages = Pages(acc_table_ref, sequence_ref[tile], head, last_ref[tile], shape.page_size)
                for pool_ref, sums_SC, scale in ((d_k_ref, d_k_SC, shape.scale), (d_v_ref, d_v_SC, 1.0)):
                    for c in range(0, width, SUM_COLUMNS):
                        columns = pl.ds(first_column + c, SUM_COLUMNS)
                        add_to_pages(pages, pool_ref, key, columns, sums_SC[:, c : c + SUM_COLUMNS] * scale)
                return step

            def add_to_pages(pages, pool_ref, key, columns, part_SC):
                """Reads the sums of 64 keys, adds to them and writes them back; nobody else has these keys."""
                parts = [
                    (pool_ref.at[(*place, columns)], own_sum_sm.at[rows], there & (place[0] < pool_ref.shape[0]))
                    for place, rows, there in pages.parts(key, S)
                ]
                for part_ref, part_sm, there in parts:
                    pl.when(there)(partial(plgpu.copy_gmem_to_smem, part_ref, part_sm, own_sum_full))
                    pl.when(~there)(lambda: plgpu.barrier_arrive(own_sum_full))
                plgpu.barrier_wait(own_sum_full)
                own_sum_sm[...] = plgpu.load(own_sum_sm, layout=plgpu.Layout.WGMMA) + part_SC
                plgpu.commit_smem()
                for part_ref, part_sm, there in parts:
                    pl.when(there)(partial(plgpu.copy_smem_to_gmem, part_sm, part_ref))
                plgpu.wait_smem_to_gmem(0)

            lax.fori_loop(0, mine, add_tile, jnp.int32(0))

        def copy():
            plgpu.set_max_registers(40, action="decrease")

            def copy_tile(i, step):
                tile, head = pair(i)
                pages = Pages(table_ref, sequence_ref[tile], head, last_ref[tile], shape.page_size)
                pl.when(i > 0)(lambda: plgpu.barrier_wait(keys_free))
                pages.fetch_clean(k_ref, k_sm, keys_full, key_ref[tile], tail)
                pages.fetch_clean(v_ref, v_sm, keys_full, key_ref[tile], tail)

                def copy_unit(unit, step):
                    slot = lax.rem(step, stages)
                    query_head, rows = head * group + lax.rem(unit, group), pl.ds(lax.div(unit, group) * Q, Q)
                    done = rows_full.at[slot]
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(rows_free.at[slot]))
                    plgpu.copy_gmem_to_smem(q_ref.at[rows, query_head], q_sm.at[slot], done)
                    plgpu.copy_gmem_to_smem(d_out_ref.at[rows, query_head], d_out_sm.at[slot], done)
                    plgpu.copy_gmem_to_smem(lse_ref.at[query_head, rows], lse_sm.at[slot], done)
                    plgpu.copy_gmem_to_smem(delta_ref.at[query_head, rows], delta_sm.at[slot], done)
                    plgpu.copy_gmem_to_smem(position_ref.at[rows], position_sm.at[slot], done)
                    return step + 1

                return lax.fori_loop(*units(tile), copy_unit, step)

            def see_freed(step, _):
                plgpu.barrier_wait(rows_free.at[lax.rem(step, stages)])

            steps = lax.fori_loop(0, mine, copy_tile, jnp.int32(0))
            pl.when(mine > 0)(lambda: plgpu.barrier_wait(keys_free))  # every arrival has to be waited for
            lax.fori_loop(jnp.maximum(steps - stages, 0), steps, see_freed, None)

        pl.when(warpgroup < COPY)(compute)
        pl.when(warpgroup == COPY)(copy)

    return attention_d_keys
