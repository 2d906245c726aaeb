"""Which rows go through which adapter pages.

A bank page holds 16 ranks of one adapter. An adapter of rank r owns ceil(r / 16) pages, so ranks mix in one batch and
nobody is padded to the largest. Rows stand in blocks of neighbours: first blocks of ``row_block`` rows, then blocks of
eight. A work item is some neighbours of one block and one page of their adapter, so nothing is gathered, rows without
an adapter are in no item, and neighbours that share an adapter share one reading of its weights.

Shapes: N blocks, J work items.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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


def among_all(
    lane_J: Int[Array, "J"], first_page: Int[Array, ""] | int, num_pages: int, all_pages: int
) -> Int[Array, "J"]:
    """Items' lane pages, counted from the first of all; those of dropped items are past the last."""
    return jnp.where(lane_J < num_pages, first_page + lane_J, all_pages)


class SharedPages(NamedTuple):
    """The pages that all rows of a plan's main part go through, if they do."""

    count: Int[Array, ""]  # 0: they do not
    mine_T: Bool[Array, "T"]  # those rows that go through them; the part's others have no adapter


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["block_J", "page_J", "first_J", "stop_J", "num_items", "shared"],
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
    shared: SharedPages | None = None

    def parts(self, num_rows: int) -> Iterator[Part]:
        """Row blocks and single rows, where there are any; the last block may reach past the last row."""
        blocks = self.chunk_rows // self.row_block
        if blocks:
            yield Part(0, self.row_block, 0, blocks)
        if num_rows > self.chunk_rows:
            yield Part(self.chunk_rows, SINGLE_ROWS, blocks, -(-(num_rows - self.chunk_rows) // SINGLE_ROWS))

    def main_part(self, num_rows: int) -> Part:
        """The part with most rows."""
        return max(self.parts(num_rows), key=lambda part: part.num_blocks * part.block_rows)

    def items_of(self, part: Part) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The part's items, [first, stop)."""
        bounds = (part.first_block, part.first_block + part.num_blocks)
        first, stop = (jnp.sum(self.real_J() & (self.block_J < block), dtype=jnp.int32) for block in bounds)
        return first, stop

    def with_shared(self, num_rows: int) -> "LoraPlan":
        """Finds them ahead: for plans that differ in nothing but a constant added to all pages, as those of a model's
        layers do, once is enough."""
        return replace(self, shared=self.find_shared(num_rows))

    def find_shared(self, num_rows: int) -> SharedPages:
        """Whether all items of the main part are of one adapter, and in most of its blocks: each block has the first
        block's pages in the same order, each of them for the same rows of the block."""
        part, item_J = self.main_part(num_rows), jnp.arange(self.block_J.shape[0], dtype=jnp.int32)
        first, stop = self.items_of(part)
        mine_J = (item_J >= first) & (item_J < stop)
        count = jnp.maximum(jnp.sum(mine_J & (self.block_J == self.block_J[first]), dtype=jnp.int32), 1)
        index_J = (item_J - first) % count
        like_J = item_J - index_J  # the first item of the block
        same_J = self.page_J == self.page_J[first + index_J]
        for field_J in (self.block_J, self.first_J, self.stop_J):
            same_J &= field_J == field_J[like_J]
        most = 2 * (stop - first) >= count * part.num_blocks
        leads_J = mine_J & (index_J == 0)
        return SharedPages(
            jnp.where(most & jnp.all(same_J | ~mine_J), count, 0), self._rows_of(leads_J, part, num_rows)
        )

    def _rows_of(self, items_J: Bool[Array, "J"], part: Part, num_rows: int) -> Bool[Array, "T"]:
        """The part's rows that are in one of these items."""
        row_Q = jnp.arange(part.block_rows, dtype=jnp.int32)
        in_JQ = (row_Q[None] >= self.first_J[:, None]) & (row_Q[None] < self.stop_J[:, None])
        block_J = jnp.where(items_J, self.block_J - part.first_block, part.num_blocks)
        found_NQ = jnp.zeros((part.num_blocks, part.block_rows), bool).at[block_J].max(in_JQ, mode="drop")
        return jnp.pad(found_NQ.reshape(-1), (part.first_row, max(num_rows - part.stop_row, 0)))[:num_rows]

    def real_J(self) -> Bool[Array, "J"]:
        return jnp.arange(self.block_J.shape[0], dtype=jnp.int32) < self.num_items

    def first_items(self, num_blocks: int) -> Int[Array, "N1"]:
        """The items of block n are [first[n], first[n + 1])."""
        before_N1J = self.block_J[None] < jnp.arange(num_blocks + 1, dtype=jnp.int32)[:, None]
        return jnp.sum(before_N1J & self.real_J()[None], axis=1, dtype=jnp.int32)


def num_blocks(num_rows: int, chunk_rows: int, row_block: int) -> int:
    """Blocks of a batch of rows."""
    return chunk_rows // row_block + -(-(num_rows - chunk_rows) // SINGLE_ROWS)
