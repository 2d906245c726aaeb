"""Rotary position embeddings: reading the variants from a config, inverse frequencies, cos and sin.

Frequencies are a function of the configuration alone, so a cached key never depends on how long its sequence
became. That makes ``dynamic`` equal to ``default``: transformers stretches the base only beyond
max_position_embeddings, and a model of that kind is not served beyond it.

Shapes: T tokens, C head dim.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxserve.errors import ModelError
from jaxserve.models.config import Fields, RopeConfig
from pallas_kernels.numerics import rounded

_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",  # of YaRN's authors: says that there was training at the new length, and changes nothing
    },
}
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(fields: Fields, max_position: int, default_theta: float = 10_000.0) -> RopeConfig:
    """The rope of a model with one: ``rope_theta`` + ``rope_scaling``, or ``rope_parameters``."""
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    fields.get("rope_parameters")
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ModelError(f"{fields.where}: rope_parameters must be one flat set of values for this architecture")
    theta = fields.number("rope_theta", default_theta)
    original = fields.integer("original_max_position_embeddings", None)
    return parse_rope(scaling, theta, max_position, original, where=f"{fields.where}: rope_parameters")


def parse_rope(
    scaling: Mapping[str, Any], theta: float, max_position: int, original: Any = None, where: str = ""
) -> RopeConfig:
    """Translates one rope dictionary; ``theta`` is used where the dictionary has none.

    Raises:
      ModelError: an unknown rope type, a key the type does not have, a senseless number.
    """
    fields = Fields(scaling, where)
    kind = fields.get("rope_type") or fields.get("type", "default")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ModelError(f"{where}: rope_type {kind!r} is not supported; supported: {', '.join(_KEYS)}")
    unknown = sorted(k for k, v in scaling.items() if v is not None and k not in _KEYS[kind] | _COMMON_KEYS)
    if unknown:
        raise ModelError(f"{where}: {unknown[0]} is not supported for rope_type {kind!r}")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{where}: partial_rotary_factor {scaling['partial_rotary_factor']} must be 1.0")
    theta = fields.number("rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = fields.number("factor")
    if kind in ("linear", "dynamic"):
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    original = fields.integer("original_max_position_embeddings", max_position) if original is None else original
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if high <= low:
            raise ModelError(f"{where}: high_freq_factor {high:g} must be above low_freq_factor {low:g}")
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=factor,
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if theta <= 1:
        raise ModelError(f"{where}: rope_theta {theta:g} must be above 1 for rope_type {kind!r}")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_position=original,
        attention_factor=_yarn_attention_factor(fields, factor),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        truncate=fields.flag("truncate", True),
    )


def _yarn_attention_factor(fields: Fields, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = fields.number("attention_factor", None)
    numerator, denominator = fields.number("mscale", None), fields.number("mscale_all_dim", None)
    if given is not None:
        return given
    if numerator and denominator:
        return mscale(numerator) / mscale(denominator)
    return mscale(1.0)


def inverse_frequencies(rope: RopeConfig, head_dim: int, dtype: DTypeLike) -> np.ndarray:
    """[C/2] radians per position, computed in ``dtype`` (float32 to agree with transformers to the last bit)."""
    exponent = np.arange(0, head_dim, 2, dtype=dtype) / np.asarray(head_dim, dtype)
    frequency = np.asarray(1.0, dtype) / np.asarray(rope.theta, dtype) ** exponent
    if rope.kind == "linear":
        frequency = frequency / np.asarray(rope.factor, dtype)
    if rope.kind == "llama3":
        frequency = _llama3(rope, frequency)
    if rope.kind == "yarn":
        frequency = _yarn(rope, frequency, head_dim)
    return frequency.astype(dtype)


def _llama3(rope: RopeConfig, frequency: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    turns = rope.original_max_position * frequency / (2 * math.pi)  # rotations within the pretraining length
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def _yarn(rope: RopeConfig, frequency: np.ndarray, head_dim: int) -> np.ndarray:
    """Dimensions that turn fast are extrapolated, slow ones interpolated, with a linear ramp between."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=frequency.dtype) - low) / (high - low), 0.0, 1.0)
    return frequency / rope.factor * ramp + frequency * (1 - ramp)


def cos_sin(rope: RopeConfig, head_dim: int, position_T: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin, each [T, C] in ``dtype``; computed in at least float32."""
    compute = np.promote_types(dtype, np.float32)
    frequency = jnp.asarray(inverse_frequencies(rope, head_dim, compute))
    angle_TC = position_T.astype(compute)[:, None] * jnp.concatenate([frequency, frequency])[None, :]
    scale = jnp.asarray(rope.attention_factor, compute)
    return (jnp.cos(angle_TC) * scale).astype(dtype), (jnp.sin(angle_TC) * scale).astype(dtype)


def rotate(x_THC: jax.Array, cos_TC: jax.Array, sin_TC: jax.Array) -> jax.Array:
    """Rotates the two halves of the head dim against each other."""
    first, second = jnp.split(x_THC, 2, axis=-1)
    turned_THC = jnp.concatenate([-second, first], axis=-1)
    return x_THC * cos_TC[:, None, :] + rounded(turned_THC * sin_TC[:, None, :])
