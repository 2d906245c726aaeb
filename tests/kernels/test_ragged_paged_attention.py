"""Every implementation of the op against dense attention in float64, and what must not matter to a row.

Shapes: T rows, H query heads, K kv heads, C head dim, P pages, G tokens per page, B sequences, M pages per sequence.
"""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quick
from dense_attention import backward_inputs, dense, dense_backward

from pallas_kernels.dispatch import NoImplementation
from pallas_kernels.ragged_paged_attention import (
    AttentionLayout,
    ragged_paged_attention,
    ragged_paged_attention_backward,
)
from pallas_kernels.ragged_paged_attention.cases import BENCH_CASES, CASES, KERNEL_CASES, AttentionCase
from pallas_kernels.ragged_paged_attention.work import key_work

NAMES = ["xla", "reference"]  # the kernels have their own shapes, and tests
BACKWARD_CASES = [dataclasses.replace(case, decodes=()) for case in CASES if case.chunks]
MIXED = next(case for case in CASES if case.name == "mixed")
TOLERANCE = {"float32": 2e-6, "bfloat16": 0.03, "float16": 4e-3, "float64": 1e-14}


@lru_cache
def jitted(**settings):
    return jax.jit(partial(ragged_paged_attention, **settings))


@lru_cache
def jitted_backward(**settings):
    return jax.jit(partial(ragged_paged_attention_backward, **settings), compiler_options=quick.OPTIONS)


def call(implementation, case, q, k, v, layout):
    out, lse = jitted(**case.settings, implementation=implementation)(q, k, v, layout)
    return np.asarray(out), np.asarray(lse)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_dense_attention_over_each_rows_own_pages(implementation, case):
    args = case.make()
    out, lse = call(implementation, case, *args)
    expected_out, expected_lse = dense(case, *args)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_keep_their_precision(implementation, dtype):
    case = dataclasses.replace(MIXED, softcap=5.0, window=40)
    with jax.enable_x64(dtype == "float64"):
        args = case.make(np.dtype(getattr(ml_dtypes, dtype, dtype)))
        out, lse = call(implementation, case, *args)
    assert out.dtype == args[0].dtype
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    expected_out, expected_lse = dense(case, *args)
    np.testing.assert_allclose(out.astype(np.float64), expected_out, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(lse, expected_lse, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_padding_rows_are_zeros(implementation, case):
    q, k, v, layout = case.make()
    out, lse = call(implementation, case, q, k, v, layout)
    padding_T = np.asarray(layout.position_T) < 0
    assert (out[padding_T] == 0).all()
    assert (lse[padding_T] == -np.inf).all()
    assert np.isfinite(lse[~padding_T]).all()


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "padding-only"], ids=str)
def test_what_lies_past_a_sequence_or_in_other_pages_changes_no_bit(implementation, case):
    """NaN in every place that no row may see: other pages, and the rest of each sequence's last page."""
    q, k, v, layout = case.make()
    unseen_PG = np.ones((k.shape[0], case.page_size), bool)
    for sequence, length in enumerate(case.lengths):
        for position in range(length):
            page = layout.page_table_BM[sequence, position // case.page_size]
            unseen_PG[page, position % case.page_size] = False
    nan = jnp.asarray(unseen_PG)[:, None, :, None]
    poisoned = call(implementation, case, q, jnp.where(nan, jnp.nan, k), jnp.where(nan, jnp.nan, v), layout)
    clean = call(implementation, case, q, k, v, layout)
    np.testing.assert_array_equal(poisoned[0], clean[0])
    np.testing.assert_array_equal(poisoned[1], clean[1])


@pytest.mark.parametrize("implementation", NAMES)
def test_a_sequence_with_nan_keeps_it_to_itself(implementation):
    q, k, v, layout = MIXED.make()
    sick = layout.page_table_BM[1, 0]
    clean, _ = call(implementation, MIXED, q, k, v, layout)
    out, _ = call(implementation, MIXED, q, k.at[sick].set(jnp.nan), v.at[sick].set(jnp.nan), layout)
    mine_T = (np.asarray(layout.sequence_T) == 1) & (np.asarray(layout.position_T) >= 0)
    assert np.isnan(out[mine_T]).all()
    np.testing.assert_array_equal(out[~mine_T], clean[~mine_T])


HEADS = [  # 64 rows and query heads in a block
    AttentionCase(
        name=f"heads-of-{head_dim}", chunks=((0, 40), (250, 20)), decodes=(9, 300), head_dim=head_dim, row_block=16,
        num_heads=8, num_kv_heads=2,
    )
    for head_dim in (16, 32, 80, 96, 128)
]  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "padding-only"] + HEADS, ids=str)
def test_a_rows_bits_depend_on_nothing_but_itself(case):
    """Each sequence alone, in other pages, as decode rows instead of chunks: the same bits."""
    q, k, v, layout = jax.tree.map(np.asarray, case.make())
    together = call("xla", case, q, k, v, layout)
    rng = np.random.default_rng(1)
    shuffled_P = rng.permutation(k.shape[0])
    k, v = k[shuffled_P], v[shuffled_P]
    place_P = np.argsort(shuffled_P).astype(np.int32)
    rows = rng.permutation(np.flatnonzero(layout.position_T >= 0))[:24]
    alone = AttentionLayout(
        position_T=layout.position_T[rows],
        sequence_T=layout.sequence_T[rows],
        page_table_BM=place_P[layout.page_table_BM],
        chunk_rows=0,
        row_block=1,
    )
    out, lse = call("xla", case, q[rows], k, v, alone)
    np.testing.assert_array_equal(out, together[0][rows])
    np.testing.assert_array_equal(lse, together[1][rows])


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_the_backward_is_that_of_dense_attention(implementation, case):
    args = backward_inputs(case, np.float32)
    d_q, accumulators = jitted_backward(**case.settings, implementation=implementation)(*args)
    for got, expected in zip((d_q, *accumulators), dense_backward(case, *args), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", NAMES)
def test_a_gradient_that_is_not_finite_leaves_the_rest_of_its_last_page_alone(implementation):
    """Nobody reads and clears what lies past a sequence, and other sequences get the page."""
    case = dataclasses.replace(MIXED, decodes=())
    d_out, *args, sums, acc_table = backward_inputs(case, np.float32)
    pull = jitted_backward(**case.settings, implementation=implementation)
    last_page, offset = divmod(case.lengths[0], case.page_size)
    page = acc_table[0, last_page]
    _, after = pull(d_out.at[0].set(jnp.nan), *args, sums, acc_table)
    for new, old in zip(after, sums, strict=True):
        assert not np.isfinite(new).all()
        np.testing.assert_array_equal(new[page, :, offset:], old[page, :, offset:])


@pytest.mark.parametrize("lengths", [(2048, 2048), (512,) * 8, (1280, 448, 1920)], ids=str)
def test_dk_and_dv_are_shared_out_evenly_whatever_the_sequences_are(lengths):
    """To and fro over the (tile, head) pairs, as the kernel goes."""
    cores, heads = 132, 8
    layout = AttentionLayout(
        position_T=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        sequence_T=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        page_table_BM=np.zeros((len(lengths), 32), np.int32),
        chunk_rows=sum(lengths),
        row_block=64,
    )
    work = jax.jit(partial(key_work, window=None, page_size=64, tile_keys=64))(layout)
    blocks = np.repeat(np.asarray(work.stop_X - work.first_X)[: int(work.tiles_1[0])], heads)
    assert blocks.sum() == heads * sum(n // 64 * (n // 64 + 1) // 2 for n in lengths)
    rounds = np.pad(blocks, (0, -len(blocks) % cores)).reshape(-1, cores)
    rounds[1::2] = rounds[1::2, ::-1]
    assert rounds.sum(axis=0).max() <= max(1.15 * blocks.sum() / cores, blocks.max())


def test_chunk_rows_come_in_whole_blocks():
    index = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="chunk_rows 4 must be a multiple of row_block 3"):
        AttentionLayout(position_T=index, sequence_T=index, page_table_BM=index[:, None], chunk_rows=4, row_block=3)


def test_an_unknown_implementation_is_refused_by_name():
    with pytest.raises(NoImplementation, match=r"no implementation 'cuda'.*reference.*xla"):
        ragged_paged_attention(*MIXED.make(), scale=1.0, implementation="cuda")


def test_names_of_cases_are_unique():
    names = [case.name for case in CASES + KERNEL_CASES + BENCH_CASES]
    assert len(set(names)) == len(names)
    assert all(isinstance(case, AttentionCase) for case in BENCH_CASES)
