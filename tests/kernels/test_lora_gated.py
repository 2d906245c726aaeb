"""Gate and up with their adapters, gated and written to blocks: the whole against the adapters one by one in float64.

Shapes: T rows, F columns of gate and of up, E = 2F of both, S blocks of the pool, Q rows per block.
"""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from mosaic_checks import ON_DEVICE, TOLERANCE, needs_mosaic
from one_by_one import one_by_one

from pallas_kernels.dispatch import INTERPRETED, MOSAIC, explain
from pallas_kernels.gating import ACTIVATIONS, SLOPES, gated
from pallas_kernels.lora_gated import IMPLEMENTATIONS, LINEAR_IMPLEMENTATIONS, lora_gated, lora_gated_linear
from pallas_kernels.lora_gated.cases import BENCH_CASES, CASES, LINEAR_BENCH_CASES, LINEAR_CASES, LoraGatedCase
from pallas_kernels.lora_matmul import facts_of
from pallas_kernels.lora_matmul.cases import BASE

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("no_races")]
CASE = {str(case): case for case in CASES}
KERNELS = [pytest.param(INTERPRETED, marks=needs_mosaic), ON_DEVICE]


@lru_cache
def jitted(implementation, activation):
    return jax.jit(partial(lora_gated, activation=activation, implementation=implementation))


@lru_cache
def run_case(implementation, case):
    return jitted(implementation, case.activation)(*case.make(jnp.bfloat16))


def gated_by_hand(case, y_TE):
    gate_TF, up_TF = np.split(y_TE, 2, axis=1)
    inner_TF = gate_TF if case.activation == "silu" else (8 / np.pi) ** 0.5 * (gate_TF + 0.044715 * gate_TF**3)
    return gate_TF / (1 + np.exp(-inner_TF)) * up_TF


def by_hand(case, args):
    gate_up_TE, x_TD, a_PRD, members, _, pool_SQE, block_N = args
    y_TE = np.asarray(gate_up_TE, np.float64) + one_by_one(case.adapters, x_TD, a_PRD, members)
    pool, Q = np.asarray(pool_SQE, np.float64), pool_SQE.shape[1]
    for n, place in enumerate(block_N):
        if place < len(pool):
            pool[place] = y_TE[n * Q : (n + 1) * Q]
    return gated_by_hand(case, y_TE), pool


def near(got, expected):
    atol = TOLERANCE["bfloat16"] * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("implementation", ["separate", "reference", *KERNELS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_adapted_gated_and_written_to_their_places(implementation, case):
    args = case.make(jnp.bfloat16)
    act_TF, pool_SQE = run_case(implementation, case)
    for got, expected in zip((act_TF, pool_SQE), by_hand(case, args), strict=True):
        near(got, expected)
    before_SQE, block_N = args[-2:]
    others = np.setdiff1d(np.arange(case.num_blocks), block_N)
    np.testing.assert_array_equal(pool_SQE[others], before_SQE[others])
    for n, place in enumerate(block_N[: len(block_N) - case.padding]):  # what is there is what was gated, rounded
        expected = np.asarray(gated(pool_SQE[place], case.activation), np.float64)
        rows = slice(n * case.adapters.row_block, (n + 1) * case.adapters.row_block)
        np.testing.assert_allclose(np.asarray(act_TF[rows], np.float64), expected, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("implementation", KERNELS)
def test_nan_in_an_adapter_or_in_the_pool_reaches_nothing_else(implementation):
    case = CASE["mixed"]
    gate_up_TE, x_TD, a_PRD, members, plan, pool_SQE, block_N = case.make(jnp.bfloat16)
    clean_TF, clean_SQE = run_case(implementation, case)
    page, sick = case.adapters.pages()[1][0], jnp.full_like(pool_SQE, jnp.nan)
    members = tuple(b.at[page].set(jnp.inf) for b in members)
    args = gate_up_TE, x_TD, a_PRD.at[page].set(jnp.nan), members, plan, sick, block_N
    act_TF, pool_SQE = jitted(implementation, case.activation)(*args)
    mine_T = case.adapters.adapter_rows() == 1
    assert np.isnan(np.asarray(act_TF[mine_T], np.float32)).all()
    np.testing.assert_array_equal(act_TF[~mine_T], clean_TF[~mine_T])
    written = block_N[0]
    first_Q = mine_T[: case.adapters.row_block]
    np.testing.assert_array_equal(pool_SQE[written][~first_Q], clean_SQE[written][~first_Q])


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_without_a_pool_rows_are_gated_alike(implementation):
    case = CASE["mixed"]
    *args, _, _ = case.make(jnp.bfloat16)
    act_TF, pool = jitted(implementation, case.activation)(*args)
    assert pool is None
    np.testing.assert_array_equal(act_TF, run_case(implementation, case)[0])


@pytest.mark.parametrize("implementation", KERNELS)
def test_an_activations_small_values_are_right_too(implementation):
    case = dataclasses.replace(CASE["one-item"], activation="gelu_tanh")
    nobody = dataclasses.replace(case, adapters=dataclasses.replace(case.adapters, chunks=((BASE, 64),)))
    gate_up_TE, *rest = nobody.make(jnp.bfloat16)
    gate_TF = jnp.linspace(-4, 0, gate_up_TE.size // 2, dtype=jnp.float32).astype(jnp.bfloat16).reshape(64, 64)
    args = jnp.concatenate([gate_TF, jnp.ones_like(gate_TF)], axis=1), *rest
    act_TF, _ = jitted(implementation, case.activation)(*args)
    np.testing.assert_allclose(np.asarray(act_TF, np.float64), by_hand(nobody, args)[0], rtol=2**-7)


# with the base product


def run_linear(implementation, case, change=lambda *args: args):
    op = jax.jit(partial(lora_gated_linear, activation=case.activation, implementation=implementation))
    return op(*change(*case.adapters.make_linear(jnp.bfloat16)))


@pytest.mark.parametrize("implementation", ["separate", "reference", *KERNELS])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_few_rows_are_multiplied_adapted_and_gated(implementation, case, monkeypatch):
    monkeypatch.setattr("pallas_kernels.lora_matmul.mosaic_linear.num_cores", lambda: 3)  # shares of several steps
    x_TD, w_ED, a_PRD, members, _ = case.adapters.make_linear(jnp.bfloat16)
    base_TE = np.asarray(x_TD, np.float64) @ np.asarray(w_ED, np.float64).T
    expected_TF = gated_by_hand(case, base_TE + one_by_one(case.adapters, x_TD, a_PRD, members))
    near(run_linear(implementation, case), expected_TF)


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_row_and_an_adapter_of_nan_reach_no_other_of_few_rows(implementation):
    case = LINEAR_CASES[1]
    adapter_T = case.adapters.adapter_rows()
    page, padding = case.adapters.pages()[1][0], int(np.flatnonzero(adapter_T == BASE)[0])

    def sick(x_TD, w_ED, a_PRD, members, plan):
        bad = tuple(b.at[page].set(jnp.inf) for b in members)
        return x_TD.at[padding].set(jnp.nan), w_ED, a_PRD.at[page].set(jnp.nan), bad, plan

    clean, out = run_linear(implementation, case), run_linear(implementation, case, sick)
    mine_T = (adapter_T == 1) | (np.arange(len(adapter_T)) == padding)
    assert np.isnan(np.asarray(out[mine_T], np.float32)).all()
    np.testing.assert_array_equal(out[~mine_T], clean[~mine_T])


@needs_mosaic
def test_few_rows_lower_for_cuda_at_production_shapes():
    (case,) = LINEAR_BENCH_CASES
    (_, x, a, members, plan), *_ = shapes(case)
    w = jax.ShapeDtypeStruct((sum(case.adapters.dims_out), x.shape[1]), x.dtype)
    op = partial(lora_gated_linear, activation=case.activation, implementation=MOSAIC)
    text = jax.jit(op).trace(x, w, a, members, plan).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 2


def shapes(case: LoraGatedCase):
    """The arrays that ``case.make`` returns, without their values, and its plan."""
    adapters, shape = case.adapters, partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    T, E, pages = adapters.num_rows, sum(adapters.dims_out), adapters.pages()[-1].stop
    members = tuple(shape((pages, out, 16)) for out in adapters.dims_out)
    blocks = adapters.chunk_rows // adapters.row_block
    arrays = shape((T, E)), shape((T, adapters.dim_in)), shape((pages, 32, adapters.dim_in)), members, adapters.plan()
    return arrays, shape((case.num_blocks, adapters.row_block, E)), jax.ShapeDtypeStruct((blocks,), jnp.int32)


@needs_mosaic
@pytest.mark.parametrize("singles", [0, 64])
def test_it_lowers_for_cuda_at_production_shapes_and_writes_in_place(singles):
    (case,) = BENCH_CASES
    case = dataclasses.replace(case, adapters=dataclasses.replace(case.adapters, singles=(0,) * singles))
    arrays, pool, block_N = shapes(case)

    def op(pool, block_N, *arrays):
        return lora_gated(*arrays, pool, block_N, activation=case.activation, implementation=MOSAIC)

    traced = jax.jit(op, donate_argnums=0).trace(pool, block_N, *arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels, in_place = (4, 2) if singles else (2, 1)  # single rows' adapters go into the base's product
    assert text.count("@mosaic_gpu") == kernels
    assert text.count("output_operand_alias<") == in_place
    assert text.count("tf.aliasing_output") == 1


def test_the_kernel_knows_every_activation():
    assert SLOPES.keys() == ACTIVATIONS.keys()
    x = np.linspace(-8, 8, 101)
    for name, slope in SLOPES.items():
        expected = ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(x / (1 + np.exp(-slope(x) * x)), expected, atol=1e-5)


def make_facts(case: LoraGatedCase):
    (_, x, _, members, plan), pool, _ = shapes(case)
    return facts_of(x, members, plan) | {"activation": case.activation, "pool": pool}


@needs_mosaic
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"activation": "relu"}, "the kernel computes silu and gelu_tanh, not relu"),
        ({"pool": jax.ShapeDtypeStruct((1, 64, 128), jnp.float32)}, "the pool is float32 and x bfloat16"),
        ({"plan": dataclasses.replace(CASE["mixed"].adapters.plan(), chunk_rows=0)}, "row blocks, there are none"),
        ({"dims": (64, 96, 96)}, "multiples of 64, one is 96"),
    ],
    ids=str,
)
def test_a_refusal_says_what_the_kernel_cannot_take(changed, reason):
    assert_refused(IMPLEMENTATIONS, make_facts(CASE["mixed"]) | changed, reason)


@needs_mosaic
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"activation": "relu"}, "the kernel computes silu and gelu_tanh, not relu"),
        ({"plan": CASE["mixed"].adapters.plan()}, "the kernel takes single rows, 192 are in row blocks"),
        ({"num_rows": 136}, "the kernel takes at most 128 rows, there are 136"),
        ({"dims": (64, 96, 96)}, "multiples of 64, one is 96"),
    ],
    ids=str,
)
def test_a_refusal_says_what_the_kernel_of_few_rows_cannot_take(changed, reason):
    facts = make_facts(LINEAR_CASES[0]) | changed
    assert_refused(LINEAR_IMPLEMENTATIONS, {name: fact for name, fact in facts.items() if name != "pool"}, reason)


def assert_refused(implementations, facts, reason):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("model",), abstract_device=device)):
        found = explain(implementations, **facts)[MOSAIC]
    assert found is None if reason is None else reason in found
