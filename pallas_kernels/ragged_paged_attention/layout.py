"""Which rows belong to which sequence, for attention over a paged K/V pool.

Shapes: T rows, B sequences, M pages per sequence, G tokens per page, Q rows per block, A accumulator pages, K kv heads,
C head dim.
"""

from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import Array, Float, Int

Accumulators = tuple[Float[Array, "A K G C"], Float[Array, "A K G C"]]  # of dK and dV, by page


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["position_T", "sequence_T", "page_table_BM"],
    meta_fields=["chunk_rows", "row_block"],
)
@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """Rows [0, chunk_rows) come in blocks of ``row_block`` rows of one sequence; every later row stands alone.

    A row with position p sees the keys of its sequence at positions <= p. Padding rows have position -1 and get
    zeros. Inside a block the valid rows come first, at consecutive positions; a sequence's blocks stand side by side.
    """

    position_T: Int[Array, "T"]  # place in the sequence; -1: padding row
    sequence_T: Int[Array, "T"]  # row of page_table_BM; anything for padding rows
    page_table_BM: Int[Array, "B M"]  # page ids; entries past a sequence's length are not read
    chunk_rows: int
    row_block: int

    def __post_init__(self):
        if self.chunk_rows % self.row_block:
            raise ValueError(f"chunk_rows {self.chunk_rows} must be a multiple of row_block {self.row_block}")
