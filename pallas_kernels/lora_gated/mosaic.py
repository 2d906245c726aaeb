"""Gate and up on Hopper: once read, given their adapters, gated and written to where a backward will look for them.

One after another these ops would read and write gate and up twice more each. The adapters' shrink, and all that single
rows have of their own, are ``lora_matmul``'s; all rows go through the last kernel, 64 of them at a time.

Shapes: T rows, D in, F columns of gate and of up, E = 2F of both, P pages, R ranks per page of both, S blocks of the
pool, Q rows per block, N row blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.gating import SLOPES
from pallas_kernels.lora_matmul.mosaic import expand_singles, rows_of, shrink_blocks, shrink_singles
from pallas_kernels.lora_matmul.plan import PAGE_RANK, LoraPlan, num_blocks
from pallas_kernels.mosaic import full, index, plgpu

WIDTH = 64  # columns of a tile of gate, and of one of up


def act(gate: Float[Array, "R C"], activation: str) -> Float[Array, "R C"]:
    return gate / (1 + jnp.exp(-SLOPES[activation](gate) * gate))


def run(
    gate_up_TE: Float[Array, "T E"],
    x_TD: Float[Array, "T D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P F R"], ...],
    plan: LoraPlan,
    pool_SQE: Float[Array, "S Q E"] | None,
    block_N: Int[Array, "N"] | None,
    *,
    activation: str,
    interpret: bool,
) -> tuple[Float[Array, "T F"], Float[Array, "S Q E"] | None]:
    T, dtype = x_TD.shape[0], x_TD.dtype
    F, Q = members[0].shape[1], plan.row_block
    first_N1 = plan.first_items(num_blocks(T, plan.chunk_rows, plan.row_block))
    part, *singles = plan.parts(T)
    for single in singles:
        y_ref = jax.new_ref(gate_up_TE)
        h_JS = shrink_singles(x_TD, a_PRD, plan, first_N1, single, interpret)
        expand_singles(h_JS, members, plan, first_N1, single, interpret, y_ref=y_ref)
        gate_up_TE = jax.freeze(y_ref)
    h_JQR = shrink_blocks(x_TD, (a_PRD,), plan, first_N1, part, interpret, rank_major=True)

    def lora_gated(h_ref, *refs, y_sm, act_sm, h_sm, b_sm, y_full, full_bar):
        gate_ref, up_ref, page_ref, from_ref, to_ref, first_ref, y_ref, *stash_refs, act_ref = refs
        block, tile = lax.axis_index("block"), lax.axis_index("tile")
        begin, end = (first_ref[jnp.minimum(b, part.num_blocks)] for b in (block, block + 1))  # of single rows: none
        rows = rows_of(part, block)  # of the last block some may be past the last row
        columns, of_up = (pl.ds(first + tile * WIDTH, WIDTH) for first in (0, F))
        for half, mine in enumerate((columns, of_up)):
            plgpu.copy_gmem_to_smem(y_ref.at[rows, mine], y_sm.at[half], y_full.at[half])

        def slot_of(half, item):
            return 2 * half + lax.rem(item - begin, 2)

        def fetch(half, item):
            slot = slot_of(half, item)
            ranks = pl.ds(half * PAGE_RANK, PAGE_RANK)
            plgpu.copy_gmem_to_smem(h_ref.at[item, :, ranks], h_sm.at[slot], full_bar.at[slot])
            b_ref = (gate_ref, up_ref)[half]
            plgpu.copy_gmem_to_smem(b_ref.at[page_ref[item], columns], b_sm.at[slot], full_bar.at[slot])

        def add_item(half, item, sum_QF):
            slot = slot_of(half, item)
            pl.when(item + 1 < end)(lambda: fetch(half, item + 1))
            plgpu.barrier_wait(full_bar.at[slot])
            part_QF = mosaic.matmul(h_sm.at[slot], b_sm.at[slot].T)
            row_QF = index(0, (Q, WIDTH))
            return jnp.where((row_QF >= from_ref[item]) & (row_QF < to_ref[item]), sum_QF + part_QF, sum_QF)

        def adapted(half):
            """Gate or up with the adapters, which it leaves in shared memory."""
            sum_QF = lax.fori_loop(begin, end, partial(add_item, half), full((Q, WIDTH), 0))
            plgpu.barrier_wait(y_full.at[half])
            y_QF = plgpu.load(y_sm.at[half], layout=plgpu.Layout.WGMMA, optimized=False)
            y_QF = (y_QF.astype(jnp.float32) + sum_QF).astype(dtype)
            y_sm.at[half][...] = y_QF
            return y_QF.astype(jnp.float32)

        for half in range(2):
            pl.when(end > begin)(partial(fetch, half, begin))
        gate_QF = adapted(0)
        act_QF = act(gate_QF, activation).astype(dtype)
        act_sm[...] = (act_QF.astype(jnp.float32) * adapted(1)).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(act_sm, act_ref.at[rows, columns])

        def leave(place_ref, pool_ref):
            place = place_ref[block]

            @pl.when(place < pool_ref.shape[0])
            def _():
                for half, mine in enumerate((columns, of_up)):
                    plgpu.copy_smem_to_gmem(y_sm.at[half], pool_ref.at[place, :, mine])

        if stash_refs:
            pl.when(block < stash_refs[0].shape[0])(partial(leave, *stash_refs))
        plgpu.wait_smem_to_gmem(0)

    pool_ref = None if pool_SQE is None else jax.new_ref(pool_SQE)
    stash = () if pool_ref is None else (block_N, pool_ref)
    act_TF = mosaic.kernel(
        lora_gated,
        out=jax.ShapeDtypeStruct((T, F), dtype),
        scratch={
            "y_sm": mosaic.operand(2, Q, WIDTH, dtype=dtype),
            "act_sm": mosaic.operand(Q, WIDTH, dtype=dtype),
            "h_sm": mosaic.operand(4, Q, PAGE_RANK, dtype=dtype),
            "b_sm": mosaic.operand(4, WIDTH, PAGE_RANK, dtype=dtype),
            "y_full": plgpu.Barrier(num_barriers=2),
            "full_bar": plgpu.Barrier(num_arrivals=2, num_barriers=4),
        },
        grid={"block": -(-T // Q), "tile": F // WIDTH},
        threads=1,
        interpret=interpret,
    )(h_JQR, *members, plan.page_J, plan.first_J, plan.stop_J, first_N1, gate_up_TE, *stash)
    return act_TF, None if pool_ref is None else jax.freeze(pool_ref)
