"""Keys and values on their way from pages to shared memory and back.

Shapes: P pages, K kv heads, G tokens per page, C head dim, S consecutive keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu


@dataclass(frozen=True, kw_only=True)
class KernelShape:
    """What every kernel is compiled for."""

    num_kv_heads: int
    group: int  # query heads of one kv head
    head_dim: int
    page_size: int
    dtype: DTypeLike
    scale: float
    softcap: float | None


class Pages:
    """One head of one sequence's pages, inside a kernel."""

    def __init__(self, table_ref: Any, sequence: jax.Array, head: jax.Array, last: jax.Array, page_size: int):
        """``last`` is the position of the last key there is; past it the page table says nothing."""
        self.table_ref, self.sequence, self.head, self.last, self.page_size = table_ref, sequence, head, last, page_size

    def parts(self, first: jax.Array, rows: int) -> Iterator[tuple[Any, Any, jax.Array]]:
        """(place in a pool, rows of a block of keys, whether there are such keys), one page or less at a time.

        ``first``, the block's first key, is a multiple of ``rows``. Where there are no keys any page will do: the last.
        """
        size = min(self.page_size, rows)
        per_page = self.page_size // size
        for i in range(rows // size):
            at = lax.div(first, size) + i
            held = jnp.minimum(at, lax.div(self.last, size))
            page = self.table_ref[self.sequence, lax.div(held, per_page)]
            place = page, self.head, pl.ds(lax.rem(held, per_page) * size, size)
            yield place, pl.ds(i * size, size), at == held

    def fetch(self, pool_ref: Any, keys_sm: Any, done: Any, first: jax.Array, columns: Any = slice(None)) -> None:
        """Starts the copies of a block of keys; ``done`` gets one arrival from each."""
        for place, rows, _ in self.parts(first, keys_sm.shape[0]):
            plgpu.copy_gmem_to_smem(pool_ref.at[(*place, columns)], keys_sm.at[rows], done)

    def fetch_clean(self, pool_ref: Any, keys_sm: Any, done: Any, first: jax.Array, tail: Any) -> None:
        """``fetch`` with zeros past the last key, where a page may hold anything, NaN too, and 0 x NaN is NaN."""
        rows = keys_sm.shape[0]
        there = self.last + 1 - first
        pl.when(there >= rows)(lambda: self.fetch(pool_ref, keys_sm, done, first))

        @pl.when(there < rows)
        def _():
            self.fetch(pool_ref, keys_sm, tail, first)
            plgpu.barrier_wait(tail)
            mosaic.keep_rows(keys_sm, there)
            for _ in range(num_copies(self.page_size, rows)):
                plgpu.barrier_arrive(done)


def num_copies(page_size: int, rows: int) -> int:
    """Copies, and arrivals, of a block of keys."""
    return rows // min(page_size, rows)


def operand_sizes(q_THC: jax.Array, pool_PKGC: jax.Array) -> dict[str, Any]:
    """The sizes in a KernelShape."""
    (K, G, C), H = pool_PKGC.shape[1:], q_THC.shape[1]
    return {"num_kv_heads": K, "group": H // K, "head_dim": C, "page_size": G, "dtype": q_THC.dtype}
