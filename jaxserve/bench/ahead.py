"""The engine's programs compiled ahead of time for a GPU that need not be there.

The compiler is that of jax[cuda13]; what it says of memory, kernels and collectives is what the device would run. What
it cannot say is time: products are not tuned on a device, which may choose other kernels for them.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from jaxserve.engine.draw import DrawSpec, draw, head_of, slots_of
from jaxserve.engine.gradient import TrainShape, empty_train_state
from jaxserve.engine.specs import CoreConfig
from jaxserve.engine.state import empty_state, state_specs
from jaxserve.engine.step import StepSpec, step
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import param_specs
from sharding import AXIS, named_sharding

DUMP = "MOSAIC_GPU_DUMP_TO"  # a variable that Pallas reads: where to write what it knows of each kernel
KEEP = "jax_enable_compilation_cache"
NOT_HERE = (
    "no compiler for CUDA here: compiling for a GPU that need not be there takes an environment with '.[cuda13]' "
    "(Python 3.12 or newer)"
)
_TEMPLATE = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: 2048  core_count: {cores}  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {cache}  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
_HOPPER = {"shared": 233472, "optin": 232448, "cores": 132, "fpus": 128, "clock": 1.98, "major": 9}
_AMPERE = {"shared": 167936, "optin": 166912, "cores": 108, "fpus": 64, "clock": 1.41, "major": 8}
TARGETS = {
    "h200": _HOPPER
    | {"bandwidth": 4_800_000_000_000, "cache": 62914560, "memory": 150_000_000_000, "name": "NVIDIA H200"},
    "h100": _HOPPER
    | {"bandwidth": 3_352_000_000_000, "cache": 52428800, "memory": 85_000_000_000, "name": "NVIDIA H100 80GB HBM3"},
    "a100-80gb": _AMPERE
    | {"bandwidth": 2_039_000_000_000, "cache": 41943040, "memory": 85_000_000_000, "name": "NVIDIA A100-SXM4-80GB"},
}


def mesh_of(device: str, tensor_parallel: int) -> Mesh:
    """A mesh of devices that are described and not there.

    Raises:
      ConfigError: jax has no compiler for them here.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_TEMPLATE.format(**TARGETS[device]), topology=f"1x1x{tensor_parallel}"
        )
    except Exception as error:  # whatever JAX raises where the plugin is absent or another version
        raise ConfigError([f"{NOT_HERE} ({type(error).__name__}: {str(error).splitlines()[0][:200]})"]) from error
    return topologies.make_mesh(topology, (tensor_parallel,), (AXIS,))


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler says of one program, per device."""

    lower_seconds: float  # Python's part
    compile_seconds: float
    arguments: int  # bytes
    temporary: int
    aliased: int  # bytes of arguments that results are written into
    text: str  # the optimized HLO


def abstract_params(model: ModelConfig, mesh: Mesh, dtype: str) -> Any:
    """The parameters as shapes with their places on the mesh."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, np.dtype(dtype), sharding=named_sharding(mesh, spec.axes)),
        param_specs(model, mesh.size),
        is_leaf=lambda x: hasattr(x, "axes"),
    )


def abstract_arguments(
    config: CoreConfig, model: ModelConfig, mesh: Mesh, train: TrainShape | None
) -> tuple[Any, Any, Any]:
    """(parameters, state, state without what finetuning adds) as shapes with their places on the mesh."""
    bank = config.bank(model, mesh.size)

    def whole_state() -> Any:
        state = empty_state(
            model, mesh, num_pages=config.num_pages, page_size=config.page_size, num_slots=config.max_num_seqs,
            dtype=config.dtype, bank=bank,
        )  # fmt: skip
        if train is None or bank is None:
            return state
        return replace(state, train=empty_train_state(train, bank, model, mesh, config.page_size, config.dtype))

    shapes = jax.eval_shape(whole_state)
    state = jax.tree.map(
        lambda shape, spec: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        state_specs(shapes, bank),
    )
    return abstract_params(model, mesh, config.dtype), state, replace(state, train=None)


def local_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)


@contextmanager
def dumping() -> Iterator[Path]:
    """A folder that says what Pallas kernels need which are compiled meanwhile, for the first time in this process;
    they take several times as long. None comes from disk."""
    kept = jax.config.values[KEEP]
    with tempfile.TemporaryDirectory(prefix="jaxserve-plan-") as folder:
        os.environ[DUMP] = folder
        jax.config.update(KEEP, False)
        try:
            yield Path(folder)
        finally:
            del os.environ[DUMP]
            jax.config.update(KEEP, kept)


def compile_step(params: Any, state: Any, spec: StepSpec) -> Program:
    """Compiles one of the engine's programs for the devices of ``spec.mesh``."""
    ints, _, floats, _ = spec.layout.empty()
    whole = named_sharding(spec.mesh, ())
    batch = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in (ints, floats)]
    return compile_for(spec.mesh, lambda: step.lower(params, state, *batch, None, spec=spec))


def compile_draw(params: Any, state: Any, spec: DrawSpec, dtype: str) -> Program:
    """Compiles the draw of tokens after a step, for the devices of ``spec.mesh``."""
    layout, model = spec.layout, spec.config
    shapes = (layout.num_samples, model.hidden_size), (layout.num_ints,), (layout.num_floats,)
    whole = named_sharding(spec.mesh, ())
    hidden_and_buffers = [
        jax.ShapeDtypeStruct(shape, np.dtype(kind), sharding=whole)
        for shape, kind in zip(shapes, (dtype, "int32", "float32"), strict=True)
    ]
    arguments = head_of(params, model), *slots_of(state), *hidden_and_buffers
    return compile_for(spec.mesh, lambda: draw.lower(*arguments, spec=spec))


def compile_for(mesh: Mesh, lower: Callable[[], Any]) -> Program:
    """Compiles what ``lower`` gives, for the devices of the mesh."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        start = time.perf_counter()
        lowered = lower()
        lower_seconds = time.perf_counter() - start
        compiled = lowered.compile()
        compile_seconds = time.perf_counter() - start - lower_seconds
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler says what memory a program needs"
    return Program(
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        text=compiled.as_text() or "",
    )
