"""Named shapes of the op, shared by tests and benchmarks.

Shapes: T rows, D in, E out, P pages, R ranks per page (of all members together in A), N blocks, Q rows per block,
J work items.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.lora_matmul.plan import PAGE_RANK, LoraPlan


@dataclass(frozen=True, kw_only=True)
class LoraCase:
    """One call: rows by adapter, in random order among each other."""

    name: str
    ranks: tuple[int, ...]  # of each adapter
    rows: tuple[int, ...]  # of each adapter
    base_rows: int = 0  # rows without an adapter
    dim_in: int = 32
    dims_out: tuple[int, ...] = (24,)  # of each member
    row_block: int = 8
    spare_blocks: int = 1
    spare_items: int = 3

    def __str__(self) -> str:
        return self.name

    @property
    def num_rows(self) -> int:
        return sum(self.rows) + self.base_rows

    def pages(self) -> list[range]:
        """Bank pages of each adapter; page 0 is nobody's."""
        counts = [-(-rank // PAGE_RANK) for rank in self.ranks]
        starts = np.cumsum([1, *counts])
        return [range(start, start + count) for start, count in zip(starts, counts, strict=False)]

    def adapter_rows(self, seed: int = 0) -> np.ndarray:
        """The adapter of each row [T]; -1: none."""
        adapter_T = np.repeat([*range(len(self.rows)), -1], [*self.rows, self.base_rows])
        return np.random.default_rng(seed).permutation(adapter_T)

    def make(
        self, dtype: DTypeLike = np.float32, seed: int = 0
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], LoraPlan]:
        """Random (x [T, D], A [P, R, D], one B [P, E, 16] per member, plan). Ranks past an adapter's own are zero."""
        rng = np.random.default_rng(seed)
        pages = self.pages()
        num_pages = pages[-1].stop if pages else 1
        x_TD = rng.standard_normal((self.num_rows, self.dim_in))
        a_PRD = np.zeros((num_pages, PAGE_RANK * len(self.dims_out), self.dim_in))
        members = [np.zeros((num_pages, out, PAGE_RANK)) for out in self.dims_out]
        for rank, mine in zip(self.ranks, pages, strict=True):
            for k, page in enumerate(mine):
                width = min(PAGE_RANK, rank - k * PAGE_RANK)
                for m, b_PER in enumerate(members):
                    place = slice(m * PAGE_RANK, m * PAGE_RANK + width)
                    a_PRD[page, place] = rng.standard_normal((width, self.dim_in)) / self.dim_in**0.5
                    b_PER[page, :, :width] = rng.standard_normal((b_PER.shape[1], width)) / rank**0.5
        arrays = [jnp.asarray(array, dtype) for array in (x_TD, a_PRD, *members)]
        return arrays[0], arrays[1], tuple(arrays[2:]), self.plan(self.adapter_rows(seed))

    def plan(self, adapter_T: np.ndarray) -> LoraPlan:
        """Rows of one adapter side by side in blocks, each block once per page of its adapter."""
        T, Q, pages = len(adapter_T), self.row_block, self.pages()
        groups = [np.flatnonzero(adapter_T == adapter) for adapter in range(len(pages))]
        num_blocks = sum(-(-count // Q) for count in self.rows) + self.spare_blocks
        row_NQ, place_T, items = np.full((num_blocks, Q), T), np.full(T, num_blocks * Q), []
        block = 0
        for rows, mine in zip(groups, pages, strict=True):
            for start in range(0, len(rows), Q):
                part = rows[start : start + Q]
                row_NQ[block, : len(part)] = part
                place_T[part] = block * Q + np.arange(len(part))
                items += [(block, page) for page in mine]
                block += 1
        num_items = len(items)
        items += [(0, 0)] * max(self.spare_items, 1 - num_items)
        block_J, page_J = np.array(items).T
        fields = {"row_NQ": row_NQ, "place_T": place_T, "block_J": block_J, "page_J": page_J, "num_items": num_items}
        return LoraPlan(**{name: jnp.asarray(array, jnp.int32) for name, array in fields.items()})


CASES = (
    LoraCase(name="one-adapter", ranks=(16,), rows=(5,)),
    LoraCase(name="rank-1", ranks=(1,), rows=(1,), base_rows=2),
    LoraCase(name="no-adapter", ranks=(), rows=(), base_rows=6),
    LoraCase(name="idle-adapter", ranks=(8, 8), rows=(0, 9), base_rows=1),
    LoraCase(name="mixed-ranks", ranks=(4, 64, 17, 16, 33), rows=(3, 20, 1, 8, 9), base_rows=7),
    LoraCase(name="members", ranks=(4, 40), rows=(9, 6), base_rows=4, dims_out=(32, 8, 8)),
    LoraCase(name="one-row-each", ranks=(4, 8, 16, 24, 32, 48, 64, 40, 20), rows=(1,) * 9, dims_out=(24, 24)),
    LoraCase(name="odd-sizes", ranks=(5, 70), rows=(7, 4), dim_in=20, dims_out=(7, 3), row_block=5),
)

_LLAMA_8B = {"dim_in": 4096, "dims_out": (4096, 1024, 1024)}
BENCH_CASES = (
    LoraCase(name="decode-64-of-32", ranks=(16,) * 32, rows=(2,) * 32, **_LLAMA_8B),
    LoraCase(name="decode-64-of-64", ranks=(16,) * 64, rows=(1,) * 64, **_LLAMA_8B),
    LoraCase(name="decode-64-mixed-ranks", ranks=(8, 16, 32, 64) * 8, rows=(2,) * 32, **_LLAMA_8B),
    LoraCase(name="prefill-2048-of-4", ranks=(16,) * 4, rows=(512,) * 4, **_LLAMA_8B),
)
