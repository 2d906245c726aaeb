"""The product of few rows on Hopper, y^T = W x^T, as partial sums in float32.

What takes the time is reading W, so its rows take the 64 rows of wgmma and every core reads the same number of bytes:
the steps of all tiles, a tile's one after another, are dealt to the workers in equal shares (Stream-K, Osama et al.
2023). What a share has of a tile is a partial sum; who needs y adds them up in order.

Shapes: T rows, D in, O out, I partial sums, E outputs of a tile.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.dispatch import num_cores
from pallas_kernels.mosaic import divisor, full, plgpu

TILE_ROWS = 128  # most of W's rows in a tile: each tile reads all of x, and a worker writes at least one tile's sums
STEP_COLUMNS = 64  # most columns of a step
RING_BYTES = 192 << 10  # of shared memory, for steps on their way
WORKERS_PER_CORE = 1


@dataclass(frozen=True, kw_only=True)
class PartialSums:
    """Partial sums of y^T: worker w's part of a tile is at tile + w."""

    parts_IET: Float[Array, "I E T"]
    steps: int  # of a tile
    share: int  # steps of a worker

    @property
    def tile_rows(self) -> int:
        return self.parts_IET.shape[1]

    @property
    def most_parts(self) -> int:
        """Of one tile."""
        return -(-(self.steps - math.gcd(self.steps, self.share)) // self.share) + 1

    def load(self, parts_ref: Any, first_output: jax.Array, width: int, rows: Any) -> jax.Array:
        """y^T of these rows, ``width`` outputs that lie in one tile."""
        tile, output = lax.div(first_output, self.tile_rows), lax.rem(first_output, self.tile_rows)
        begin = tile * self.steps
        first, last = lax.div(begin, self.share), lax.div(begin + self.steps - 1, self.share)
        sum_ET = full((width, rows.size), 0)
        for i in range(self.most_parts):  # no loop: they are all on their way at once
            worker = jnp.minimum(first + i, last)
            place = parts_ref.at[tile + worker, pl.ds(output, width), rows]
            part_ET = plgpu.load(place, layout=plgpu.Layout.WGMMA, optimized=False)
            sum_ET = jnp.where(jnp.full(sum_ET.shape, first + i) <= last, sum_ET + part_ET, sum_ET)
        return sum_ET


def partial_sums(
    x_TD: Float[Array, "T D"], w_OD: Float[Array, "O D"], dims: Sequence[int], interpret: bool
) -> PartialSums:
    """x W^T; no tile reaches over the border of two members, which have ``dims`` outputs each."""
    (T, D), O, dtype = x_TD.shape, w_OD.shape[0], x_TD.dtype
    tile_rows, width = divisor(math.gcd(*dims), TILE_ROWS), divisor(D, STEP_COLUMNS)
    steps = D // width
    total = O // tile_rows * steps
    share = -(-total // (WORKERS_PER_CORE * num_cores()))
    workers = -(-total // share)
    stages = RING_BYTES // WORKERS_PER_CORE // ((tile_rows + T) * width * dtype.itemsize)

    def few_rows_product(x_ref, w_ref, parts_ref, *, x_sm, w_sm, full_bar):
        worker = lax.axis_index("worker")
        begin = worker * share
        end = jnp.minimum(begin + share, total)

        def fetch(step):
            slot, tile = lax.rem(step - begin, stages), lax.div(step, steps)
            columns = pl.ds(lax.rem(step, steps) * width, width)
            outputs = pl.ds(pl.multiple_of(tile * tile_rows, tile_rows), tile_rows)
            plgpu.copy_gmem_to_smem(w_ref.at[outputs, columns], w_sm.at[slot], full_bar.at[slot])
            plgpu.copy_gmem_to_smem(x_ref.at[:, columns], x_sm.at[slot], full_bar.at[slot])

        def add_tile(first):
            """Writes the sum over this worker's steps of the tile that ``first`` is in; returns the step behind."""
            tile = lax.div(first, steps)
            stop = jnp.minimum((tile + 1) * steps, end)

            def multiply(acc):
                def add_step(step, _):
                    slot = lax.rem(step - begin, stages)
                    plgpu.barrier_wait(full_bar.at[slot])
                    plgpu.wgmma(acc, w_sm.at[slot], x_sm.at[slot].T)
                    plgpu.wgmma_wait(0)
                    pl.when(step + stages < end)(lambda: fetch(step + stages))

                lax.fori_loop(first, stop, add_step, None)
                return acc[...]

            mosaic.put(parts_ref.at[tile + worker], pl.run_scoped(multiply, plgpu.ACC((tile_rows, T), jnp.float32)))
            return stop

        lax.fori_loop(begin, jnp.minimum(begin + stages, end), lambda step, _: fetch(step), None)
        lax.while_loop(lambda first: first < end, add_tile, begin)

    parts_IET = mosaic.kernel(
        few_rows_product,
        out=jax.ShapeDtypeStruct((O // tile_rows + workers - 1, tile_rows, T), jnp.float32),
        scratch={
            "x_sm": mosaic.operand(stages, T, width, dtype=dtype),
            "w_sm": mosaic.operand(stages, tile_rows, width, dtype=dtype),
            "full_bar": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        },
        grid={"worker": workers},
        threads=1,
        interpret=interpret,
    )(x_TD, w_OD)
    return PartialSums(parts_IET=parts_IET, steps=steps, share=share)
