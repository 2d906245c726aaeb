"""The sampling parameters of one step's rows, as arrays.

Shapes: R rows that draw a token.
"""

from functools import partial

import jax
from flax import struct
from jaxtyping import Array, Float, Int, UInt

GREEDY_BELOW = 1e-5  # a lower temperature is greedy: dividing by it would overflow


@struct.dataclass
class SampleRows:
    """One entry per drawn token; temperature 0 is greedy, and 0, 1, 0 switch top-k, top-p, min-p off."""

    temperature_R: Float[Array, "R"]
    top_k_R: Int[Array, "R"]
    top_p_R: Float[Array, "R"]
    min_p_R: Float[Array, "R"]
    repetition_R: Float[Array, "R"]
    presence_R: Float[Array, "R"]
    frequency_R: Float[Array, "R"]
    seed_R2: UInt[Array, "R 2"]
    choice_R: Int[Array, "R"]
    position_R: Int[Array, "R"]  # of the drawn token in its sequence


@partial(jax.vmap)
def row_keys(seed_2: UInt[Array, "2"], choice: Int[Array, ""], position: Int[Array, ""]) -> jax.Array:
    """The key of a draw depends on (seed, choice, position) and on nothing else in the batch."""
    key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, choice), position)
