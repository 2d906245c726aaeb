"""Which rows go through which adapter pages.

A bank page holds 16 ranks of one adapter. An adapter of rank r owns ceil(r / 16) pages, so ranks mix in one batch and
nobody is padded to the largest. Rows of one adapter are gathered into blocks; a work item is (block, page).

Shapes: T rows, N blocks, Q rows per block, J work items.
"""

from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import Array, Int

PAGE_RANK = 16


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["row_NQ", "place_T", "block_J", "page_J", "num_items"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class LoraPlan:
    """The rows of each block, and the (block, page) pairs to be computed, the first ``num_items`` of them real."""

    row_NQ: Int[Array, "N Q"]  # row of x; T or more: nothing
    place_T: Int[Array, "T"]  # where row t sits in the flattened blocks; N * Q or more: in none
    block_J: Int[Array, "J"]  # in non-decreasing order among the real items
    page_J: Int[Array, "J"]
    num_items: Int[Array, ""]
