"""Every implementation of the op against the adapters one by one in float64, and what must not matter to a row.

Shapes: T rows, D in, E out, P pages, R ranks per page, N blocks, Q rows per block, J items.
"""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quick
from one_by_one import PAGES_BEFORE, among_others, one_by_one, one_by_one_backward

from pallas_kernels.dispatch import NoImplementation
from pallas_kernels.lora_matmul import PAGE_RANK, LoraPlan, lora_linear, lora_matmul, lora_matmul_backward, xla
from pallas_kernels.lora_matmul.cases import (
    BASE,
    BENCH_CASES,
    CASES,
    KERNEL_CASES,
    LINEAR_BENCH_CASES,
    LINEAR_CASES,
    LoraCase,
)
from pallas_kernels.numerics import matmul

NAMES = ["xla", "reference"]
MIXED = next(case for case in CASES if case.name == "mixed-ranks")
BACKWARD_CASES = [dataclasses.replace(case, singles=()) for case in CASES if case.chunks]
LONG = next(case for case in KERNEL_CASES if case.name == "kernel-long")
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.01, "float64": 1e-13}


@lru_cache
def jitted(implementation):
    return jax.jit(partial(lora_matmul, implementation=implementation))


@lru_cache
def jitted_backward(implementation, options):
    op = partial(lora_matmul_backward, implementation=implementation)
    return jax.jit(op, static_argnames="num_pages", compiler_options=dict(options))


with_shared = jax.jit(LoraPlan.with_shared, static_argnames="num_rows", compiler_options=quick.OPTIONS)


def call(implementation, x_TD, a_PRD, members, plan):
    return np.asarray(jitted(implementation)(x_TD, a_PRD, members, plan))


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_row_goes_through_its_own_adapter(implementation, case):
    x_TD, a_PRD, members, plan = case.make()
    out = call(implementation, x_TD, a_PRD, members, plan)
    expected = one_by_one(case, x_TD, a_PRD, members)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert (out[case.adapter_rows() < 0] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_span_by_span_it_is_the_same(case, monkeypatch):
    """What XLA runs where it is no CPU."""
    monkeypatch.setattr(xla.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    x_TD, a_PRD, members, plan = case.make()
    out = jax.jit(xla.lora_matmul, compiler_options=quick.OPTIONS)(x_TD, a_PRD, members, plan)
    np.testing.assert_allclose(out, one_by_one(case, x_TD, a_PRD, members), atol=1e-5)


@pytest.mark.parametrize(
    "case", [dataclasses.replace(MIXED, chunks=()), dataclasses.replace(MIXED, singles=())], ids=str
)
def test_no_operand_is_empty(case):
    """XLA's partitioner (Shardy, of jax 0.11.2) crashes on an empty operand of a program that is split over devices."""
    program = jax.make_jaxpr(partial(lora_matmul, implementation="xla"))(*case.make())
    assert "i32[0]" not in str(program)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_keep_their_precision(implementation, dtype):
    with jax.enable_x64(dtype == "float64"):
        x_TD, a_PRD, members, plan = MIXED.make(np.dtype(getattr(ml_dtypes, dtype, dtype)))
        out = call(implementation, x_TD, a_PRD, members, plan)
    assert out.dtype == x_TD.dtype
    expected = one_by_one(MIXED, x_TD, a_PRD, members)
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", NAMES)
def test_an_adapter_of_nan_reaches_only_its_own_rows(implementation):
    x_TD, a_PRD, members, plan = MIXED.make()
    clean = call(implementation, x_TD, a_PRD, members, plan)
    sick = MIXED.pages()[1][0]
    out = call(implementation, x_TD, a_PRD.at[sick].set(jnp.nan), (members[0].at[sick].set(jnp.inf),), plan)
    mine_T = MIXED.adapter_rows() == 1
    assert np.isnan(out[mine_T]).all()
    np.testing.assert_array_equal(out[~mine_T], clean[~mine_T])


@pytest.mark.parametrize("implementation", NAMES)
def test_a_row_of_nan_stays_alone(implementation):
    x_TD, a_PRD, members, plan = MIXED.make()
    clean = call(implementation, x_TD, a_PRD, members, plan)
    sick = int(np.flatnonzero(MIXED.adapter_rows() == 1)[0])
    out = call(implementation, x_TD.at[sick].set(jnp.nan), a_PRD, members, plan)
    others = np.arange(len(out)) != sick
    assert np.isnan(out[sick]).all()
    np.testing.assert_array_equal(out[others], clean[others])


@pytest.mark.parametrize("implementation", NAMES)
def test_an_adapter_of_zeros_adds_exact_zeros(implementation):
    x_TD, a_PRD, members, plan = MIXED.make()
    pages = jnp.asarray(MIXED.pages()[1])
    out = call(implementation, x_TD, a_PRD, (members[0].at[pages].set(0),), plan)
    assert (out[MIXED.adapter_rows() == 1] == 0).all()


@pytest.mark.parametrize("case", [c for c in CASES if c.ranks], ids=str)
def test_a_rows_bits_depend_on_nothing_but_itself(case):
    """Each adapter alone, its rows in another order and another kind of block, its pages elsewhere in a larger bank:
    the same bits."""
    x_TD, a_PRD, members, plan = jax.tree.map(np.asarray, case.make())
    together, adapter_T = call("xla", x_TD, a_PRD, members, plan), case.adapter_rows()
    for adapter, pages in list(enumerate(case.pages()))[-2:]:
        rows = np.flatnonzero(adapter_T == adapter)[::-1]
        if not len(rows):
            continue
        alone = dataclasses.replace(
            case, ranks=(case.ranks[adapter],), chunks=(), singles=(BASE, *[0] * len(rows)), spare_items=20
        )
        kept = [0, *pages, *pages]
        a, b = a_PRD[kept], tuple(member[kept] for member in members)
        out = call("xla", x_TD[[0, *rows]], a, b, alone.plan())
        np.testing.assert_array_equal(out[1:], together[rows])


def test_a_larger_rank_padded_with_zeros_changes_no_bit():
    x_TD, a_PRD, members, plan = MIXED.make()
    page = MIXED.pages()[0][0]  # rank 4: ranks 4 to 15 are zeros already; give them an A without a B
    out = call("xla", x_TD, a_PRD.at[page, 4:].set(1.0), members, plan)
    np.testing.assert_array_equal(out, call("xla", x_TD, a_PRD, members, plan))


@pytest.mark.parametrize("implementation", NAMES)
def test_the_result_is_added_to_what_is_given(implementation):
    x_TD, a_PRD, members, plan = MIXED.make()
    base_TE = jnp.ones((MIXED.num_rows, sum(MIXED.dims_out)))
    out = jitted(implementation)(x_TD, a_PRD, members, plan, add_to=base_TE)
    np.testing.assert_allclose(out, base_TE + call(implementation, x_TD, a_PRD, members, plan), rtol=1e-5, atol=1e-6)
    alone_T = MIXED.adapter_rows() == BASE
    assert alone_T.any()
    np.testing.assert_array_equal(out[alone_T], base_TE[alone_T])


@pytest.mark.parametrize("case", [MIXED, LINEAR_CASES[1]], ids=str)
def test_a_linear_layer_is_its_base_and_each_rows_own_adapter(case):
    x_TD, *adapters = case.make()
    w_ED = case.make_base()
    out, *others = (lora_linear(x_TD, w_ED, *adapters, implementation=name) for name in (None, *NAMES))
    np.testing.assert_array_equal(out, lora_matmul(x_TD, *adapters, add_to=matmul(x_TD, w_ED)))
    expected = np.asarray(x_TD, np.float64) @ np.asarray(w_ED, np.float64).T
    expected += one_by_one(case, x_TD, *adapters[:2])
    for got in (out, *others):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def backward(implementation, case, make=lambda *args: args, lanes=None, options=(), **pages):
    x_WD, a_PRD, members, plan = make(*case.make())
    lane_J, lanes = jnp.asarray(case.lane_items()), lanes or case.make_lanes()
    op = jitted_backward(implementation, options)
    return op(x_WD, case.make_cotangent(), a_PRD, members, plan, lane_J, lanes, add_to=2 * x_WD, **pages)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_gradients_are_those_of_the_adapters_one_by_one(implementation, case):
    d_x_WD, lanes = backward(implementation, case, options=tuple(quick.OPTIONS.items()))
    expected_WD, *expected = one_by_one_backward(case, *case.make()[:3], case.make_cotangent(), case.make_lanes())
    np.testing.assert_allclose(d_x_WD, 2 * case.make()[0] + expected_WD, atol=1e-4)
    for sums, wanted in zip(jax.tree.leaves(lanes), expected, strict=True):
        np.testing.assert_allclose(sums, wanted, atol=1e-4)


def test_a_lanes_bits_do_not_depend_on_how_its_items_were_dealt_to_calls():
    at_once = backward("xla", LONG)[1]
    lanes = LONG.make_lanes()
    for start, stop in ((0, 3), (3, 4), (4, 100)):
        lanes = backward("xla", LONG, lambda *args, span=(start, stop): only(span, *args), lanes=lanes)[1]
    jax.tree.map(np.testing.assert_array_equal, lanes, at_once)


@pytest.mark.parametrize(
    ("implementation", "case"), [("xla", LONG), ("xla", BACKWARD_CASES[0]), ("reference", BACKWARD_CASES[0])], ids=str
)
def test_a_layer_adds_to_its_own_pages_in_the_lanes_of_all_layers(implementation, case):
    d_x_WD, lanes = backward(implementation, case)
    pages = {"first_page": jnp.int32(PAGES_BEFORE), "num_pages": case.num_lane_pages}
    out = backward(implementation, case, lanes=among_others(case.make_lanes()), **pages)
    jax.tree.map(np.testing.assert_array_equal, out, (d_x_WD, among_others(lanes)))


SHARED_CASES = [
    LoraCase(name="one-job", ranks=(16, 4), chunks=((0, 77), (0, 3)), dim_in=176, dims_out=(64, 36), row_block=16),
    LoraCase(name="three-pages", ranks=(40, 4), chunks=((0, 70), (BASE, 5), (0, 33)), dim_in=100, row_block=16),
    LoraCase(name="prompt-and-decodes", ranks=(16, 4), chunks=((0, 90),), singles=(1, 1, BASE, 0), dims_out=(40, 8)),
    LoraCase(name="decodes", ranks=(20, 3), singles=(0,) * 21, dims_out=(24, 8)),
]


@pytest.mark.parametrize("case", SHARED_CASES, ids=str)
def test_rows_that_share_an_adapter_have_the_same_bits_item_by_item(case):
    x_TD, a_PRD, members, plan = case.make()
    shared = with_shared(plan, num_rows=case.num_rows)
    assert int(shared.shared.count) == -(-case.ranks[0] // PAGE_RANK)
    apart = dataclasses.replace(plan, shared=shared.shared._replace(count=jnp.int32(0)))

    def run(plan):
        out = [call("xla", x_TD, a_PRD, members, plan)]
        if not case.singles:
            out.append(backward("xla", case, lambda *args: (*args[:-1], plan)))
        return out

    jax.tree.map(np.testing.assert_array_equal, run(shared), run(apart))


@pytest.mark.parametrize(
    "case",
    [
        LoraCase(name="two-adapters", ranks=(16, 16), chunks=((0, 30), (1, 9))),
        LoraCase(name="as-many-pages", ranks=(32, 32), chunks=((0, 30), (1, 9))),
        LoraCase(name="mostly-base", ranks=(16,), chunks=((0, 8), (BASE, 80))),
        LoraCase(name="nobody", chunks=((BASE, 40),)),
        LoraCase(name="two-in-a-block", ranks=(16, 16), singles=(0, 1) * 8),
    ],
    ids=str,
)
def test_rows_that_do_not_share_an_adapter_are_told(case):
    assert int(with_shared(case.plan(), num_rows=case.num_rows).shared.count) == 0


def only(span, x_WD, a_PRD, members, plan):
    """A part of the items, whose rows are no items' in the other calls."""
    keep_J = (np.arange(plan.block_J.shape[0]) >= span[0]) & (np.arange(plan.block_J.shape[0]) < span[1])
    stop_J = jnp.where(keep_J, plan.stop_J, 0)
    return x_WD, a_PRD, members, dataclasses.replace(plan, stop_J=stop_J)


def test_an_unknown_implementation_is_refused_by_name():
    with pytest.raises(NoImplementation, match=r"no implementation 'cuda'.*reference.*xla"):
        lora_matmul(*MIXED.make(), implementation="cuda")


def test_names_of_cases_are_unique():
    names = [case.name for case in CASES + KERNEL_CASES + LINEAR_CASES + BENCH_CASES + LINEAR_BENCH_CASES]
    assert len(set(names)) == len(names)
