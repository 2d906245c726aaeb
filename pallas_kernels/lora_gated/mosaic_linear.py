"""Gate and up of few rows on Hopper in two kernels: the product with the adapters' shrink (``lora_matmul``'s), and one
that adds up its partial sums, adds the adapters to both halves, and gates them: gate and up are written nowhere.

Shapes: T rows, D in, F columns of gate and of up, E = 2F of both, P pages, R ranks per page of both, J items, Q rows
per block.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.lora_gated.mosaic import act
from pallas_kernels.lora_matmul.mosaic import ShrinkSingles, h_operand, load_h, rows_of
from pallas_kernels.lora_matmul.mosaic_linear import multiply
from pallas_kernels.lora_matmul.plan import PAGE_RANK, SINGLE_ROWS, LoraPlan
from pallas_kernels.mosaic import index, plgpu

HALVES = 2  # gate and up


def run(
    x_TD: Float[Array, "T D"],
    w_ED: Float[Array, "E D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P F R"], ...],
    plan: LoraPlan,
    *,
    activation: str,
    interpret: bool,
) -> Float[Array, "T F"]:
    (T, _), F, dtype = x_TD.shape, members[0].shape[1], x_TD.dtype
    (part,) = plan.parts(T)
    first_N1 = plan.first_items(part.num_blocks)
    shrink = ShrinkSingles(x_TD, a_PRD, plan, first_N1, part)
    sums, h_JS = multiply(x_TD, w_ED, F, shrink, interpret)
    width = sums.tile_rows

    def lora_expand_gated(
        h_ref,
        gate_ref,
        up_ref,
        parts_ref,
        page_ref,
        from_ref,
        to_ref,
        first_ref,
        out_ref,
        *,
        out_sm,
        b_sm,
        h_sm,
        b_full,
    ):
        block, tile = lax.axis_index("block"), lax.axis_index("tile")
        begin, end = first_ref[block], first_ref[block + 1]
        rows, columns = rows_of(part, block), pl.ds(tile * width, width)

        def fetch(item):
            slot = lax.rem(item - begin, 2)
            for half, b_ref in enumerate((gate_ref, up_ref)):
                plgpu.copy_gmem_to_smem(b_ref.at[page_ref[item], columns], b_sm.at[slot, half], b_full.at[slot])

        def add_item(item, halves):
            slot = lax.rem(item - begin, 2)
            pl.when(item + 1 < end)(lambda: fetch(item + 1))
            load_h(h_ref.at[item], h_sm)
            plgpu.barrier_wait(b_full.at[slot])
            row_FQ = index(1, (width, SINGLE_ROWS))
            mine_FQ = (row_FQ >= from_ref[item]) & (row_FQ < to_ref[item])

            def with_item(half, y_FQ):
                ranks = pl.ds(half * PAGE_RANK, PAGE_RANK)
                return jnp.where(mine_FQ, y_FQ + mosaic.matmul(b_sm.at[slot, half], h_sm.at[:, ranks].T), y_FQ)

            return tuple(with_item(half, y_FQ) for half, y_FQ in enumerate(halves))

        pl.when(end > begin)(lambda: fetch(begin))
        halves = tuple(sums.load(parts_ref, half * F + tile * width, width, rows) for half in range(HALVES))
        # rounded as gate and up are where they are written
        halves = (y_FQ.astype(dtype).astype(jnp.float32) for y_FQ in lax.fori_loop(begin, end, add_item, halves))
        gate_FQ, up_FQ = halves
        out_sm.T[...] = (act(gate_FQ, activation).astype(dtype).astype(jnp.float32) * up_FQ).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_sm, out_ref.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)

    return mosaic.kernel(
        lora_expand_gated,
        out=jax.ShapeDtypeStruct((T, F), dtype),
        scratch={
            "out_sm": mosaic.operand(SINGLE_ROWS, width, dtype=dtype),
            "b_sm": mosaic.operand(2, HALVES, width, PAGE_RANK, dtype=dtype),
            "h_sm": h_operand(dtype),
            "b_full": plgpu.Barrier(num_arrivals=HALVES, num_barriers=2),
        },
        grid={"block": part.num_blocks, "tile": F // width},
        threads=1,
        interpret=interpret,
    )(h_JS, *members, sums.parts_IET, plan.page_J, plan.first_J, plan.stop_J, first_N1)
