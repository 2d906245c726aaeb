"""Named shapes of the op, shared by tests and benchmarks.

Shapes: S blocks of the pools, Q rows per block, T rows, N blocks.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@dataclass(frozen=True, kw_only=True)
class BlockWriteCase:
    """One call: blocks to random places, the last ``padding`` of them nowhere; ``more`` rows behind the last block."""

    name: str
    blocks: int
    dims: tuple[int, ...]
    padding: int = 0
    more: int = 0
    row_block: int = 64
    num_blocks: int = 5

    def __str__(self) -> str:
        return self.name

    def make(
        self, dtype: DTypeLike = np.float32, seed: int = 0
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]:
        """Random (pools [S, Q, E], rows [T, E], block [N]); padding has blocks >= S."""
        rng = np.random.default_rng(seed)

        def random(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

        pools = tuple(random(self.num_blocks, self.row_block, dim) for dim in self.dims)
        rows = tuple(random(self.blocks * self.row_block + self.more, dim) for dim in self.dims)
        block_N = np.concatenate(
            [
                rng.permutation(self.num_blocks)[: self.blocks - self.padding],
                self.num_blocks + np.arange(self.padding) % 2,
            ]
        )
        return pools, rows, jnp.asarray(block_N, jnp.int32)


CASES = (
    BlockWriteCase(name="one-block", blocks=1, dims=(64,)),
    BlockWriteCase(name="several-widths", blocks=3, dims=(256, 384, 1792), padding=1, more=8),
    BlockWriteCase(name="odd-tiles", blocks=2, dims=(768, 1280), row_block=16),
    BlockWriteCase(name="narrow", blocks=2, dims=(24, 8), more=3),
    BlockWriteCase(name="padding-only", blocks=2, dims=(128,), padding=2),
)

BENCH_CASES = (
    BlockWriteCase(name="stash-2048", blocks=32, dims=(4096, 4096, 6144, 4096, 28672), more=64, num_blocks=40),
)
