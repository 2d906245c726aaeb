"""A linear layer of few rows on Hopper in two kernels: the product with the adapters' shrink, and an expand that starts
from the product's partial sums, so that y is written, and rounded, once.

What takes the time of y^T = W x^T is reading W, so its rows take the 64 rows of wgmma and every core reads as much of
it: the tiles' steps are dealt to the workers in equal shares (``mosaic_sums``).

Shapes: T rows, D in, E out, P pages, R ranks per page (of all members together in A), J items, S splits.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.dispatch import num_cores
from pallas_kernels.lora_matmul.mosaic import ShrinkSingles, expand_singles
from pallas_kernels.lora_matmul.mosaic_sums import PartialSums
from pallas_kernels.lora_matmul.plan import LoraPlan
from pallas_kernels.mosaic import divisor, plgpu

TILE_ROWS = 64  # most of W's rows in a tile: each tile reads all of x, and a worker writes at least one tile's sums
STEP_COLUMNS = 128  # most columns of a step
RING_BYTES = 144 << 10  # of shared memory, for steps on their way


def run(
    x_TD: Float[Array, "T D"],
    w_ED: Float[Array, "E D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    *,
    interpret: bool,
) -> Float[Array, "T E"]:
    (part,) = plan.parts(x_TD.shape[0])
    first_N1 = plan.first_items(part.num_blocks)
    shrink = ShrinkSingles(x_TD, a_PRD, plan, first_N1, part)
    sums, h_JS = multiply(x_TD, w_ED, math.gcd(*(b.shape[1] for b in members)), shrink, interpret)
    return expand_singles(h_JS, members, plan, first_N1, part, interpret, sums=sums)


def multiply(
    x_TD: Float[Array, "T D"], w_ED: Float[Array, "E D"], outputs: int, shrink: ShrinkSingles, interpret: bool
) -> tuple[PartialSums, Float[Array, "J S 64 8"]]:
    """x W^T, and the adapters' h.

    Args:
      outputs: a multiple of a tile's: none reaches over the border of two members.
    """
    (T, D), E, dtype = x_TD.shape, w_ED.shape[0], x_TD.dtype
    tile_rows, width = divisor(outputs, TILE_ROWS), divisor(D, STEP_COLUMNS)
    tiles, steps = E // tile_rows, D // width
    share = -(-tiles * steps // num_cores())
    workers = -(-tiles * steps // share)
    stages = RING_BYTES // ((tile_rows + T) * width * dtype.itemsize)

    def lora_linear_sums(x_ref, w_ref, *refs, x_sm, w_sm, full_bar, **shrink_scratch):
        *shrink_refs, parts_ref = refs
        shrinks, fetch_shrink, write_shrink = shrink.units(workers, x_ref, *shrink_refs, **shrink_scratch)
        worker = lax.axis_index("worker")
        begin = worker * share
        end = jnp.minimum(begin + share, tiles * steps)

        def fetch(step):
            slot, tile = lax.rem(step - begin, stages), lax.div(step, steps)
            columns = pl.ds(lax.rem(step, steps) * width, width)
            plgpu.copy_gmem_to_smem(
                w_ref.at[pl.ds(tile * tile_rows, tile_rows), columns], w_sm.at[slot], full_bar.at[slot]
            )
            plgpu.copy_gmem_to_smem(x_ref.at[:, columns], x_sm.at[slot], full_bar.at[slot])

        def shrink_one(i):
            """Beside a step: its copies are there by then, the next one's are under way until the next step."""
            write_shrink(i)
            pl.when(i + 1 < shrinks)(lambda: fetch_shrink(i + 1))

        def add_tile(first):
            """Writes the sum over this worker's steps of the tile that ``first`` is in; returns the step behind."""
            tile = lax.div(first, steps)
            stop = jnp.minimum((tile + 1) * steps, end)

            def add_steps(acc):
                def add_step(step, _):
                    slot = lax.rem(step - begin, stages)
                    plgpu.barrier_wait(full_bar.at[slot])
                    plgpu.wgmma(acc, w_sm.at[slot], x_sm.at[slot].T)
                    plgpu.wgmma_wait(0)
                    pl.when(step + stages < end)(lambda: fetch(step + stages))
                    pl.when(step - begin < shrinks)(lambda: shrink_one(step - begin))

                lax.fori_loop(first, stop, add_step, None)
                return acc[...]

            mosaic.put(parts_ref.at[tile + worker], pl.run_scoped(add_steps, plgpu.ACC((tile_rows, T), jnp.float32)))
            return stop

        lax.fori_loop(begin, jnp.minimum(begin + stages, end), lambda step, _: fetch(step), None)
        pl.when(shrinks > 0)(lambda: fetch_shrink(0))
        lax.while_loop(lambda first: first < end, add_tile, begin)
        lax.fori_loop(jnp.minimum(end - begin, shrinks), shrinks, lambda i, _: shrink_one(i), None)

    h_JS, parts_IET = mosaic.kernel(
        lora_linear_sums,
        out=(shrink.out, jax.ShapeDtypeStruct((tiles + workers - 1, tile_rows, T), jnp.float32)),
        scratch={
            "x_sm": mosaic.operand(stages, T, width, dtype=dtype),
            "w_sm": mosaic.operand(stages, tile_rows, width, dtype=dtype),
            "full_bar": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            **shrink.scratch,
        },
        grid={"worker": workers},
        threads=1,
        interpret=interpret,
    )(x_TD, w_ED, *shrink.inputs)
    return PartialSums(parts_IET=parts_IET, steps=steps, share=share), h_JS
