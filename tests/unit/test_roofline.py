"""The roofline's arithmetic against the arrays of the engine, and against counting one by one."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.bench import roofline
from jaxserve.bench.roofline import (
    ALL_LINEAR,
    DEVICES,
    EXPECTED,
    Segment,
    StepClock,
    StepLoad,
    Steps,
    finetune_bytes,
    ideal_decode_seconds,
    kv_bytes,
    linear_params,
    matmul_params,
    seconds,
    step_work,
    train_flops,
    weight_bytes,
)
from jaxserve.kvcache.pool import page_bytes
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import param_specs
from pallas_kernels.lora_matmul import PAGE_RANK

MODELS = Path(__file__).parents[2] / "configs" / "models"
H200 = DEVICES["h200"]


def model(name):
    return ModelConfig.from_dict(json.loads((MODELS / name / "config.json").read_text()))


LLAMA, QWEN_32B = model("llama-3.1-8b"), model("qwen2.5-32b")
EVERYONE = StepLoad(
    decodes=[100, 2000, 17], chunks=[Segment(70, 30), Segment(5)], grads=[Segment(128, 256)], adapters=[16, 40]
)


def total(work, field):
    return sum(getattr(part, field) for part in work)


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(("rows", "start"), [(1, 0), (1, 50), (9, 0), (9, 4), (30, 33), (3, 6)])
def test_keys_are_counted_row_by_row(rows, start, window):
    seen = [set(range(max(0, p + 1 - (window or p + 1)), p + 1)) for p in range(start, start + rows)]
    assert Segment(rows, start).keys(window) == sum(map(len, seen))
    assert Segment(rows, start).keys_read(window) == len(set().union(*seen))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("config", [LLAMA, QWEN_32B], ids=lambda m: m.model_type)
def test_bytes_are_those_of_the_engines_arrays(config, shards):
    specs = jax.tree.leaves(param_specs(config, shards), is_leaf=lambda x: hasattr(x, "shape"))
    exact = sum(int(np.prod(spec.shape)) for spec in specs) * 2 / shards
    assert weight_bytes(config, 2, shards) == pytest.approx(exact, rel=1e-3)
    assert kv_bytes(config, 2, shards) * 64 * shards == page_bytes(config, 64, shards, "bfloat16")
    assert finetune_bytes(config, 2, shards) == kv_bytes(config, 2, shards) * 3  # float32 is twice as wide
    assert roofline.PAGE_RANK == PAGE_RANK


def test_published_sizes():
    assert matmul_params(LLAMA) == 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    assert kv_bytes(LLAMA) == 131_072
    assert train_flops(LLAMA) == 4 * matmul_params(LLAMA)
    assert ideal_decode_seconds(LLAMA, [0], H200) == (matmul_params(LLAMA) * 2 + 131_072) / 4.8e12


def test_a_token_costs_two_flops_per_weight_and_a_trained_one_four():
    decode = step_work(LLAMA, StepLoad(decodes=[0]))
    assert total(decode, "flops") == pytest.approx(2 * matmul_params(LLAMA), rel=1e-3)
    load = StepLoad(grads=[Segment(1024)])
    for remat, linears in {"none": 2, "elementwise": 2, "attention": 3, "full": 3, None: 1}.items():
        work = step_work(LLAMA, load, remat=remat)
        flops = sum(part.flops for part in work if part.name.startswith("linear"))
        assert flops == linears * 2 * 1024 * linear_params(LLAMA)


def test_a_decode_steps_floor_is_its_weights_and_keys():
    contexts = [1023] * 64
    work = [part for part in step_work(LLAMA, StepLoad(decodes=contexts)) if "between" not in part.name]
    assert seconds(work, H200) == pytest.approx(ideal_decode_seconds(LLAMA, contexts, H200), rel=0.05)


def test_devices_share_the_work_and_pay_for_it():
    alone, shared = step_work(QWEN_32B, EVERYONE), step_work(QWEN_32B, EVERYONE, tensor_parallel=4)
    assert total(alone, "link_bytes") == 0
    assert total(shared, "link_bytes") > 0
    assert total(shared, "flops") == pytest.approx(total(alone, "flops") / 4, rel=0.02)
    assert seconds(shared, H200) < seconds(alone, H200)


def test_more_work_takes_longer_and_real_devices_are_slower_than_their_data_sheet():
    base = StepLoad(decodes=[500] * 8, grads=[Segment(256)], adapters=[16])
    changes = [
        {"decodes": [500] * 9},
        {"decodes": [501] * 8},
        {"chunks": [Segment(16)]},
        {"grads": [Segment(256, 64)]},
        {"adapters": [16, 16]},
        {"adapters": [17]},
        {"drawn": 9},
    ]
    for remat in ("none", "elementwise", "attention", "full"):
        before = seconds(step_work(LLAMA, base, remat=remat), H200)
        assert seconds(step_work(LLAMA, base, remat=remat), H200, EXPECTED) > before
        for change in changes:
            work = step_work(LLAMA, dataclasses.replace(base, **change), remat=remat)
            assert seconds(work, H200) > before, change


def test_a_sliding_window_bounds_what_attention_reads():
    layers = tuple(dataclasses.replace(layer, window=128) for layer in LLAMA.layers)
    windowed = dataclasses.replace(LLAMA, layers=layers)
    far, near = (step_work(windowed, StepLoad(decodes=[context])) for context in (100_000, 127))
    assert total(far, "bytes") == total(near, "bytes")


def test_an_empty_step_is_nothing():
    assert step_work(LLAMA, StepLoad()) == ()


def test_the_roofline_needs_no_jax():
    script = "import sys, jaxserve.bench.roofline; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_adapters_cost_what_the_layers_they_change_cost():
    def cost(targets):
        load = StepLoad(decodes=[10] * 4, grads=[Segment(128)], adapters=[16], targets=targets)
        parts = [part for part in step_work(LLAMA, load) if part.name.startswith("adapters")]
        return sorted(parts, key=lambda part: part.name)

    everything = cost(ALL_LINEAR)
    assert step_work(LLAMA, StepLoad(decodes=[10] * 4, grads=[Segment(128)], adapters=[16])) == step_work(
        LLAMA, StepLoad(decodes=[10] * 4, grads=[Segment(128)], adapters=[16], targets=ALL_LINEAR)
    )
    for whole, parts in zip(everything, zip(*(cost([member]) for member in ALL_LINEAR), strict=True), strict=True):
        assert whole.flops == pytest.approx(sum(part.flops for part in parts))
    rank, (inputs, outs) = 16, (LLAMA.intermediate_size, LLAMA.hidden_size)
    assert cost(["down_proj"])[0].flops == 2 * 132 * rank * (inputs + outs) * LLAMA.num_layers


@pytest.mark.parametrize("remat", ["none", "elementwise", "attention", "full", None])
def test_a_clock_tells_the_seconds_of_the_parts_to_the_last_bit(remat):
    clock = StepClock(Steps(QWEN_32B, tensor_parallel=4, remat=remat), H200, EXPECTED)
    loads = [EVERYONE, StepLoad(decodes=[5] * 3), dataclasses.replace(EVERYONE, stashed_rows=30), StepLoad()]
    for load in loads * 2:  # the second time it knows them
        work = step_work(QWEN_32B, load, tensor_parallel=4, remat=remat)
        assert clock.seconds(load) == seconds(work, H200, EXPECTED)
