"""The definition: one block after another.

Shapes: S blocks of the pools, Q rows per block, T rows, N blocks.
"""

import jax
from jaxtyping import Array, Int


def block_write(
    pools: tuple[jax.Array, ...], rows: tuple[jax.Array, ...], block_N: Int[Array, "N"]
) -> tuple[jax.Array, ...]:
    Q, out = pools[0].shape[1], list(pools)
    for n, block in enumerate(block_N):
        for i, new in enumerate(rows):
            out[i] = out[i].at[block].set(new[n * Q : (n + 1) * Q], mode="drop")
    return tuple(out)
