"""Named shapes of the op, shared by tests and benchmarks.

Shapes: T rows, P pages, K kv heads, G tokens per page, C head dim.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@dataclass(frozen=True, kw_only=True)
class WriteCase:
    """One call: rows to random places, the last ``padding`` of them nowhere."""

    name: str
    rows: int
    padding: int = 0
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    num_pages: int = 5

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: DTypeLike = np.float32, seed: int = 0) -> tuple[jax.Array, ...]:
        """Random (k and v pools [P, K, G, C], k and v [T, K, C], page [T], offset [T]); padding has pages >= P."""
        rng = np.random.default_rng(seed)
        pool = (self.num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        new = (self.rows, self.num_kv_heads, self.head_dim)
        arrays = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in (pool, pool, new, new)]
        place_T = rng.permutation(self.num_pages * self.page_size)[: self.rows]
        page_T, offset_T = np.divmod(place_T, self.page_size)
        page_T[self.rows - self.padding :] = self.num_pages + np.arange(self.padding) % 2
        return *arrays, jnp.asarray(page_T, jnp.int32), jnp.asarray(offset_T, jnp.int32)


CASES = (
    WriteCase(name="pages-of-16", rows=24, padding=3),
    WriteCase(name="pages-of-64", rows=6, padding=1, page_size=64, head_dim=128, num_kv_heads=8),
    WriteCase(name="pages-of-128", rows=3, page_size=128, head_dim=256, num_kv_heads=1),
    WriteCase(name="head-dim-96", rows=16, padding=2, head_dim=96, num_kv_heads=4),
    WriteCase(name="large-rows", rows=8, head_dim=128, num_kv_heads=64),
    WriteCase(name="padding-only", rows=8, padding=8),
)

_LLAMA_8B = {"num_kv_heads": 8, "head_dim": 128, "page_size": 64}
BENCH_CASES = (
    WriteCase(name="decode-64", rows=64, num_pages=1024, **_LLAMA_8B),
    WriteCase(name="prefill-2048", rows=2048, num_pages=1024, **_LLAMA_8B),
)
