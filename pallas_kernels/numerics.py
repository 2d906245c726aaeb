"""Numerics all ops share: the dtype of sums, and row sums whose bits do not depend on how many rows there are.

XLA's CPU backend generates other code for a reduction over few rows than for one over many, and the last bits
change with it. Its matrix product does not, as long as both operands contract their last axis and there are at least
two rows on either side; so on CPU a row sum is a product with ones. Everywhere else it is a plain sum.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

STABLE_ROWS = 64  # XLA's CPU backend multiplies fewer rows by another kernel, with other bits, if w is contracted first
LANES = 8  # columns of ones; one would be a matrix-vector product, which XLA turns back into a reduction


def wide_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype sums over ``dtype`` are kept in: at least float32. (jnp.promote_types is an error in strict mode.)"""
    return np.promote_types(np.dtype(dtype), np.float32)


def row_sum(x: jax.Array) -> jax.Array:
    """Sums over the last axis: [..., D] to [...], in the dtype of x (float32 or wider)."""
    return lax.platform_dependent(x, cpu=_by_matmul, default=lambda x: jnp.sum(x, axis=-1))


def matmul(x_TI: jax.Array, w_OI: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Returns x @ w.T, [T, O] in ``out_dtype`` (default: that of x).

    Contracting both last axes keeps the checkpoint's layout, and on CPU in float32 the bits of a row then depend
    neither on T nor on its neighbours. XLA sums products of narrower types in float32 by itself.
    """
    return lax.dot_general(x_TI, w_OI, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype or x_TI.dtype)


def contract(x_RO: jax.Array, w_OI: jax.Array, accumulate: DTypeLike) -> jax.Array:
    """x @ w, [R, O] x [O, I] to [R, I], as a backward multiplies with a matrix that is stored [out, in]; on CPU too the
    bits of a row do not depend on how many rows there are."""

    def dot(x_RO: jax.Array, w_OI: jax.Array) -> jax.Array:
        return lax.dot_general(x_RO, w_OI, (((1,), (0,)), ((), ())), preferred_element_type=accumulate)

    def on_cpu(x_RO: jax.Array, w_OI: jax.Array) -> jax.Array:
        R = x_RO.shape[0]
        return dot(jnp.pad(x_RO, ((0, max(STABLE_ROWS - R, 0)), (0, 0))), w_OI)[:R]

    return lax.platform_dependent(x_RO, w_OI, cpu=on_cpu, default=dot)


def apart(x: jax.Array, one: jax.Array) -> jax.Array:
    """x, computed for itself on CPU: what comes after it does not decide how it is computed.

    XLA compiles an elementwise chain as one piece of code, and whether a * b + c * d in it becomes a fused multiply-add
    of the first product or of the second depends on what else is there. A loop of ``one`` turn, an int32 that only the
    run knows to be 1, is a boundary that stays. Its turn writes x's first number where it is, which only the run knows
    as well: x is passed through in place.
    """

    def alone(x: jax.Array, one: jax.Array) -> jax.Array:
        def turn(_, x: jax.Array) -> jax.Array:
            first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)
            return lax.dynamic_update_slice(x, jnp.where(one > 0, first, 0), (0,) * x.ndim)

        return lax.fori_loop(0, one, turn, x)

    return lax.platform_dependent(x, one, cpu=alone, default=lambda x, one: x)


def never(x: jax.Array) -> jax.Array:
    """False everywhere: x equals a value that is not there, as the compiler cannot know before it has x."""
    return x == jnp.finfo(x.dtype).max


def rounded(x: jax.Array) -> jax.Array:
    """x, a product that is to be added to another one, rounded before it is: else XLA's CPU backend makes a fused
    multiply-add of either of them, by what else there is, and the last bits with it."""
    return jnp.where(never(x), jnp.zeros_like(x), x)


def after(x: jax.Array, others: Iterable[jax.Array]) -> jax.Array:
    """x, from which nothing can be computed before ``others`` are there; on a CPU just x.

    A dependency that no compiler takes away, as XLA does with ``lax.optimization_barrier`` before it puts instructions
    in order. It costs a copy of x, so x is small, or is read once.
    """

    def dependent(x: jax.Array, others: tuple[jax.Array, ...]) -> jax.Array:
        impossible = jnp.zeros((), bool)
        for other in others:
            first = lax.slice(other, (0,) * other.ndim, (1,) * other.ndim)
            impossible |= never(first).reshape(())
        impossible = lax.optimization_barrier(impossible)  # one kernel's: no other reads ``others`` once more, and late
        other_x = (x == 0).astype(x.dtype)  # never x itself: a constant would not wait
        return jnp.where(impossible, other_x, x)

    return lax.platform_dependent(x, tuple(others), cpu=lambda x, _: x, default=dependent)


def stored(x: jax.Array) -> jax.Array:
    """x, computed once where several products read it; on a CPU just x. XLA compiles what comes before a product into
    the product, and then tunes that against computing x and multiplying, though x is there anyway."""
    return lax.platform_dependent(x, cpu=lambda x: x, default=lax.optimization_barrier)


def map_rows(function: Callable[[Any], Any], most: int, arrays: Any) -> Any:
    """``function`` of arrays with the same rows, [R, ...], at most ``most`` rows at a time, padded with zeros."""
    R = jax.tree.leaves(arrays)[0].shape[0]
    size = min(most, R)
    chunks = -(-R // size)

    def chunked(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, chunks * size - R), *((0, 0),) * (x.ndim - 1))).reshape(chunks, size, *x.shape[1:])

    out = lax.map(function, jax.tree.map(chunked, arrays))
    return jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:R], out)


def _by_matmul(x: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    few = rows.shape[0] < 2
    rows = jnp.pad(rows, ((0, 1), (0, 0))) if few else rows
    ones = jnp.ones((LANES, x.shape[-1]), x.dtype)
    sums = lax.dot_general(rows, ones, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)[:, 0]
    return (sums[:1] if few else sums).reshape(x.shape[:-1])
