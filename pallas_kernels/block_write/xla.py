"""Runs anywhere: a scatter for each array.

Shapes: S blocks of the pools, Q rows per block, T rows, N blocks, E columns.
"""

import jax
from jaxtyping import Array, Int, Shaped


def block_write(
    pools: tuple[jax.Array, ...], rows: tuple[jax.Array, ...], block_N: Int[Array, "N"]
) -> tuple[jax.Array, ...]:
    (N,) = block_N.shape

    def write(pool_SQE: Shaped[Array, "S Q E"], new_TE: Shaped[Array, "T E"]) -> Shaped[Array, "S Q E"]:
        Q, E = pool_SQE.shape[1:]
        return pool_SQE.at[block_N].set(new_TE[: N * Q].reshape(N, Q, E), mode="drop")

    return tuple(map(write, pools, rows))
