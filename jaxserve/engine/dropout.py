"""Dropout of the adapters' input while they are trained, the same in every pass over a row.

A mask is a function of the job's seed, the example and the token's place in it (and of layer, site and column):
not of the step, the window or the row. Windows run their forward twice, and both times, like any other cut of the
example, with the same masks; so do shards, each of its own columns.

Shapes: T rows, I in.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

_COLUMN, _SALT = np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B)  # odd, far from powers of two


def keep_mask(
    key_T: Int[Array, "T"], position_T: Int[Array, "T"], rate_T: Float[Array, "T"], salt, first, columns: int
) -> jax.Array:
    """True where an input is kept, [T, columns].

    Args:
      salt: number of the layer and site, the same for all rows.
      first: number of the first column that this shard has.
    """
    row_T = _mix(_bits(key_T) ^ _mix(_bits(position_T) + _bits(salt) * _SALT))
    column_I = _bits(first) + jnp.arange(columns, dtype=jnp.uint32)
    bits_TI = _mix(row_T[:, None] + (column_I * _COLUMN)[None])
    uniform_TI = (bits_TI >> 8).astype(rate_T.dtype) * jnp.asarray(2.0**-24, rate_T.dtype)
    return uniform_TI >= rate_T[:, None]


def drop(x_TI: Float[Array, "T I"], keep_TI: jax.Array, rate_T: Float[Array, "T"]) -> Float[Array, "T I"]:
    """x where it is kept, over the share that is kept; zero elsewhere."""
    return jnp.where(keep_TI, x_TI / (1 - rate_T)[:, None].astype(x_TI.dtype), 0)


def _bits(x) -> UInt[Array, "..."]:
    return jnp.asarray(x).astype(jnp.uint32)


def _mix(x: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """A permutation of 32-bit numbers that changes half of the bits when one changes (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
