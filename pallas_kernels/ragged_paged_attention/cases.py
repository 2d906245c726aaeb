"""Named shapes of the op, shared by tests and benchmarks.

Shapes: T rows, H query heads, K kv heads, C head dim, P pages, G tokens per page, B sequences, M pages per sequence.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.ragged_paged_attention.layout import AttentionLayout

PADDING = -1


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One call: prefill chunks (first position, length), then decode rows by their position."""

    name: str
    chunks: tuple[tuple[int, int], ...] = ()
    decodes: tuple[int, ...] = ()  # PADDING: a row without a sequence
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 16
    row_block: int = 16
    padding_blocks: int = 0
    scale: float = 0.25
    softcap: float | None = None
    window: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "window": self.window}

    @property
    def lengths(self) -> list[int]:
        """Context of each sequence after the call: the chunks' first, then the decode rows'."""
        return [start + length for start, length in self.chunks] + [position + 1 for position in self.decodes]

    @property
    def num_chunk_rows(self) -> int:
        blocks = sum(-(-length // self.row_block) for _, length in self.chunks) + self.padding_blocks
        return blocks * self.row_block

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """position [T] and sequence [T] of every row."""
        position_T = np.full(self.num_chunk_rows + len(self.decodes), PADDING, np.int32)
        sequence_T = np.zeros_like(position_T)
        row = 0
        for sequence, (start, length) in enumerate(self.chunks):
            rows = -(-length // self.row_block) * self.row_block
            position_T[row : row + length] = np.arange(start, start + length)
            sequence_T[row : row + rows] = sequence
            row += rows
        position_T[self.num_chunk_rows :] = self.decodes
        sequence_T[self.num_chunk_rows :] = len(self.chunks) + np.arange(len(self.decodes))
        return position_T, sequence_T

    def make(
        self, dtype: DTypeLike = np.float32, seed: int = 0, spare_pages: int = 3
    ) -> tuple[jax.Array, jax.Array, jax.Array, AttentionLayout]:
        """Random (q [T, H, C], k and v pools [P, K, G, C], layout), pages dealt out in random order."""
        rng = np.random.default_rng(seed)
        position_T, sequence_T = self.rows()
        pages_per_seq = max(1, *(-(-length // self.page_size) for length in self.lengths))
        shape_BM = (len(self.lengths), pages_per_seq)
        num_pages = shape_BM[0] * pages_per_seq + spare_pages
        table_BM = rng.permutation(num_pages)[: shape_BM[0] * pages_per_seq].reshape(shape_BM)
        pool = (num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        shapes = (len(position_T), self.num_heads, self.head_dim), pool, pool
        q, k, v = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes)
        layout = AttentionLayout(
            position_T=jnp.asarray(position_T),
            sequence_T=jnp.asarray(sequence_T),
            page_table_BM=jnp.asarray(table_BM, jnp.int32),
            chunk_rows=self.num_chunk_rows,
            row_block=self.row_block,
        )
        return q, k, v, layout


_MIXED = {"chunks": ((37, 20), (0, 5), (0, 16)), "decodes": (100, 44, PADDING, 0)}
CASES = (
    AttentionCase(name="decode", decodes=(0, 15, 16, 77, PADDING, 3, 40, 41)),
    AttentionCase(name="prefill", chunks=((0, 1), (0, 48), (0, 17))),
    AttentionCase(name="mixed", **_MIXED, padding_blocks=1),
    AttentionCase(name="mha", **_MIXED, num_kv_heads=4),
    AttentionCase(name="mqa-one-row-per-head", decodes=(9, 30), num_heads=1, num_kv_heads=1),
    AttentionCase(name="softcap", **_MIXED, softcap=5.0),
    AttentionCase(name="window", **_MIXED, window=7),
    AttentionCase(name="window-softcap", **_MIXED, window=20, softcap=3.0, num_kv_heads=1),
    AttentionCase(name="window-of-one", **_MIXED, window=1),
    AttentionCase(name="odd-sizes", **_MIXED, page_size=5, row_block=3, head_dim=24, num_heads=6),
    AttentionCase(name="spans", chunks=((250, 20), (511, 2)), decodes=(255, 256, 700, 5)),
    AttentionCase(name="spans-window", chunks=((250, 20), (511, 2)), decodes=(255, 256, 700, 5), window=300),
    AttentionCase(name="padding-only", decodes=(PADDING, PADDING), padding_blocks=1),
)


def _for_kernels(name: str, **sizes: Any) -> AttentionCase:
    return AttentionCase(name=f"kernel-{name}", **{"head_dim": 64, "row_block": 64, "scale": 0.125, **sizes})


_RAGGED: dict[str, Any] = {"chunks": ((100, 80), (0, 5), (192, 64)), "decodes": (0, 15, PADDING, 200, 128, 127)}
_ONE_KV_HEAD: dict[str, Any] = {**_RAGGED, "num_kv_heads": 1}
_FEW: dict[str, Any] = {"chunks": ((100, 80),), "decodes": (130, 5)}
KERNEL_CASES = (  # shapes that the Mosaic kernels take; the first ones are small
    _for_kernels("small", chunks=((60, 70),), decodes=(0, PADDING, 130), padding_blocks=1),
    _for_kernels("96-group-3-window", **_FEW, head_dim=96, num_heads=3, num_kv_heads=1, page_size=64, window=40),
    _for_kernels(
        "128-softcap", chunks=((0, 5),), decodes=(129,), head_dim=128, num_kv_heads=4, page_size=128, softcap=3.0
    ),
    _for_kernels("padding-only", decodes=(PADDING, PADDING), padding_blocks=1),
    _for_kernels("ragged", **_RAGGED, padding_blocks=1),
    _for_kernels("group-8", **_ONE_KV_HEAD, num_heads=8, page_size=32),
    _for_kernels("group-7", **_ONE_KV_HEAD, num_heads=7, page_size=64),
    _for_kernels("96-group-5", **_ONE_KV_HEAD, num_heads=5, head_dim=96),
    _for_kernels("128-window-softcap", **_RAGGED, head_dim=128, page_size=64, window=40, softcap=3.0),
    _for_kernels("128-pages-of-128", **_RAGGED, head_dim=128, num_kv_heads=4, page_size=128),
    _for_kernels("256-window-softcap", **_FEW, head_dim=256, window=90, softcap=3.0),
    _for_kernels("256-group-6", **_FEW, head_dim=256, num_heads=6, num_kv_heads=1, page_size=128),
)

_LLAMA_8B = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 64, "row_block": 64, "scale": 128**-0.5}
BENCH_CASES = (
    AttentionCase(name="decode-64x1024", decodes=(1023,) * 64, **_LLAMA_8B),
    AttentionCase(name="decode-64-mixed", decodes=tuple(range(31, 2048, 32)), **_LLAMA_8B),
    AttentionCase(name="prefill-2048", chunks=((0, 2048),), **_LLAMA_8B),
    AttentionCase(name="chunk-512-at-3584", chunks=((3584, 512),), **_LLAMA_8B),
    AttentionCase(name="mixed-512-and-64", chunks=((1024, 512),), decodes=(1023,) * 64, **_LLAMA_8B),
)
