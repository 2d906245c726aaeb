"""Every implementation of the block write puts the same bits in the same places, and leaves the others alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_checks import ON_DEVICE, needs_mosaic

from pallas_kernels.block_write import block_write, tile_columns
from pallas_kernels.block_write.cases import BENCH_CASES, CASES, BlockWriteCase
from pallas_kernels.dispatch import INTERPRETED, MOSAIC, NoImplementation

pytestmark = pytest.mark.usefixtures("no_races")
WIDE = BlockWriteCase(name="float32", blocks=2, dims=(32, 96), padding=1, more=8)
IMPLEMENTATIONS = ["xla", "reference", pytest.param(INTERPRETED, marks=needs_mosaic), ON_DEVICE]


def by_hand(pools, rows, block_N):
    pools, Q = [np.array(pool) for pool in pools], pools[0].shape[1]
    for n, block in enumerate(block_N):
        for pool, new in zip(pools, rows, strict=True):
            if block < len(pool):
                pool[block] = new[n * Q : (n + 1) * Q]
    return pools


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [*CASES, WIDE], ids=str)
def test_blocks_reach_their_places_and_nothing_else_changes(case, implementation):
    args = case.make(jnp.float32 if case is WIDE else jnp.bfloat16)
    got = jax.jit(partial(block_write, implementation=implementation))(*args)
    for a, b in zip(got, by_hand(*args), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(
    ("dims", "columns"), [((4096, 6144), 256), ((1152, 1536), 192), ((24, 8), 8), ((32,), 32), ((20,), 0)]
)
def test_a_tile_divides_every_array(dims, columns):
    assert tile_columns(dims, 2) == columns


@needs_mosaic
@pytest.mark.parametrize("case", BENCH_CASES, ids=str)
def test_it_lowers_for_cuda_at_production_shapes_in_place(case):
    args = jax.eval_shape(partial(case.make, jnp.bfloat16))
    write = jax.jit(partial(block_write, implementation=MOSAIC), donate_argnums=0)
    text = write.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == len(case.dims)


@needs_mosaic
def test_what_it_cannot_copy_is_refused_by_name():
    pools, rows, block_N = BlockWriteCase(name="odd", blocks=1, dims=(20,)).make(jnp.bfloat16)
    with pytest.raises(NoImplementation, match=r"multiples of 16 bytes, rows have \[20\] elements of 2"):
        block_write(pools, rows, block_N, implementation=MOSAIC)
    other = pools[0].astype(jnp.float32)
    with pytest.raises(NoImplementation, match="one dtype, these have bfloat16 and float32"):
        block_write((*pools, other), (*rows, rows[0]), block_N, implementation=MOSAIC)
