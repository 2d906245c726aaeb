"""Every implementation of the paged K/V write puts the same bits in the same places, and leaves the others alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_checks import ON_DEVICE, needs_mosaic

from pallas_kernels.dispatch import INTERPRETED, MOSAIC, NoImplementation
from pallas_kernels.paged_kv_write import paged_kv_write
from pallas_kernels.paged_kv_write.cases import BENCH_CASES, CASES, WriteCase

pytestmark = pytest.mark.usefixtures("no_races")
IMPLEMENTATIONS = ["xla", pytest.param(INTERPRETED, marks=needs_mosaic), ON_DEVICE]


def by_hand(k_PKGC, v_PKGC, k_TKC, v_TKC, page_T, offset_T):
    k_PKGC, v_PKGC = np.array(k_PKGC), np.array(v_PKGC)
    for row, (page, offset) in enumerate(zip(page_T, offset_T, strict=True)):
        if page < len(k_PKGC):
            k_PKGC[page, :, offset], v_PKGC[page, :, offset] = k_TKC[row], v_TKC[row]
    return k_PKGC, v_PKGC


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_reach_their_places_and_nothing_else_changes(case, implementation):
    args = case.make(jnp.bfloat16)
    same(jax.jit(partial(paged_kv_write, implementation=implementation))(*args), by_hand(*args))


def test_the_definition_is_a_loop_over_rows():
    args = CASES[1].make(jnp.float32)
    same(jax.jit(partial(paged_kv_write, implementation="reference"))(*args), by_hand(*args))


def test_rows_are_rounded_to_the_pools_dtype():
    k, v, new_k, new_v, *place = CASES[0].make(jnp.float32)
    pools = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    got = paged_kv_write(*pools, new_k, new_v, *place, implementation="xla")
    same(got, by_hand(*pools, new_k.astype(jnp.bfloat16), new_v.astype(jnp.bfloat16), *place))


@needs_mosaic
@pytest.mark.parametrize("case", BENCH_CASES, ids=str)
def test_it_lowers_for_cuda_at_production_shapes_in_place(case):
    args = jax.eval_shape(partial(case.make, jnp.bfloat16))
    write = jax.jit(partial(paged_kv_write, implementation=MOSAIC), donate_argnums=(0, 1))
    text = write.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == 2


@needs_mosaic
def test_what_it_cannot_copy_is_refused_by_name():
    args = WriteCase(name="odd", rows=2, head_dim=20).make(jnp.bfloat16)
    with pytest.raises(NoImplementation, match="multiples of 16 bytes, a head has 40"):
        paged_kv_write(*args, implementation=MOSAIC)
