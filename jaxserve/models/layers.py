"""The small pure functions a decoder layer is made of.

Shapes: T tokens, D hidden.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.models.config import ModelConfig
from pallas_kernels.numerics import row_sum


def accumulator(x: jax.Array) -> np.dtype:
    """The dtype sums over ``x`` are kept in: at least float32."""
    return np.promote_types(x.dtype, np.float32)


def rms_norm(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
    """Root-mean-square norm over the last axis; families differ in where they round.

    Llama's rounds the normalised value and then multiplies by w; Gemma's multiplies by 1 + w and then rounds.
    """
    wide = _normalised(x.astype(accumulator(x)), config.rms_norm_eps)
    weight = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    if config.norm_offset:
        return (wide * (config.norm_offset + weight.astype(wide.dtype))).astype(x.dtype)
    return weight * wide.astype(x.dtype)


def _normalised_forward(x: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    scale = lax.rsqrt(row_sum(x * x)[..., None] / x.shape[-1] + jnp.asarray(eps, x.dtype))
    return x * scale, (x, scale)


def _normalised_backward(eps: float, kept: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array]:
    x, scale = kept
    y = x * scale
    return (scale * (d_y - y * (row_sum(d_y * y)[..., None] / x.shape[-1])),)


def _normaliser() -> Callable[[jax.Array, float], jax.Array]:
    """x / sqrt(mean(x^2) + eps). Its own backward sums rows as its forward does: bits that depend on the row alone."""
    ruled: Any = jax.custom_vjp(lambda x, eps: _normalised_forward(x, eps)[0], nondiff_argnums=(1,))
    ruled.defvjp(_normalised_forward, _normalised_backward)
    return ruled


_normalised = _normaliser()


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), or x where there is no cap."""
    return x if cap is None else jnp.tanh(x / cap) * cap
