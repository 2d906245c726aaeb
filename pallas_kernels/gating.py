"""The gate of a gated feed-forward layer.

Shapes: T rows, E columns of gate and up side by side, F of each.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.numerics import wide_dtype

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}
# either is x * sigmoid(slope(x) * x): a device has tanh only roughly, as which gelu's small values would be lost
SLOPES: dict[str, Callable[[jax.Array], Any]] = {
    "silu": lambda x: 1.0,
    "gelu_tanh": lambda x: (8 / math.pi) ** 0.5 * (1 + 0.044715 * x * x),
}


def gated(gate_up_TE: Float[Array, "T E"], activation: str) -> Float[Array, "T F"]:
    """Returns act(gate) * up; the activation is computed in float32 or wider and rounded."""
    gate_TF, up_TF = jnp.split(gate_up_TE, 2, axis=-1)
    act_TF = ACTIVATIONS[activation](gate_TF.astype(wide_dtype(gate_TF.dtype)))
    return act_TF.astype(up_TF.dtype) * up_TF
