"""The Mosaic kernels against dense attention in float64: interpreted with race detection, and on a GPU.

Shapes: T rows, H query heads, K kv heads, C head dim, P pages, G tokens per page, B sequences, M pages per sequence.
"""

import dataclasses
import re
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import training
from dense_attention import backward_inputs, dense, dense_backward
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec
from mosaic_checks import OLD_JAX, ON_DEVICE, RACE, TOLERANCE, needs_mosaic

from pallas_kernels.dispatch import INTERPRETED, MOSAIC, NoImplementation, choose, explain
from pallas_kernels.ragged_paged_attention import (
    BACKWARD_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    ragged_paged_attention,
    ragged_paged_attention_backward,
)
from pallas_kernels.ragged_paged_attention.cases import KERNEL_CASES, AttentionCase

pytestmark = pytest.mark.usefixtures("no_races")
QUICK = KERNEL_CASES[:4]
SMALL = KERNEL_CASES[0]
FORWARD = [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow, id=c.name) for c in KERNEL_CASES]
BACKWARD = [
    pytest.param(dataclasses.replace(c, decodes=()), marks=() if c in QUICK else pytest.mark.slow, id=c.name)
    for c in KERNEL_CASES
    if c.chunks
]


@lru_cache
def jitted(op, **settings):
    return jax.jit(partial(op, **settings))


def near(got, expected, dtype="bfloat16"):
    expected = np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    scale = np.abs(expected[finite]).max(initial=1e-3)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=TOLERANCE[dtype] * scale, rtol=0)


def device_mesh(kind):
    return AbstractMesh(
        (1,), ("model",), abstract_device=AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    )


def facts(case, dtype="bfloat16", **more):
    q, k, _, layout = jax.eval_shape(partial(case.make, np.dtype(getattr(ml_dtypes, dtype, dtype))))
    return {"q_THC": q, "k_PKGC": k, "layout": layout, **more}


@needs_mosaic
def test_the_interpreter_reports_a_race(capsys):
    """Two warpgroups write the same shared memory and nobody waits: what the other tests' silence is worth."""
    from pallas_kernels import mosaic

    def race(x_ref, out_ref, *, shared_sm):
        shared_sm[...] = x_ref[...]
        out_ref[...] = shared_sm[...]

    vector = jax.ShapeDtypeStruct((128,), jnp.float32)
    scratch = {"shared_sm": mosaic.plgpu.SMEM(vector.shape, vector.dtype)}
    kernel = mosaic.kernel(race, out=vector, scratch=scratch, grid={"block": 1}, threads=2, interpret=True)
    try:
        jax.block_until_ready(jax.jit(kernel)(jnp.zeros(128)))
        said = capsys.readouterr().out
    except jax.errors.JaxRuntimeError as error:  # JAX from 0.12 on
        said = str(error)
    assert RACE in said


@needs_mosaic
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
@pytest.mark.parametrize("case", FORWARD)
def test_it_is_dense_attention_over_each_rows_own_pages(implementation, case):
    args = case.make(jnp.bfloat16)
    out, lse = jitted(ragged_paged_attention, **case.settings, implementation=implementation)(*args)
    expected_out, expected_lse = dense(case, *args)
    near(out, expected_out)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    padding_T = np.asarray(args[3].position_T) < 0
    assert (np.asarray(out)[padding_T] == 0).all()


@needs_mosaic
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
@pytest.mark.parametrize("case", BACKWARD)
def test_the_backward_is_that_of_dense_attention(implementation, case):
    args = backward_inputs(case, jnp.bfloat16)
    d_q, accumulators = jitted(ragged_paged_attention_backward, **case.settings, implementation=implementation)(*args)
    for got, expected in zip((d_q, *accumulators), dense_backward(case, *args), strict=True):
        near(got, expected)
    padding_T = np.asarray(args[6].position_T) < 0
    assert (np.asarray(d_q)[padding_T] == 0).all()


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
def test_float16_keeps_its_precision(implementation):
    args = SMALL.make(jnp.float16)
    out, _ = jitted(ragged_paged_attention, **SMALL.settings, implementation=implementation)(*args)
    near(out, dense(SMALL, *args)[0], "float16")
    case = dataclasses.replace(SMALL, decodes=())
    args = backward_inputs(case, jnp.float16)
    d_q, accumulators = jitted(ragged_paged_attention_backward, **case.settings, implementation=implementation)(*args)
    for got, expected in zip((d_q, *accumulators), dense_backward(case, *args), strict=True):
        near(got, expected, "float16")


@needs_mosaic
@pytest.mark.parametrize("implementation", [INTERPRETED, ON_DEVICE])
def test_what_lies_past_a_sequence_or_in_other_pages_changes_no_bit(implementation):
    """NaN in every place that no row may see; the backward's other pages stay as they are, and what lies past a
    sequence does whatever its gradients are."""
    q, k, v, layout = SMALL.make(jnp.bfloat16)
    unseen_PG = np.ones((k.shape[0], SMALL.page_size), bool)
    for sequence, length in enumerate(SMALL.lengths):
        position = np.arange(length)
        unseen_PG[layout.page_table_BM[sequence][position // SMALL.page_size], position % SMALL.page_size] = False
    sick = jnp.asarray(unseen_PG)[:, None, :, None]
    sick_k, sick_v = (jnp.where(sick, jnp.asarray(jnp.nan, x.dtype), x) for x in (k, v))
    attend = jitted(ragged_paged_attention, **SMALL.settings, implementation=implementation)
    for poisoned, clean in zip(attend(q, sick_k, sick_v, layout), attend(q, k, v, layout), strict=True):
        np.testing.assert_array_equal(poisoned, clean)

    case = dataclasses.replace(SMALL, decodes=())
    d_out, q, out, lse, k, v, layout, *sums = backward_inputs(case, jnp.bfloat16)
    seen_PG = np.zeros((k.shape[0], case.page_size), bool)
    position = np.arange(case.lengths[0])
    seen_PG[layout.page_table_BM[0][position // case.page_size], position % case.page_size] = True
    sick = ~jnp.asarray(seen_PG)[:, None, :, None]
    sick_k, sick_v = (jnp.where(sick, jnp.asarray(jnp.nan, x.dtype), x) for x in (k, v))
    pull = jitted(ragged_paged_attention_backward, **case.settings, implementation=implementation)
    poisoned = pull(d_out, q, out, lse, sick_k, sick_v, layout, *sums)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(poisoned))
    (d_k_before, _), acc_table = sums
    others = np.setdiff1d(np.arange(len(d_k_before)), acc_table)
    np.testing.assert_array_equal(poisoned[1][0][others], d_k_before[others])

    _, sick_sums = pull(d_out.at[0].set(jnp.nan), q, out, lse, k, v, layout, *sums)
    last_page, offset = divmod(case.lengths[0], case.page_size)
    for new, old in zip(sick_sums, sums[0], strict=True):
        assert not np.isfinite(new).all()
        page = acc_table[0, last_page]
        np.testing.assert_array_equal(new[page, :, offset:], old[page, :, offset:])


@needs_mosaic
@pytest.mark.slow
def test_an_engines_finetuning_step_goes_through_the_kernels(monkeypatch):
    """Two windows of a sequence, forward and backward: the losses and gradients of the XLA implementation."""
    for size in ("BLOCK", "W", "CHUNK"):
        monkeypatch.setattr(training, size, 64)

    def train(implementation):
        trainer = training.Trainer("llama", "bfloat16", "attention", lanes=1, pages=1, head_dim=64)
        trainer.spec = dataclasses.replace(trainer.spec, attention=implementation)
        rng = np.random.default_rng(0)
        adapter = training.random_adapter(trainer.config, rng)
        lane = trainer.lane(0, adapter)
        sequence = trainer.sequence(lane, rng.integers(1, trainer.config.vocab_size, 100), np.ones(100), 64, 0)
        trainer.train_on([sequence], rng)
        return sequence.losses[1:], trainer.gradients(lane, adapter)

    (losses, gradients), (expected_losses, expected_gradients) = train(INTERPRETED), train("xla")
    np.testing.assert_allclose(losses, expected_losses, atol=0.03)
    assert training.relative(gradients, expected_gradients) < 0.1


LLAMA_8B = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 64, "row_block": 64, "scale": 128**-0.5}
GEMMA_2 = {**LLAMA_8B, "num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "window": 4096, "softcap": 50.0}
PHI_3 = {**LLAMA_8B, "num_heads": 32, "num_kv_heads": 32, "head_dim": 96, "page_size": 16}
QWEN_2 = {**LLAMA_8B, "num_heads": 14, "num_kv_heads": 2, "head_dim": 64, "page_size": 128}
PRODUCTION = [
    AttentionCase(name=name, chunks=((3584, 512),), decodes=(1023,) * 64, **sizes)
    for name, sizes in {"llama-8b": LLAMA_8B, "gemma-2": GEMMA_2, "phi-3": PHI_3, "qwen-2": QWEN_2}.items()
]
ODD_ROWS = dataclasses.replace(SMALL, name="odd-rows")
LOWERED = [
    pytest.param(c, marks=pytest.mark.slow if i > 1 else (), id=c.name) for i, c in enumerate((ODD_ROWS, *PRODUCTION))
]


@needs_mosaic
@pytest.mark.parametrize("case", LOWERED)
def test_it_lowers_for_cuda_at_production_shapes_and_sums_in_place(case):
    def lowered(op, *args, **settings):
        forced = partial(op, **case.settings, implementation=MOSAIC)
        return jax.jit(forced, **settings).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    args = jax.eval_shape(partial(case.make, jnp.bfloat16))
    assert lowered(ragged_paged_attention, *args).count("@mosaic_gpu") == 3

    q, k, v, layout = jax.eval_shape(partial(dataclasses.replace(case, decodes=()).make, jnp.bfloat16))
    lse = jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
    sums = jax.ShapeDtypeStruct(k.shape, jnp.float32)
    args = q, q, q, lse, k, v, layout, (sums, sums), layout.page_table_BM
    text = lowered(ragged_paged_attention_backward, *args, donate_argnums=7)
    assert text.count("@mosaic_gpu") == 2
    assert text.count("output_operand_alias<") == 2  # dK and dV
    assert text.count("tf.aliasing_output") == 2


def test_a_hopper_gpu_gets_the_kernels_and_no_other_device():
    def chosen(kind):
        with jax.sharding.use_abstract_mesh(device_mesh(kind)):
            return [choose("op", ops, **facts(SMALL)).name for ops in (IMPLEMENTATIONS, BACKWARD_IMPLEMENTATIONS)]

    assert chosen("NVIDIA H200") == ["xla" if OLD_JAX else MOSAIC] * 2
    assert chosen("NVIDIA H100 80GB HBM3") == ["xla" if OLD_JAX else MOSAIC] * 2
    assert chosen("NVIDIA A100-SXM4-80GB") == ["xla"] * 2
    assert choose("op", IMPLEMENTATIONS, **facts(SMALL)).name == "xla"


def test_the_device_of_a_shard_map_decides():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    seen = []

    def attend(*args):
        seen.append(explain(IMPLEMENTATIONS, **facts(SMALL))[MOSAIC])
        return ragged_paged_attention(*args, **SMALL.settings)

    whole = PartitionSpec()
    jax.eval_shape(
        jax.shard_map(attend, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False), *SMALL.make(jnp.bfloat16)
    )
    assert re.search(r"need jax 0\.11\.2" if OLD_JAX else r"for Hopper GPUs .* this is for cpu \(cpu\)", seen[0])


@needs_mosaic
@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        ({}, "float32", r"dtype float32 is not one of \('bfloat16', 'float16'\)"),
        ({"head_dim": 80}, "bfloat16", r"head_dim 80 is not one of \(64, 96, 128, 256\)"),
        ({"page_size": 8}, "bfloat16", r"page size 8 is not one of \(16, 32, 64, 128\)"),
        ({"num_heads": 9, "num_kv_heads": 1}, "bfloat16", "9 query heads per kv head, the limit is 8"),
        ({"row_block": 16}, "bfloat16", "row_block 16 is not 64"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(change, dtype, reason):
    case = dataclasses.replace(SMALL, **change)
    with pytest.raises(NoImplementation, match=f"mosaic_interpreted refused: {reason}"):
        choose("op", IMPLEMENTATIONS, INTERPRETED, **facts(case, dtype))
    with jax.sharding.use_abstract_mesh(device_mesh("NVIDIA H200")):
        assert choose("op", IMPLEMENTATIONS, **facts(case, dtype)).name == "xla"
        assert re.match(reason, explain(IMPLEMENTATIONS, **facts(case, dtype))[MOSAIC] or "")


@needs_mosaic
def test_accumulators_and_pools_of_another_dtype_are_refused():
    known = facts(SMALL)
    pool = known["k_PKGC"]
    with pytest.raises(NoImplementation, match="K/V pool dtype float32 is not that of the queries, bfloat16"):
        choose("op", IMPLEMENTATIONS, INTERPRETED, **{**known, "k_PKGC": pool.update(dtype=jnp.float32)})
    sums = (pool, pool)
    with pytest.raises(NoImplementation, match="accumulator dtype bfloat16 is not float32"):
        choose("op", BACKWARD_IMPLEMENTATIONS, INTERPRETED, **known, accumulators=sums)


@pytest.mark.skipif(not OLD_JAX, reason="for JAX before the kernels")
def test_an_old_jax_is_named_in_the_refusal():
    needs = r"mosaic refused: .* need jax 0\.11\.2 or later, before 0\.13; this is " + re.escape(jax.__version__)
    with pytest.raises(NoImplementation, match=needs):
        ragged_paged_attention(*SMALL.make(jnp.bfloat16), **SMALL.settings, implementation=MOSAIC)
