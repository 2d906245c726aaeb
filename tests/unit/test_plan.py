"""What a plan reads out of compiled programs, and the plan of an engine on a described device."""

import dataclasses
import importlib.util

import jax
import pytest
import tiny_models
from typer.testing import CliRunner

from jaxserve.bench import ahead, hlo, plan
from jaxserve.cli.app import app
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.models.config import ModelConfig
from sharding import make_mesh

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_add (p0: f32[8], p1: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  ROOT %add = f32[8]{0} add(%p0, %p1)
}

%dynamic-slice-fusion (p0: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  ROOT %inner = f32[8]{0} custom-call(%p0), custom_call_target="mosaic_gpu_v2"
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%body (carry: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %carry = (s32[], bf16[64,128]{1,0}) parameter(0)
  %x = bf16[64,128]{1,0} get-tuple-element(%carry), index=1
  %kernel = bf16[64,128]{1,0} custom-call(%x), custom_call_target="mosaic_gpu_v2"
  %all-reduce-start = bf16[64,128]{1,0} all-reduce-start(%kernel), to_apply=%sum
  %all-reduce-done = bf16[64,128]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %tuple = (s32[], bf16[64,128]{1,0}) tuple(%n, %all-reduce-done)
}

%condition (carry.1: (s32[], bf16[64,128])) -> pred[] {
  %carry.1 = (s32[], bf16[64,128]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%n, %m), direction=LT
}

%branch_a (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %copy.2 = f32[8]{0} copy(%x.1)
}

%branch_b (x.2: f32[8]) -> f32[8] {
  ROOT %x.2 = f32[8]{0} parameter(0)
}

ENTRY %main (w: bf16[512,128], y: f32[8]) -> (bf16[64,128], f32[8]) {
  %w = bf16[512,128]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %copy.1 = bf16[512,128]{0,1} copy(%w)
  %gemm = (bf16[64,128]{1,0}, s8[1024]{0}) custom-call(%copy.1), custom_call_target="__cublas$gemm"
  %loop = (s32[], bf16[64,128]{1,0}) while(%start), condition=%condition, body=%body
  %fusion = f32[8]{0} fusion(%y, %y), kind=kLoop, calls=%fused_add
  %sliced = f32[8]{0} fusion(%y), kind=kCustom, calls=%dynamic-slice-fusion
  %chosen = f32[8]{0} conditional(%p, %y, %fusion), branch_computations={%branch_a, %branch_b}
  %all-gather = f32[16]{0} all-gather(%fusion), dimensions={0}
  ROOT %out = (bf16[64,128]{1,0}, f32[8]{0}) tuple(%x.9, %chosen)
}
"""


def test_more_devices_than_kv_heads_are_refused_where_jobs_are_asked_for():
    model = ModelConfig.from_dict(tiny_models.config_dict("llama", num_attention_heads=8, num_key_value_heads=2))
    options = EngineConfig(enable_lora=True, max_finetune_jobs=1, tensor_parallel=4)
    with pytest.raises(InvalidRequest, match="finetuning needs tensor_parallel at most num_key_value_heads 2; it is 4"):
        plan.plan(model, "bfloat16", options, "h200")


def test_what_runs_is_counted_and_what_is_fused_is_not():
    found = hlo.kernels(PROGRAM)
    assert found == {"Pallas": 2, "matrix product": 1, "fusion": 1, "copy": 2, "compare": 1}
    assert hlo.collectives(PROGRAM) == {"all-reduce": 1, "all-gather": 1}


def test_copies_of_the_arrays_asked_for_are_found():
    assert hlo.copies(PROGRAM, [("bfloat16", (512, 128)), ("bfloat16", (64, 128))]) == {"bf16[512,128]": 1}
    assert not hlo.copies(PROGRAM, [("bfloat16", (64, 128))])


def test_what_ptxas_says_is_read(tmp_path):
    said = "ptxas info : 0 bytes stack frame, {} bytes spill stores, {} bytes spill loads\nUsed {} registers, used 2"
    for index, numbers in enumerate(((8, 16, 168), (0, 0, 104), (0, 0, 104))):
        (tmp_path / f"decode_{index}.ptxas").write_text(said.format(*numbers))
        (tmp_path / f"decode_{index}.resources.txt").write_text("Resources(smem_scratch_bytes=73728, x=0)")
    found = hlo.resources(tmp_path)
    assert [(k.name, k.registers, k.spill_bytes, k.shared_bytes) for k in found] == [
        ("decode", 168, 24, 73728), ("decode", 104, 0, 73728),
    ]  # fmt: skip


@pytest.fixture
def model():
    return ModelConfig.from_dict(tiny_models.config_dict("llama", num_hidden_layers=1))


OPTIONS = EngineConfig(
    max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64, block_size=16, enable_lora=False, dtype="auto"
)


def test_a_plan_adds_up(model, monkeypatch):
    monkeypatch.setattr(ahead, "mesh_of", lambda device, tensor_parallel: make_mesh(tensor_parallel))
    monkeypatch.setattr(plan, "_kernels", lambda *_: ())  # a CPU has none
    result = plan.plan(model, "float32", OPTIONS, "h200")
    params, state, _ = ahead.abstract_arguments(
        plan._sized(OPTIONS.model_copy(update={"dtype": "float32"}), model, make_mesh(1), 20 * 10**9),
        model,
        make_mesh(1),
        None,
    )
    memory = result["memory_bytes"]
    assert memory["weights"] == sum(4 * x.size for x in jax.tree.leaves(params))
    assert memory["kv_pool"] == sum(x.size * x.dtype.itemsize for layer in state.kv for x in layer)
    assert sum(memory.values()) == ahead.local_bytes((params, state))
    assert result["kv_tokens"] == 4 * 64  # every sequence at full length
    assert result["kv_tokens_that_fit"] > 10**6
    assert result["fits"]
    assert [(s["gradient_rows"], s["chunk_rows"], s["decode_rows"]) for s in result["steps"]] == [(0, 0, 4), (0, 64, 4)]
    for step in result["steps"]:
        assert not step["collectives"]
        assert 0 < step["floor_seconds"] < step["expected_seconds"]
    assert any("fits" in line for line in plan.lines(result))


def test_a_model_that_is_too_large_is_refused_by_what_is_left(model):
    large = dataclasses.replace(model, vocab_size=10**9)
    with pytest.raises(ConfigError, match=r"1\.0 GB of the device may be used; .* room for 0 KV pages"):
        plan._sized(OPTIONS.model_copy(update={"dtype": "float32"}), large, make_mesh(1), 10**9)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the compiler is here")
def test_without_the_compiler_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxserve.bench.environment.prepare_environment", lambda: None)  # of another process
    path = tiny_models.build(tmp_path / "m", "llama")
    result = CliRunner().invoke(app, ["plan", str(path), "--max-model-len", "64"])
    assert isinstance(result.exception, ConfigError)
    assert "cuda13" in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the compiler of jax[cuda13]")
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_plan_for_an_h200_copies_nothing_and_adapters_add_no_collective(model, tensor_parallel):
    sizes = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    model = ModelConfig.from_dict(tiny_models.config_dict("llama", num_hidden_layers=2, **sizes))
    options = OPTIONS.model_copy(update={"tensor_parallel": tensor_parallel, "dtype": "bfloat16", "block_size": 64})
    bare = plan.plan(model, "bfloat16", options, "h200")
    full = plan.plan(model, "bfloat16", options.model_copy(update={"enable_lora": True, "max_lora_rank": 16}), "h200")
    for one, other in zip(bare["steps"], full["steps"], strict=False):
        assert one["collectives"] == other["collectives"]
    assert not any(step["copies"] for step in (*bare["steps"], *full["steps"]))
    assert any(kernel["name"].startswith("attention") for kernel in full["kernels"])
    assert all(kernel["spill_bytes"] == 0 for kernel in full["kernels"])
