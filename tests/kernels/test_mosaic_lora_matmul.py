"""The Mosaic kernels against the adapters one by one in float64: interpreted with race detection, and on a GPU.

Shapes: T rows, W gradient rows, D in, E out, P pages, R ranks per page, J items, Y lane pages.
"""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from mosaic_checks import OLD_JAX, ON_DEVICE, TOLERANCE, needs_mosaic
from one_by_one import PAGES_BEFORE, among_others, one_by_one, one_by_one_backward

from pallas_kernels.dispatch import INTERPRETED, MOSAIC, NoImplementation, choose, explain
from pallas_kernels.lora_matmul import (
    BACKWARD_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    LINEAR_IMPLEMENTATIONS,
    lora_linear,
    lora_matmul,
    lora_matmul_backward,
)
from pallas_kernels.lora_matmul.cases import BASE, BENCH_CASES, KERNEL_CASES, LINEAR_CASES, LoraCase

KERNEL = {case.name: case for case in KERNEL_CASES}
BENCH = {case.name: case for case in BENCH_CASES}
SINGLES, LONG = KERNEL["kernel-singles"], KERNEL["kernel-long"]
BACKWARD_CASES = [dataclasses.replace(case, singles=()) for case in KERNEL_CASES if case.chunks]
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("no_races")]


@lru_cache
def jitted(op, implementation):
    static = "num_pages" if op is lora_matmul_backward else None
    return jax.jit(partial(op, implementation=implementation), static_argnames=static)


def near(got, expected, dtype="bfloat16"):
    scale = np.abs(expected).max(initial=1e-3)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=TOLERANCE[dtype] * scale, rtol=0)


def make(case: LoraCase, dtype="bfloat16"):
    return case.make(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def base_of(case: LoraCase, dtype="bfloat16"):
    """What the product is added to."""
    values = np.random.default_rng(1).standard_normal((case.num_rows, sum(case.dims_out)))
    return jnp.asarray(values, np.dtype(getattr(ml_dtypes, dtype, dtype)))


def backward(implementation, case, dtype="bfloat16", change=lambda *args: args, lanes=None, **pages):
    x_WD, a_PRD, members, plan = change(*make(case, dtype))
    lane_J, lanes = jnp.asarray(case.lane_items()), lanes or case.make_lanes()
    op = jitted(lora_matmul_backward, implementation)
    return op(x_WD, case.make_cotangent(x_WD.dtype), a_PRD, members, plan, lane_J, lanes, add_to=x_WD, **pages)


@needs_mosaic
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_each_row_goes_through_its_own_adapter(implementation, case):
    x_TD, a_PRD, members, plan = make(case)
    base_TE = base_of(case)
    out = jitted(lora_matmul, implementation)(x_TD, a_PRD, members, plan, add_to=base_TE)
    near(out, np.asarray(base_TE, np.float64) + one_by_one(case, x_TD, a_PRD, members))
    bare_T = case.adapter_rows() == BASE
    np.testing.assert_array_equal(out[bare_T], base_TE[bare_T])


@needs_mosaic
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_gradients_are_those_of_the_adapters_one_by_one(implementation, case):
    d_x_WD, lanes = backward(implementation, case)
    x_WD, a_PRD, members, _ = make(case)
    expected_WD, *expected = one_by_one_backward(
        case, x_WD, a_PRD, members, case.make_cotangent(jnp.bfloat16), case.make_lanes()
    )
    near(d_x_WD, np.asarray(x_WD, np.float64) + expected_WD)
    for sums, wanted in zip(jax.tree.leaves(lanes), expected, strict=True):
        near(sums, wanted)


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
def test_float16_keeps_its_precision(implementation):
    case = dataclasses.replace(KERNEL["kernel-members"], singles=())
    x_TD, a_PRD, members, plan = make(case, "float16")
    out = jitted(lora_matmul, implementation)(x_TD, a_PRD, members, plan)
    near(out, one_by_one(case, x_TD, a_PRD, members), "float16")
    _, lanes = backward(implementation, case, "float16")
    _, *expected = one_by_one_backward(case, x_TD, a_PRD, members, case.make_cotangent(jnp.float16), case.make_lanes())
    for sums, wanted in zip(jax.tree.leaves(lanes), expected, strict=True):
        near(sums, wanted, "float16")


@needs_mosaic
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
@pytest.mark.parametrize("name", ["kernel-singles", "kernel-blocks"])
def test_an_adapter_of_nan_reaches_only_its_own_rows(implementation, name):
    case = KERNEL[name]
    x_TD, a_PRD, members, plan = make(case)
    op, sick = jitted(lora_matmul, implementation), case.pages()[1][0]
    clean = op(x_TD, a_PRD, members, plan)
    out = op(x_TD, a_PRD.at[sick].set(jnp.nan), tuple(b.at[sick].set(jnp.inf) for b in members), plan)
    mine_T = case.adapter_rows() == 1
    assert np.isnan(np.asarray(out[mine_T], np.float32)).all()
    np.testing.assert_array_equal(out[~mine_T], clean[~mine_T])


@needs_mosaic
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
def test_a_trained_adapter_of_nan_reaches_only_its_own_rows_and_lanes(implementation):
    page = LONG.pages()[1][0]
    lane = int(LONG.lane_items()[np.asarray(LONG.plan().page_J) == page][0])

    def sick(x_WD, a_PRD, members, plan):
        return x_WD, a_PRD.at[page].set(jnp.nan), tuple(b.at[page].set(jnp.nan) for b in members), plan

    clean, out = backward(implementation, LONG), backward(implementation, LONG, change=sick)
    mine_T, others = LONG.adapter_rows() == 1, np.arange(LONG.num_lane_pages) != lane
    assert np.isnan(np.asarray(out[0][mine_T], np.float32)).all()
    np.testing.assert_array_equal(out[0][~mine_T], clean[0][~mine_T])
    for sums, wanted in zip(jax.tree.leaves(out[1]), jax.tree.leaves(clean[1]), strict=True):
        assert np.isnan(sums[lane]).all()
        np.testing.assert_array_equal(sums[others], wanted[others])


@needs_mosaic
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
def test_a_row_of_nan_that_is_no_items_reaches_no_sum(implementation):
    padding = int(np.flatnonzero(LONG.adapter_rows() == BASE)[0])

    def sick(x_WD, a_PRD, members, plan):
        return x_WD.at[padding].set(jnp.nan), a_PRD, members, plan

    _, lanes = backward(implementation, LONG, change=sick)
    jax.tree.map(np.testing.assert_array_equal, lanes, backward(implementation, LONG)[1])


@needs_mosaic
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
def test_a_lanes_bits_do_not_depend_on_how_its_items_were_dealt_to_calls(implementation):
    x_WD, a_PRD, members, plan = make(LONG)
    d_y_WE, lane_J, lanes = LONG.make_cotangent(x_WD.dtype), jnp.asarray(LONG.lane_items()), LONG.make_lanes()
    for items in (slice(0, 5), slice(5, 6), slice(6, int(plan.num_items))):
        fields = {name: getattr(plan, name)[items] for name in ("block_J", "page_J", "first_J", "stop_J")}
        some = dataclasses.replace(plan, **fields, num_items=jnp.int32(items.stop - items.start))
        op = jitted(lora_matmul_backward, implementation)
        _, lanes = op(x_WD, d_y_WE, a_PRD, members, some, lane_J[items], lanes)
    jax.tree.map(np.testing.assert_array_equal, lanes, backward(implementation, LONG)[1])


@needs_mosaic
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
def test_a_layer_adds_to_its_own_pages_in_the_lanes_of_all_layers(implementation):
    d_x_WD, lanes = backward(implementation, LONG)
    pages = {"first_page": jnp.int32(PAGES_BEFORE), "num_pages": LONG.num_lane_pages}
    out = backward(implementation, LONG, lanes=among_others(LONG.make_lanes()), **pages)
    jax.tree.map(np.testing.assert_array_equal, out, (d_x_WD, among_others(lanes)))


# with the base product


@pytest.fixture
def few_cores(monkeypatch):
    """Shares of several steps, tiles of several workers."""
    monkeypatch.setattr("pallas_kernels.lora_matmul.mosaic_linear.num_cores", lambda: 3)


def linear(implementation, case, change=lambda *args: args):
    x_TD, a_PRD, members, plan = make(case)
    args = change(x_TD, case.make_base(x_TD.dtype), a_PRD, members, plan)
    return jitted(lora_linear, implementation)(*args)


@needs_mosaic
@pytest.mark.usefixtures("few_cores")
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_a_linear_layer_is_its_base_and_each_rows_own_adapter(implementation, case):
    x_TD, a_PRD, members, _ = make(case)
    base_TE = np.asarray(x_TD, np.float64) @ np.asarray(case.make_base(x_TD.dtype), np.float64).T
    near(linear(implementation, case), base_TE + one_by_one(case, x_TD, a_PRD, members))


@needs_mosaic
@pytest.mark.usefixtures("few_cores")
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
def test_a_row_and_an_adapter_of_nan_reach_no_other_row_of_a_linear_layer(implementation):
    case = LINEAR_CASES[1]
    page, padding = case.pages()[1][0], int(np.flatnonzero(case.adapter_rows() == BASE)[0])

    def sick(x_TD, w_ED, a_PRD, members, plan):
        bad = tuple(b.at[page].set(jnp.inf) for b in members)
        return x_TD.at[padding].set(jnp.nan), w_ED, a_PRD.at[page].set(jnp.nan), bad, plan

    clean, out = linear(implementation, case), linear(implementation, case, sick)
    mine_T = (case.adapter_rows() == 1) | (np.arange(case.num_rows) == padding)
    assert np.isnan(np.asarray(out[mine_T], np.float32)).all()
    np.testing.assert_array_equal(out[~mine_T], clean[~mine_T])


PRODUCTION = [
    BENCH["decode-64-of-32"],
    BENCH["decode-64-gate-up"],
    BENCH["decode-64-down"],
    BENCH["prefill-2048-of-4"],
    dataclasses.replace(
        BENCH["finetune-1024"], name="co-serving-1024", ranks=(16, 64), singles=tuple(np.repeat([0, 1], 32))
    ),
]


def shapes(case: LoraCase):
    """What ``case.make`` returns, and what the product is added to, without their values."""
    E, rank = sum(case.dims_out), 16 * len(case.dims_out)
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    num_pages = case.pages()[-1].stop
    members = tuple(shape((num_pages, out, 16)) for out in case.dims_out)
    return (
        shape((case.num_rows, case.dim_in)),
        shape((num_pages, rank, case.dim_in)),
        members,
        case.plan(),
        shape((case.num_rows, E)),
    )


@needs_mosaic
@pytest.mark.parametrize("case", PRODUCTION, ids=str)
def test_it_lowers_for_cuda_at_production_shapes_and_adds_in_place(case):
    x, a, members, plan, base = shapes(case)
    op = jax.jit(lambda base, *args: lora_matmul(*args, add_to=base, implementation=MOSAIC), donate_argnums=0)
    text = op.trace(base, x, a, members, plan).lower(lowering_platforms=("cuda",)).as_text()
    kinds = bool(case.chunks) + bool(case.singles)
    assert text.count("@mosaic_gpu") == 2 * kinds
    assert text.count("output_operand_alias<") == kinds
    assert text.count("tf.aliasing_output") == 1


@needs_mosaic
@pytest.mark.parametrize("case", [BENCH["decode-64-of-32"], BENCH["decode-64-down"]], ids=str)
def test_a_linear_layer_lowers_for_cuda_at_production_shapes(case):
    x, a, members, plan, _ = shapes(case)
    w = jax.ShapeDtypeStruct((sum(case.dims_out), case.dim_in), x.dtype)
    traced = jax.jit(partial(lora_linear, implementation=MOSAIC)).trace(x, w, a, members, plan)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 2
    assert "output_operand_alias<" not in text


@needs_mosaic
@pytest.mark.parametrize("dims", [(4096, 4096, 1024, 1024), (4096, 14336, 14336), (14336, 4096)], ids=str)
def test_the_backward_lowers_for_cuda_at_production_shapes_and_sums_in_place(dims):
    case = dataclasses.replace(BENCH["finetune-1024"], dim_in=dims[0], dims_out=dims[1:])
    x, a, members, plan, d_y = shapes(case)
    lanes = jax.eval_shape(case.make_lanes)
    lane_J = jax.ShapeDtypeStruct(plan.block_J.shape, jnp.int32)

    def op(lanes, d_x, *args):
        return lora_matmul_backward(*args, lanes, add_to=d_x, implementation=MOSAIC)

    traced = jax.jit(op, donate_argnums=(0, 1)).trace(lanes, x, x, d_y, a, members, plan, lane_J)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    sums = 1 + len(members)
    assert text.count("@mosaic_gpu") == 4
    assert text.count("output_operand_alias<") == 1 + sums
    assert text.count("tf.aliasing_output") == 1 + sums


# who gets the kernels


FACTS = {"dtype": jnp.dtype(jnp.bfloat16), "dims": (64, 64), "num_rows": LONG.num_rows, "plan": LONG.plan()}
LANES = jax.eval_shape(LONG.make_lanes)


def device_mesh(kind):
    return AbstractMesh(
        (1,), ("model",), abstract_device=AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    )


def test_a_hopper_gpu_gets_the_kernels_and_no_other_device():
    def chosen(kind):
        with jax.sharding.use_abstract_mesh(device_mesh(kind)):
            return [choose("op", ops, **FACTS, lanes=LANES).name for ops in (IMPLEMENTATIONS, BACKWARD_IMPLEMENTATIONS)]

    assert chosen("NVIDIA H200") == ["xla" if OLD_JAX else MOSAIC] * 2
    assert chosen("NVIDIA A100-SXM4-80GB") == ["xla"] * 2
    assert choose("op", IMPLEMENTATIONS, **FACTS).name == "xla"


@pytest.mark.skipif(not OLD_JAX, reason="about JAX before Mosaic kernels")
def test_an_older_jax_is_told_so():
    with pytest.raises(NoImplementation, match=r"need jax 0\.11\.2 or later, before 0\.13; this is"):
        lora_matmul(*make(SINGLES), implementation=MOSAIC)


@needs_mosaic
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": jnp.dtype(jnp.float32)}, "16-bit numbers, x is float32"),
        ({"dims": (128, 96)}, "multiples of 64, one is 96"),
        ({"dims": (128, 64, 64, 64, 64, 64)}, "at most 4 members, there are 5"),
        ({"num_rows": 12}, "a multiple of 8 rows, there are 12"),
        ({"plan": dataclasses.replace(LONG.plan(), row_block=16)}, "row blocks of 64 rows, these have 16"),
    ],
)
def test_a_refusal_says_what_the_kernel_cannot_take(changed, reason):
    with jax.sharding.use_abstract_mesh(device_mesh("NVIDIA H200")):
        assert reason in explain(IMPLEMENTATIONS, **FACTS | changed)[MOSAIC]
        assert choose("lora_matmul", IMPLEMENTATIONS, **FACTS | changed).name == "xla"


def test_few_single_rows_and_a_narrow_matrix_get_the_kernel_with_the_base_product():
    facts = FACTS | {"num_rows": 64, "plan": BENCH["decode-64-of-8"].plan()}
    narrow, wide = facts | {"dims": (4096, 6144)}, facts | {"dims": (4096, 14336, 14336)}

    def reason(facts):
        return explain(LINEAR_IMPLEMENTATIONS, **facts)[MOSAIC]

    with jax.sharding.use_abstract_mesh(device_mesh("NVIDIA H200")):
        assert choose("op", LINEAR_IMPLEMENTATIONS, **narrow).name == ("separate" if OLD_JAX else MOSAIC)
        assert choose("op", LINEAR_IMPLEMENTATIONS, **wide).name == "separate"
        if not OLD_JAX:
            assert reason(wide) == "XLA's product of 28672 outputs reads at full speed"
            assert reason(narrow | {"num_rows": 136}) == "the kernel takes at most 128 rows, there are 136"
            assert reason(FACTS) == f"the kernel takes single rows, {LONG.chunk_rows} are in row blocks"
            assert "16-bit numbers" in reason(narrow | {"dtype": jnp.dtype(jnp.float32)})
    assert choose("op", LINEAR_IMPLEMENTATIONS, **narrow).name == "separate"


@needs_mosaic
def test_sums_wider_than_float32_are_refused():
    lanes = (jax.ShapeDtypeStruct((1, 16, 64), jnp.float64), ())
    with jax.sharding.use_abstract_mesh(device_mesh("NVIDIA H200")):
        assert "the lanes are float64" in explain(BACKWARD_IMPLEMENTATIONS, **FACTS, lanes=lanes)[MOSAIC]
