"""Logical axes to mesh axes, in one table.

Every array of the engine names its dimensions by meaning ("heads", "ffn", ...). Whether a meaning is split over
devices is decided here and nowhere else.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.mesh import AXIS

RULES: dict[str, str | None] = {
    "vocab": AXIS,  # embedding and head rows
    "heads": AXIS,  # rows of q, k, v; columns of o; heads of the KV pool
    "ffn": AXIS,  # rows of gate and up; columns of down
    "device": AXIS,  # sums that every device keeps for itself
    "embed": None,  # the residual stream is replicated
}


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Maps logical axis names (None: not split) to a PartitionSpec.

    Raises:
      ValueError: an axis name missing from the table, or one mesh axis used for two dimensions.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} is not in sharding.rules.RULES {sorted(RULES)}")
    mapped = [None if axis is None else RULES[axis] for axis in axes]
    used = [axis for axis in mapped if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} map one mesh axis twice: {tuple(mapped)}")
    return PartitionSpec(*mapped)


def named_sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """The sharding of an array with these logical axes on this mesh."""
    return NamedSharding(mesh, partition_spec(axes))


def zeros(mesh: Mesh, shape: tuple[int, ...], axes: Sequence[str | None], dtype: Any) -> jax.Array:
    """An array of zeros made where it lives; the same shape again compiles nothing."""
    return full(mesh, shape, axes, dtype, 0)


def full(mesh: Mesh, shape: tuple[int, ...], axes: Sequence[str | None], dtype: Any, value: float) -> jax.Array:
    """An array of one value made where it lives; the same shape again compiles nothing."""
    return _full_program(shape, np.dtype(dtype), named_sharding(mesh, axes), value)()


@cache
def _full_program(
    shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding, value: float
) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.full(shape, value, dtype), out_shardings=sharding)


def tree_specs(tree: Any) -> Any:
    """PartitionSpecs of a pytree whose leaves have ``.axes``."""
    return jax.tree.map(lambda leaf: partition_spec(leaf.axes), tree, is_leaf=lambda x: hasattr(x, "axes"))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedShardings of a pytree whose leaves have ``.axes``."""
    return jax.tree.map(lambda leaf: named_sharding(mesh, leaf.axes), tree, is_leaf=lambda x: hasattr(x, "axes"))
