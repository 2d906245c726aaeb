"""What the Pallas Mosaic GPU kernels share. Every call whose form changes between JAX versions is made here.

Needs jax 0.11.2 or later, so kernels import this module when they are chosen (``dispatch.mosaic_pair``), never before.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike

plgpu: Any = mosaic_gpu  # untyped: other JAX versions have other names in it
LOG2E = math.log2(math.e)
LN2 = math.log(2)
MASKED = -(2.0**100)  # finite: exp2(MASKED - MASKED) is 1, never NaN; scaled without rounding: fused or not, the same
WARPGROUP_ROWS = 64  # rows of a wgmma
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a wgmma's result
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value per column


def kernel(
    body: Callable, *, out: Any = (), scratch: Any = (), grid: dict[str, int], threads: int, interpret: bool
) -> Callable:
    """A function of arrays (and of Refs that it writes in place) that runs ``body`` on a grid of thread blocks.

    Args:
      body: takes the inputs', outputs' and scratch Refs.
      grid: the name and size of each grid axis.
      threads: warpgroups per block; ``lax.axis_index("warpgroup")`` tells them apart.
      interpret: run on the CPU, in the interpreter that reports data races.
    """
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, skip_device_barrier=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )


def operand(*shape: int, dtype: DTypeLike, filled: int | None = None) -> Any:
    """Shared memory of a matrix (the last two axes) that copies fill and wgmma reads: tiled and swizzled.

    ``filled`` is the number of columns in global memory where copies reach past them and add zeros.
    """
    bytes_per = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if (filled or shape[-1]) * bytes_per % s == 0)
    tiling = plgpu.TilingTransform((8, swizzle // bytes_per))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def divisor(size: int, most: int, unit: int = WARPGROUP_ROWS) -> int:
    """The largest divisor of ``size`` that is a multiple of ``unit`` and at most ``most``."""
    return max(d for d in range(unit, max(most, unit) + 1, unit) if size % d == 0)


def matmul(a: Any, b: Any, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """a @ b of two shared-memory matrices, in registers."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), dtype))


def accumulate(
    outs: tuple[jax.Array, ...], run: Callable[[Callable], None], a_sms: Any = None
) -> tuple[jax.Array, ...]:
    """Adds matrix products to arrays in registers, and waits for them.

    Args:
      run: calls its argument, ``add(i, a, b)``, to start ``outs[i] += a @ b`` with a in registers and b in shared
        memory; what else it does happens while the tensor cores are at it.
      a_sms: shared memory for the a of each output, in the interpreter alone: its wgmma takes no registers.
    """
    if a_sms is not None:
        sums = list(outs)

        def add_through_memory(i, a, b):
            a_sms[i][...] = a
            plgpu.commit_smem()
            sums[i] += matmul(a_sms[i], b)

        run(add_through_memory)
        return tuple(sums)

    return pl.run_state(lambda accs: run(lambda i, a, b: plgpu.wgmma(accs[i], a, b)))(tuple(map(plgpu.ACC.init, outs)))


def matmul_pair(first: tuple[Any, Any], second: tuple[Any, Any], use_first: Callable) -> tuple[Any, jax.Array]:
    """(use_first(a @ b), c @ d) of matrices in shared memory: the second product runs while the first one is used."""

    def run(acc, other):
        plgpu.wgmma(acc, *first)
        plgpu.wgmma(other, *second)
        used = use_first(plgpu.wgmma_accumulator_load(acc, wait_n=1))
        return used, other[...]

    return pl.run_scoped(run, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in (first, second)))


def opaque(number: jax.Array) -> jax.Array:
    """The number, as if it came from this place in the program: addresses made of it are not kept in registers over a
    loop, where a matrix needs one for each 16 of its columns."""
    return lax.optimization_barrier(number)


def columns(width: int, filled: int, number: jax.Array) -> Any:
    """The first ``width`` columns, or rows, of global memory that has ``filled``: copies add zeros past those, or leave
    them. ``number`` is any that only the run knows: JAX from 0.12 on refuses a slice that it can see to be too long."""
    return pl.ds(0 if width <= filled else number * 0, width)


def put(ref: Any, value: jax.Array) -> None:
    """Writes an array to global memory, or to shared memory that no layout fits. JAX before 0.12 finds that out for
    itself, and has no ``store``."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def full(shape: tuple[int, ...], value: float, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along(axis: int, vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The vector as a matrix that varies along ``axis``."""
    return lax.broadcast_in_dim(vector, shape, (axis,))


def index(axis: int, shape: tuple[int, ...]) -> jax.Array:
    """Each element's index along ``axis``."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def keep_rows(matrix_sm: Any, count: jax.Array) -> None:
    """Sets the rows of a matrix in shared memory from ``count`` on to zero, a tile at a time."""
    rows, columns = matrix_sm.shape
    width = 64 if columns % 64 == 0 else 32

    def keep(i, _):  # a loop, unrolled it would need all the tiles' registers at once
        r, c = lax.div(i, columns // width) * WARPGROUP_ROWS, lax.rem(i, columns // width) * width
        tile_sm = matrix_sm.at[pl.ds(r, WARPGROUP_ROWS), pl.ds(c, width)]
        tile = plgpu.load(tile_sm, layout=plgpu.Layout.WGMMA)
        tile_sm[...] = jnp.where(index(0, tile.shape) < count - r, tile, jnp.zeros_like(tile))

    lax.fori_loop(0, rows // WARPGROUP_ROWS * (columns // width), keep, None)
    plgpu.commit_smem()
