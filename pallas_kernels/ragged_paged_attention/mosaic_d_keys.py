"""dK and dV of row blocks, tile by tile of keys over the rows that see them, added to the keys' pages in place.

Scores are transposed, S^T = K Q^T, so that P^T and dS^T are left operands. Two warpgroups compute, by turns with the
units of rows that see a tile's 64 keys, or, where the head dim is too wide for its registers, each with half of the
columns of every unit; a third one copies keys and rows for both. What two that took turns have summed they put together
at the end of a tile, one of them dK, the other one dV.

Thread blocks go through (tile, kv head) pairs until there are no more: those that most rows see first, and to and fro,
so that all have about the same work. Short tiles, and as many pairs on every core, halved the time of a prompt of 2,048
on 132 cores.

Shapes: W rows, H query heads, K kv heads, g = H / K, C head dim, P pages, A accumulator pages, G tokens per page,
B sequences, M pages per sequence, Q = 64 rows of a unit, S = 64 keys of a tile, X tiles.
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
    C, dtype, slots = shape.head_dim, shape.dtype, shape.turns * shape.stages
    copies = num_copies(shape.page_size, S)
    d_k_ref, d_v_ref = map(jax.new_ref, accumulators)
    mosaic.kernel(
        _kernel(shape, workers),
        scratch={
            "k_sm": mosaic.operand(1, S, C, dtype=dtype),
            "v_sm": mosaic.operand(1, S, C, dtype=dtype),
            "q_sm": mosaic.operand(slots, Q, C, dtype=dtype),
            "d_out_sm": mosaic.operand(slots, Q, C, dtype=dtype),
            "lse_sm": plgpu.SMEM((slots, Q), jnp.float32),
            "delta_sm": plgpu.SMEM((slots, Q), jnp.float32),
            "position_sm": plgpu.SMEM((slots, Q), jnp.int32),
            "sum_sm": mosaic.operand(COMPUTE, S, shape.sum_columns, dtype=jnp.float32),
            "left_sm": mosaic.operand(COMPUTE, S, Q, dtype=dtype) if interpret else None,
            "keys_full": plgpu.Barrier(num_arrivals=2 * copies),
            "keys_free": plgpu.Barrier(num_arrivals=COMPUTE),
            "rows_full": plgpu.Barrier(num_arrivals=5, num_barriers=slots),
            "rows_free": plgpu.Barrier(num_arrivals=shape.halves, num_barriers=slots),
            "sum_full": plgpu.Barrier(num_arrivals=copies, num_barriers=COMPUTE),
            "given": plgpu.Barrier(num_arrivals=COMPUTE),
            "taken": plgpu.Barrier(num_arrivals=COMPUTE),
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
    stages, group, K, turns = shape.stages, shape.group, shape.num_kv_heads, shape.turns
    width = shape.head_dim // shape.halves  # columns of dK and dV in one warpgroup's registers

    def attention_d_keys(
        q_ref, d_out_ref, lse_ref, delta_ref, position_ref, k_ref, v_ref, table_ref, acc_table_ref, key_ref, first_ref,
        stop_ref, last_ref, sequence_ref, tiles_ref, d_k_ref, d_v_ref,
        *, k_sm, v_sm, q_sm, d_out_sm, lse_sm, delta_sm, position_sm, sum_sm, left_sm, keys_full, keys_free, rows_full,
        rows_free, sum_full, given, taken, tail,
    ):  # fmt: skip
        worker, warpgroup = lax.axis_index("worker"), lax.axis_index("warpgroup")

        def place(i):
            """Of this worker's (tile, head) pair i among all."""
            return i * workers + jnp.where(lax.rem(i, 2) == 0, worker, workers - 1 - worker)

        pairs = tiles_ref[0] * K
        rounds = lax.div(pairs + workers - 1, workers)
        mine = rounds - (place(rounds - 1) >= pairs).astype(jnp.int32)

        def pair(i):
            return lax.div(place(i), K), lax.rem(place(i), K)

        def units(tile):
            """All query heads of all blocks whose rows see the tile."""
            return first_ref[tile] * group, stop_ref[tile] * group

        def compute():
            plgpu.set_max_registers(232, action="increase")
            own_turn, own_columns = jnp.int32(0), pl.ds(warpgroup * width, width)
            if turns == 2:
                own_turn, own_columns = warpgroup, slice(None)
            own_sum_sm, own_sum_full = sum_sm.at[warpgroup], sum_full.at[warpgroup]
            left_sms = None if left_sm is None else (left_sm.at[warpgroup],) * 2

            def add_tile(i, step):
                tile, head = pair(i)
                key = key_ref[tile]
                plgpu.barrier_wait(keys_full)

                def pull(_, carry):
                    """Adds the rows of one unit."""
                    step, d_k_SC, d_v_SC = carry
                    slot, only = own_turn * stages + lax.rem(step, stages), mosaic.opaque(jnp.int32(0))
                    own_q_sm, own_d_out_sm = (x.at[slot, :, own_columns] for x in (q_sm, d_out_sm))
                    plgpu.barrier_wait(rows_full.at[slot])

                    def weigh(score_SQ):
                        lse_Q = plgpu.load(lse_sm.at[slot], layout=COLUMN)
                        position_Q = plgpu.load(position_sm.at[slot], layout=COLUMN)
                        seen_SQ = shape.seen(index(0, (S, Q)) + key, along(1, position_Q, (S, Q)))
                        weight_SQ, slope_SQ = shape.weights(score_SQ, lse_Q, 1, seen_SQ)
                        return weight_SQ.astype(shape.dtype), slope_SQ

                    (weight_SQ, slope_SQ), d_weight_SQ = mosaic.matmul_pair(
                        (k_sm.at[only], q_sm.at[slot].T), (v_sm.at[only], d_out_sm.at[slot].T), weigh
                    )

                    def add_both(add):
                        add(1, weight_SQ, own_d_out_sm)
                        delta_Q = plgpu.load(delta_sm.at[slot], layout=COLUMN)
                        d_score_SQ = slope_SQ * (d_weight_SQ - along(1, delta_Q, (S, Q)))
                        add(0, d_score_SQ.astype(shape.dtype), own_q_sm)

                    d_k_SC, d_v_SC = mosaic.accumulate((d_k_SC, d_v_SC), add_both, left_sms)
                    plgpu.barrier_arrive(rows_free.at[slot])
                    return step + 1, d_k_SC, d_v_SC

                first, stop = units(tile)
                count = lax.div(stop - first - own_turn + turns - 1, turns)
                init = step, full((S, width), 0), full((S, width), 0)
                step, d_k_SC, d_v_SC = lax.fori_loop(0, count, pull, init)
                plgpu.barrier_arrive(keys_free)
                pages = Pages(acc_table_ref, sequence_ref[tile], head, last_ref[tile], shape.page_size)
                d_k, d_v = (d_k_ref, d_k_SC, shape.scale), (d_v_ref, d_v_SC, 1.0)
                if turns == 2:
                    pl.when(warpgroup == 0)(lambda: put_together(pages, key, *d_k, d_v_SC))
                    pl.when(warpgroup == 1)(lambda: put_together(pages, key, *d_v, d_k_SC))
                    return step
                for pool_ref, sums_SC, scale in (d_k, d_v):
                    for c in range(0, width, shape.sum_columns):
                        part_SC = sums_SC[:, c : c + shape.sum_columns] * scale
                        add_to_pages(pages, pool_ref, key, warpgroup * width + c, part_SC)
                return step

            def put_together(pages, key, pool_ref, own_SC, scale, others_SC):
                """Adds this warpgroup's sums, and what the other one has of them, and gives that one its own."""
                for c in range(0, width, shape.sum_columns):
                    columns = slice(c, c + shape.sum_columns)
                    plgpu.wait_smem_to_gmem(0)
                    own_sum_sm[...] = others_SC[:, columns]
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(given)
                    plgpu.barrier_wait(given)
                    part_SC = own_SC[:, columns] + plgpu.load(sum_sm.at[1 - warpgroup], layout=plgpu.Layout.WGMMA)
                    plgpu.barrier_arrive(taken)
                    plgpu.barrier_wait(taken)
                    plgpu.commit_smem()  # copies into it come after the other one's loads
                    add_to_pages(pages, pool_ref, key, c, part_SC * scale)

            def add_to_pages(pages, pool_ref, key, first_column, part_SC):
                """Reads the sums of 64 keys, adds to them and writes them back; nobody else has these columns."""
                columns = pl.ds(first_column, shape.sum_columns)
                plgpu.wait_smem_to_gmem(0)
                parts = [
                    (pool_ref.at[(*place, columns)], own_sum_sm.at[rows], there & (place[0] < pool_ref.shape[0]))
                    for place, rows, there in pages.parts(key, S)
                ]
                for part_ref, part_sm, there in parts:
                    pl.when(there)(partial(plgpu.copy_gmem_to_smem, part_ref, part_sm, own_sum_full))
                    pl.when(~there)(lambda: plgpu.barrier_arrive(own_sum_full))
                plgpu.barrier_wait(own_sum_full)
                # rows that are not finite reach no key past them, which nobody would clear
                there_SC = index(0, part_SC.shape) + key <= pages.last
                part_SC = jnp.where(there_SC, part_SC, jnp.zeros_like(part_SC))
                own_sum_sm[...] = plgpu.load(own_sum_sm, layout=plgpu.Layout.WGMMA) + part_SC
                plgpu.commit_smem()
                for part_ref, part_sm, there in parts:
                    pl.when(there)(partial(plgpu.copy_smem_to_gmem, part_sm, part_ref))

            lax.fori_loop(0, mine, add_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        def copy():
            plgpu.set_max_registers(40, action="decrease")

            def copy_tile(i, steps):
                tile, head = pair(i)
                pages = Pages(table_ref, sequence_ref[tile], head, last_ref[tile], shape.page_size)
                pl.when(i > 0)(lambda: plgpu.barrier_wait(keys_free))
                pages.fetch_clean(k_ref, k_sm.at[0], keys_full, key_ref[tile], tail)
                pages.fetch_clean(v_ref, v_sm.at[0], keys_full, key_ref[tile], tail)

                first, stop = units(tile)

                def copy_unit(unit, turn, step):
                    slot = turn * stages + lax.rem(step, stages)
                    query_head, rows = head * group + lax.rem(unit, group), pl.ds(lax.div(unit, group) * Q, Q)
                    done = rows_full.at[slot]
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(rows_free.at[slot]))
                    plgpu.copy_gmem_to_smem(q_ref.at[rows, query_head], q_sm.at[slot], done)
                    plgpu.copy_gmem_to_smem(d_out_ref.at[rows, query_head], d_out_sm.at[slot], done)
                    plgpu.copy_gmem_to_smem(lse_ref.at[query_head, rows], lse_sm.at[slot], done)
                    plgpu.copy_gmem_to_smem(delta_ref.at[query_head, rows], delta_sm.at[slot], done)
                    plgpu.copy_gmem_to_smem(position_ref.at[rows], position_sm.at[slot], done)

                def copy_round(i, steps):
                    there = [first + i * turns + turn < stop for turn in range(turns)]
                    for turn, step in enumerate(steps):
                        pl.when(there[turn])(partial(copy_unit, first + i * turns + turn, turn, step))
                    return tuple(step + is_there.astype(jnp.int32) for step, is_there in zip(steps, there, strict=True))

                return lax.fori_loop(0, lax.div(stop - first + turns - 1, turns), copy_round, steps)

            def see_freed(turn, step, _):
                plgpu.barrier_wait(rows_free.at[turn * stages + lax.rem(step, stages)])

            steps = lax.fori_loop(0, mine, copy_tile, (jnp.int32(0),) * turns)
            pl.when(mine > 0)(lambda: plgpu.barrier_wait(keys_free))  # every arrival has to be waited for
            for turn, step in enumerate(steps):
                lax.fori_loop(jnp.maximum(step - stages, 0), step, partial(see_freed, turn), None)

        pl.when(warpgroup < COPY)(compute)
        pl.when(warpgroup == COPY)(copy)

    return attention_d_keys
