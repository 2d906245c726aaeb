"""Writes rows that come in blocks to blocks of pools: what a forward leaves for a backward in a later step."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Int, Shaped

from pallas_kernels.block_write import reference, xla
from pallas_kernels.dispatch import COPY_BYTES, COPY_SIDE, Implementation, choose, mosaic_pair

__all__ = ["IMPLEMENTATIONS", "block_write", "tile_columns"]


def tile_columns(dims: Sequence[int], itemsize: int) -> int:
    """Columns of a tile that every array is cut into; 0: there is no such number."""
    step = max(COPY_BYTES // itemsize, 1)
    widths = range(COPY_SIDE // step * step, 0, -step)
    return next((width for width in widths if all(dim % width == 0 for dim in dims)), 0)


def _refuse(*, pools: Sequence[jax.Array], **_: Any) -> str | None:
    dtype, rows = pools[0].dtype, pools[0].shape[1]
    other = next((pool.dtype for pool in pools if pool.dtype != dtype), None)
    if other is not None:
        return f"the kernel takes arrays of one dtype, these have {dtype} and {other}"
    if rows > COPY_SIDE:
        return f"the kernel takes blocks of at most {COPY_SIDE} rows, these have {rows}"
    dims = [pool.shape[2] for pool in pools]
    if not tile_columns(dims, dtype.itemsize):
        return f"the kernel copies multiples of {COPY_BYTES} bytes, rows have {dims} elements of {dtype.itemsize}"
    return None


IMPLEMENTATIONS = (
    *mosaic_pair("pallas_kernels.block_write.mosaic", _refuse),
    Implementation("xla", xla.block_write),
    Implementation("reference", reference.block_write),
)


def block_write(
    pools: Sequence[Shaped[Array, "S Q _"]],
    rows: Sequence[Shaped[Array, "T _"]],
    block_N: Int[Array, "N"],
    *,
    implementation: str | None = None,
) -> tuple[Shaped[Array, "S Q _"], ...]:
    """Returns the pools with the rows' blocks at their places; in place where the pools are donated.

    Args:
      pools: S blocks of Q rows each; arrays of any widths.
      rows: of each pool's dtype and width; block n is rows n * Q to (n + 1) * Q. Rows behind the last block are left
        out (T >= N * Q).
      block_N: 0 <= block; one of S or more is written nowhere. No two blocks that are written have the same place.
      implementation: a name of IMPLEMENTATIONS, or None for the best that runs here.
    """
    chosen = choose("block_write", IMPLEMENTATIONS, implementation, pools=pools)
    return chosen.function(tuple(pools), tuple(rows), block_N)
