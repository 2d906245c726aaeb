"""A product's y^T as partial sums in float32, to be added up in order by whoever needs y.

All steps, those of a tile of outputs one after another, are dealt to workers in equal shares (Stream-K, Osama et al.
2023); what a share has of a tile is a partial sum.

Shapes: T rows, E outputs of a tile, I partial sums.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.mosaic import full, plgpu


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
