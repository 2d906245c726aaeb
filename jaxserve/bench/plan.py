"""``jaxserve plan``: will it fit, how must it be set, and how long must a step take, before there is a GPU.

The engine's own programs are compiled for the device (``ahead``) and told about: memory by kind, tokens of K/V that
fit, kernels, collectives and copies, what each Pallas kernel needs, and the roofline's time.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax import tree

from jaxserve.bench import ahead, hlo, roofline
from jaxserve.bench.engine import model_path
from jaxserve.bench.processes import spawned
from jaxserve.config import Config, EngineConfig
from jaxserve.engine.activations import activation_bytes, stash_bytes
from jaxserve.engine.batch import DrawLayout
from jaxserve.engine.buckets import Bucket, Buckets
from jaxserve.engine.draw import Asks, DrawSpec
from jaxserve.engine.gradient import TrainShape, stash_alone
from jaxserve.engine.sizes import STEP_BYTES, core_config
from jaxserve.engine.specs import CoreConfig, step_spec, train_shape
from jaxserve.errors import ConfigError
from jaxserve.kvcache.pool import page_bytes
from jaxserve.models.config import ModelConfig
from jaxserve.models.loader import load_config, stored_dtype
from jaxserve.models.params import can_finetune, check_finetuning_tp, check_tp

GB = 1e9
LARGE = 1 << 20  # bytes: copies of anything smaller are not looked for


def main(config: Config, device: str, layers: int | None, context: int, every_bucket: bool, as_json: bool) -> int:
    """Compiles, and prints what was found."""
    path = model_path(config)
    result = plan(load_config(path), stored_dtype(path), config.engine_config(), device, layers, context, every_bucket)
    print(json.dumps(result, indent=1) if as_json else "\n".join(lines(result)))
    return 0 if result["fits"] else 1


def plan(
    model: ModelConfig,
    stored: str,
    options: EngineConfig,
    device: str,
    layers: int | None = None,
    context: int = 1024,
    every_bucket: bool = False,
) -> dict[str, Any]:
    """Everything that is told, as JSON.

    Args:
      stored: the dtype of the weights' files.
      layers: compile so many of the model's; by default all. Sizes of arrays are always the whole model's.
      context: tokens of each running sequence, for the roofline.

    Raises:
      ConfigError: no compiler for the device here, or sizes that do not go together.
      ModelError: a model that cannot be split so; InvalidRequest: not for finetuning.
    """
    check_tp(model, options.tensor_parallel)
    if options.max_finetune_jobs:
        check_finetuning_tp(model, options.tensor_parallel)
    compiled = first_layers(model, layers)
    mesh = ahead.mesh_of(device, options.tensor_parallel)
    dtype = stored if options.dtype == "auto" else options.dtype
    options = options.model_copy(update={"dtype": dtype})
    budget = int(roofline.DEVICES[device].memory * options.gpu_memory_utilization)
    core = _sized(options, model, mesh, budget)
    train = _train_shape(core, model, options)
    params, state, plain = ahead.abstract_arguments(core, model, mesh, train)
    memory = _memory(params, state)
    buckets = _buckets(core, train is not None, every_bucket)
    kernels = _kernels(core, model, device, mesh.size, train, buckets)
    programs = [program_of(core, compiled, mesh, train, bucket) for bucket in buckets]
    large = _large_arrays(params, plain)
    steps = [
        _told(model, core, options, device, bucket, program, large, context)
        for bucket, program in zip(buckets, programs, strict=True)
    ]
    kept = sum(size for name, size in memory.items() if name != "kv_pool")
    draw = _draw(core, compiled, mesh, params, plain)
    temporary = max(draw["temporary_bytes"], *(step["temporary_bytes"] for step in steps))
    each = page_bytes(model, core.page_size, mesh.size, core.dtype) // mesh.size
    fitting = max(budget - kept - temporary, 0) // each
    return {
        "model": {"layers": model.num_layers, "layers_compiled": compiled.num_layers, "dtype": core.dtype},
        "device": ahead.TARGETS[device]["name"],
        "tensor_parallel": mesh.size,
        "budget_bytes": budget,
        "memory_bytes": memory,
        "temporary_bytes": temporary,
        "kv_tokens": core.num_pages * core.page_size,
        "kv_tokens_that_fit": fitting * core.page_size,
        "fits": sum(memory.values()) + temporary <= budget,
        "bytes_per_token": {
            "kv": roofline.kv_bytes(model, np.dtype(core.dtype).itemsize, mesh.size),
            "finetune": roofline.finetune_bytes(model, np.dtype(core.dtype).itemsize, mesh.size),
            "finetune_stash": stash_bytes(model, np.dtype(core.dtype).itemsize, mesh.size) if core.stash_tokens else 0,
            "finetune_activations": _activation_bytes(steps),
        },
        "steps": steps,
        "draw": draw,
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
    }


def _train_shape(core: CoreConfig, model: ModelConfig, options: EngineConfig) -> TrainShape | None:
    """Of the job that an engine makes room for whenever it could finetune; None: it could not."""
    if not core.max_loras or not can_finetune(model, options.tensor_parallel):
        return None
    return train_shape(core, max(options.max_finetune_jobs, 1))


def _sized(options: EngineConfig, model: ModelConfig, mesh: Any, budget: int) -> CoreConfig:
    """As the engine sizes itself, with the device's memory from its data sheet."""
    given = options.num_kv_pages
    tp = mesh.size
    small = core_config(options.model_copy(update={"num_kv_pages": given or 1 << 20}), model, None, mesh, budget)
    if given:
        return small
    train = _train_shape(small, model, options)
    one = dataclasses.replace(small, num_pages=1)
    params, state, _ = ahead.abstract_arguments(one, model, mesh, train)
    left = budget - ahead.local_bytes(params) - ahead.local_bytes(state) - STEP_BYTES
    if train is not None:
        itemsize = np.dtype(small.dtype).itemsize
        left -= activation_bytes(model, small.max_grad_rows, small.window_remat, itemsize, tp)
    wanted = small.max_num_seqs * small.pages_per_seq
    pages = min(wanted, left * tp // page_bytes(model, small.page_size, tp, small.dtype))
    if pages < small.pages_per_seq:
        raise ConfigError(
            [
                f"{budget / GB:.1f} GB of the device may be used; weights, adapters and accumulators leave room for "
                f"{max(pages, 0)} KV pages, and max_model_len {small.max_model_len} needs {small.pages_per_seq}"
            ]
        )
    return dataclasses.replace(small, num_pages=int(pages))


def first_layers(model: ModelConfig, count: int | None) -> ModelConfig:
    """The model with so many layers; None: with all.

    Raises:
      ConfigError: it has not so many.
    """
    if count is None:
        return model
    if not 1 <= count <= model.num_layers:
        raise ConfigError([f"--layers {count}: the model has 1 to {model.num_layers}"])
    return _cut(model, range(count))


def _cut(model: ModelConfig, indices: Iterable[int]) -> ModelConfig:
    layers = tuple(model.layers[i] for i in indices)
    return dataclasses.replace(model, num_layers=len(layers), layers=layers)


def _memory(params: Any, state: Any) -> dict[str, int]:
    """Bytes on one device of what stays there."""
    rest = dataclasses.replace(state, kv=[], bank=None, train=None)
    stash = 0 if state.train is None else ahead.local_bytes(state.train.stash)
    sums = ahead.local_bytes(state.train) - stash
    return {
        "weights": ahead.local_bytes(params),
        "kv_pool": ahead.local_bytes(state.kv),
        "adapters": ahead.local_bytes(state.bank),
        "finetune_sums": sums,  # of adapters' gradients, and of dK and dV
        "finetune_stash": stash,  # activations between forward and backward
        "requests": ahead.local_bytes(rest),
    }


def _buckets(core: CoreConfig, finetunes: bool, every: bool) -> list[Bucket]:
    """The longest decode, prefill and co-serving steps, or all."""
    chunk = core.max_num_batched_tokens // core.row_block * core.row_block
    grads = core.max_grad_rows // core.row_block * core.row_block if finetunes else 0
    buckets = Buckets.make(chunk, core.max_num_seqs, core.row_block, grads, core.stash_tokens > 0)
    if every:
        return list(buckets)
    many, most = buckets.decode_rows[-1], buckets.chunk_rows[-1]
    with_gradients = [(0, many, buckets.grad_rows[-1])] if grads else []
    return [buckets.fit(*rows) for rows in ((0, many), (most, many), *with_gradients)]


def program_of(
    core: CoreConfig, model: ModelConfig, mesh: Any, train: TrainShape | None, bucket: Bucket
) -> ahead.Program:
    """The engine's program of a bucket, compiled."""
    params, state, plain = ahead.abstract_arguments(core, model, mesh, train)
    spec = step_spec(bucket, core, model, mesh, core.bank(model, mesh.size), train)
    if bucket.finetunes and not bucket.grad_rows:
        state = dataclasses.replace(state, train=stash_alone(state.train))
    return ahead.compile_step(params, state if bucket.finetunes else plain, spec)


def _kernels(
    core: CoreConfig, model: ModelConfig, device: str, tensor_parallel: int, train: TrainShape | None,
    buckets: Sequence[Bucket],
) -> tuple[hlo.KernelResources, ...]:  # fmt: skip
    """Of one layer of each kind, which share their kernels: one that is dumped takes long to compile. In a process of
    its own: kernels keep where they were dumped to, and one that was compiled before is not dumped."""
    kinds = {layer: index for index, layer in reversed(list(enumerate(model.layers)))}
    few = _cut(model, sorted(kinds.values()))
    with spawned(1) as other:
        found = other.submit(_dumped_kernels, core, few, device, tensor_parallel, train, tuple(buckets)).result()
    return tuple(sorted(set(found), key=lambda kernel: (kernel.name, kernel.registers, kernel.shared_bytes)))


def _dumped_kernels(
    core: CoreConfig, model: ModelConfig, device: str, tensor_parallel: int, train: TrainShape | None,
    buckets: Sequence[Bucket],
) -> list[hlo.KernelResources]:  # fmt: skip
    mesh = ahead.mesh_of(device, tensor_parallel)
    with ahead.dumping() as folder:
        for bucket in buckets:
            program_of(core, model, mesh, train, bucket)
        return list(hlo.resources(folder))


def _large_arrays(params: Any, state: Any) -> set[tuple[str, tuple[int, ...]]]:
    """Weights and pools, as (dtype, shape on one device)."""
    leaves = [x for x in tree.leaves((params, state.kv)) if ahead.local_bytes(x) >= LARGE]
    return {(x.dtype.name, x.sharding.shard_shape(x.shape)) for x in leaves}


def _told(
    model: ModelConfig,
    core: CoreConfig,
    options: EngineConfig,
    device: str,
    bucket: Bucket,
    program: ahead.Program,
    large: set[tuple[str, tuple[int, ...]]],
    context: int,
) -> dict[str, Any]:
    parts = roofline.step_work(
        model,
        _load(core, bucket, context),
        tensor_parallel=options.tensor_parallel,
        itemsize=np.dtype(core.dtype).itemsize,
        remat=core.window_remat,
    )
    named = roofline.DEVICES[device]
    return {
        "gradient_rows": bucket.grad_rows,
        "chunk_rows": bucket.chunk_rows,
        "decode_rows": bucket.decode_rows,
        "temporary_bytes": program.temporary,
        "lower_seconds": round(program.lower_seconds, 1),
        "compile_seconds": round(program.compile_seconds, 1),
        "kernels": dict(hlo.kernels(program.text)),
        "collectives": dict(hlo.collectives(program.text)),
        "copies": dict(hlo.copies(program.text, large)),
        "flops": sum(part.flops for part in parts),
        "bytes": sum(part.bytes for part in parts),
        "floor_seconds": roofline.seconds(parts, named),
        "expected_seconds": roofline.seconds(parts, named, roofline.EXPECTED),
    }


def _draw(core: CoreConfig, model: ModelConfig, mesh: Any, params: Any, state: Any) -> dict[str, Any]:
    """The program that draws the tokens of a step, for as many rows as there are and whatever they ask for."""
    layout = DrawLayout(core.max_num_seqs, core.max_num_seqs)
    spec = DrawSpec(model, mesh, core.max_logprobs, layout, Asks.ANYTHING)
    program = ahead.compile_draw(params, state, spec, core.dtype)
    return {
        "rows": core.max_num_seqs,
        "temporary_bytes": program.temporary,
        "lower_seconds": round(program.lower_seconds, 1),
        "compile_seconds": round(program.compile_seconds, 1),
        "collectives": dict(hlo.collectives(program.text)),
    }


def _load(core: CoreConfig, bucket: Bucket, context: int) -> roofline.StepLoad:
    """A full step: every decode row at ``context`` tokens, the beginnings of a prompt and of an example."""
    ranks = [core.max_lora_rank] * min(core.max_loras, bucket.decode_rows)
    return roofline.StepLoad(
        decodes=[context] * bucket.decode_rows,
        chunks=[roofline.Segment(bucket.chunk_rows)] if bucket.chunk_rows else [],
        grads=[roofline.Segment(bucket.grad_rows)] if bucket.grad_rows else [],
        adapters=ranks,
        grad_rank=min(core.max_lora_rank, 16) or 16,
    )


def _activation_bytes(steps: Sequence[dict[str, Any]]) -> float:
    """Temporaries that a gradient row adds to a decode step."""
    decode = next(step for step in steps if not step["chunk_rows"] and not step["gradient_rows"])
    most = max(steps, key=lambda step: step["gradient_rows"])
    rows = most["gradient_rows"]
    return (most["temporary_bytes"] - decode["temporary_bytes"]) / rows if rows else 0.0


def lines(result: dict[str, Any]) -> list[str]:
    """The result as text."""
    model, memory = result["model"], result["memory_bytes"]
    budget, temporary = result["budget_bytes"], result["temporary_bytes"]
    told = [
        f"{result['device']} x {result['tensor_parallel']}, {model['dtype']}; per device, of {budget / GB:.1f} GB:",
        *(f"  {name.replace('_', ' '):<16} {size / GB:8.2f} GB" for name, size in memory.items()),
        f"  {'temporaries':<16} {temporary / GB:8.2f} GB",
        f"  {'in all':<16} {(sum(memory.values()) + temporary) / GB:8.2f} GB"
        f" {'fits' if result['fits'] else 'DOES NOT FIT'}",
        f"K/V: room for {result['kv_tokens']:,} tokens; {result['kv_tokens_that_fit']:,} would fit",
        "bytes per token: {kv:,.0f} of K/V; finetuning keeps {finetune:,.0f} per token of a sequence, "
        "{finetune_stash:,.0f} per token of the stash, and {finetune_activations:,.0f} per row of a window".format(
            **result["bytes_per_token"]
        ),
    ]
    if model["layers_compiled"] != model["layers"]:
        told.append(f"compiled with {model['layers_compiled']} of {model['layers']} layers: temporaries are theirs")
    told.append(
        f"{'step':<22} {'temp GB':>8} {'GFLOP':>9} {'GB':>7} {'floor ms':>9} {'expected':>9} {'kernels':>8} "
        f"{'lowered, compiled in':>21}"
    )
    for step in result["steps"]:
        name = f"{step['gradient_rows']}+{step['chunk_rows']}+{step['decode_rows']} rows"
        told.append(
            f"{name:<22} {step['temporary_bytes'] / GB:8.3f} {step['flops'] / 1e9:9.0f} {step['bytes'] / GB:7.1f} "
            f"{step['floor_seconds'] * 1e3:9.2f} {step['expected_seconds'] * 1e3:9.2f} "
            f"{sum(step['kernels'].values()):8d} {_took(step)}"
        )
        counted = ", ".join(
            f"{count} {kind}" for kind, count in sorted(step["kernels"].items(), key=lambda x: -x[1])[:6]
        )
        told.append(f"    {counted}")
        told.append("    collectives: " + (_counts(step["collectives"]) or "none"))
        told.append("    copies of weights or of the pool: " + (_counts(step["copies"]) or "none"))
    draw = result["draw"]
    told.append(
        f"{'draw of ' + str(draw['rows']) + ' tokens':<22} {draw['temporary_bytes'] / GB:8.3f}{'':48}{_took(draw)}"
    )
    told.append("    collectives: " + (_counts(draw["collectives"]) or "none"))
    told += (
        ["Pallas kernels (registers per thread, spilled bytes, shared memory per block):"] if result["kernels"] else []
    )
    told += [f"  {hlo.KernelResources(**kernel)}" for kernel in result["kernels"]]
    return told


def _took(program: dict[str, Any]) -> str:
    return f"{program['lower_seconds']:10.1f} {program['compile_seconds']:8.1f} s"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
