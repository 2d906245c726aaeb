"""Which rows go through which adapter pages.

A bank page holds 16 ranks of one adapter. An adapter of rank r owns ceil(r / 16) pages, so ranks mix in one batch and
nobody is padded to the largest. Rows stand in blocks of neighbours: first blocks of ``row_block`` rows, then blocks of
eight. A work item is some neighbours of one block and one page of their adapter, so nothing is gathered, rows without
an adapter are in no item, and neighbours that share an adapter share one reading of its weights.

Shapes: N blocks, J work items.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

PAGE_RANK = 16
SINGLE_ROWS = 8  # rows of a block behind the row blocks, where every row may have another adapter


class Part(NamedTuple):
    """The row blocks, or the blocks of single rows."""

    first_row: int
    block_rows: int
    first_block: int
    num_blocks: int

    @property
    def stop_row(self) -> int:
        return self.first_row + self.num_blocks * self.block_rows


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["block_J", "page_J", "first_J", "stop_J", "num_items"],
    meta_fields=["chunk_rows", "row_block"],
)
@dataclass(frozen=True, kw_only=True)
class LoraPlan:
    """The items, the first ``num_items`` of them real, block by block."""

    block_J: Int[Array, "J"]  # in non-decreasing order among the real items
    page_J: Int[Array, "J"]
    first_J: Int[Array, "J"]  # rows [first, stop) of the block, counted in the block
    stop_J: Int[Array, "J"]
    num_items: Int[Array, ""]
    chunk_rows: int  # rows in blocks of ``row_block``; the others are in blocks of SINGLE_ROWS
    row_block: int

    def parts(self, num_rows: int) -> Iterator[Part]:
        """Row blocks and single rows, where there are any; the last block may reach past the last row."""
        blocks = self.chunk_rows // self.row_block
        if blocks:
            yield Part(0, self.row_block, 0, blocks)
        if num_rows > self.chunk_rows:
            yield Part(self.chunk_rows, SINGLE_ROWS, blocks, -(-(num_rows - self.chunk_rows) // SINGLE_ROWS))

    def real_J(self) -> Bool[Array, "J"]:
        return jnp.arange(self.block_J.shape[0], dtype=jnp.int32) < self.num_items

    def first_items(self, num_blocks: int) -> Int[Array, "N1"]:
        """The items of block n are [first[n], first[n + 1])."""
        before_N1J = self.block_J[None] < jnp.arange(num_blocks + 1, dtype=jnp.int32)[:, None]
        return jnp.sum(before_N1J & self.real_J()[None], axis=1, dtype=jnp.int32)


def num_blocks(num_rows: int, chunk_rows: int, row_block: int) -> int:
    """Blocks of a batch of rows."""
    return chunk_rows // row_block + -(-(num_rows - chunk_rows) // SINGLE_ROWS)
