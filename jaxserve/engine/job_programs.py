"""The small programs of a job, compiled when it is made and not in the loop that serves.

Between an adapter's shapes and the engine's they are all determined, so jobs of one shape share them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.adapters.bank import Bank, BankShape
from jaxserve.adapters.scales import Scales
from jaxserve.engine.gradient import TrainState
from jaxserve.engine.lanes import MAGNITUDE, Factors, Masters, publish, read_lane, take_gradients, write_lane
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.optimizer import apply_gradients, hyperparameters

Hyper = dict[str, np.float32]


@dataclass(frozen=True)
class DeviceShapes:
    """The engine's arrays, as jax.ShapeDtypeStructs with their shardings."""

    mesh: Mesh
    bank_shape: BankShape
    train: TrainState  # without accumulators
    bank: Bank
    scales: Scales | None
    params: Any


@dataclass(frozen=True)
class JobShapes:
    """An adapter's arrays, as jax.ShapeDtypeStructs, and what else its programs depend on."""

    masters: Masters
    optimizer: Any
    factors: Mapping[str, Any]
    optimizer_name: str
    rank: int
    num_pages: int

    @cached_property
    def key(self) -> tuple:
        leaves, structure = jax.tree.flatten((self.masters, self.optimizer, dict(self.factors)))
        return (structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves), self.optimizer_name, self.num_pages)


@dataclass(frozen=True)
class JobPrograms:
    """Compiled for one JobShapes; see the functions of the same names."""

    take: Callable[..., tuple[TrainState, Masters]]
    apply: Callable[..., tuple[Masters, Any, jax.Array]]
    publish: Callable[..., tuple[Bank, Scales | None, dict[str, jax.Array]]]
    read_lane: Callable[..., Any]
    write_lane: Callable[..., TrainState]


def compile_programs(device: DeviceShapes, job: JobShapes) -> JobPrograms:
    """Compiles all of a job's programs. ``device.scales`` are there for every job once they are for one, the lanes of
    scales for jobs that train some."""
    mesh, L = device.mesh, device.bank_shape.config.num_layers
    pages, number = jax.ShapeDtypeStruct((job.num_pages,), np.int32), jax.ShapeDtypeStruct((), np.int32)
    norms = {m: leaves[MAGNITUDE] for m, leaves in job.masters.items() if MAGNITUDE in leaves}
    needs_model = device.params if norms else None
    take = take_gradients.lower(
        device.train, pages, number, job.factors, norms, mesh=mesh, rank=job.rank, num_layers=L
    )  # fmt: skip
    shares = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[:1], np.float32), job.masters)
    # where the compiler would leave factored moments is not where the next update takes them from
    places = jax.tree.map(lambda x: x.sharding, (job.masters, job.optimizer))
    update = jax.jit(partial(apply_gradients, job.optimizer_name), out_shardings=(*places, None))
    apply = update.lower(job.masters, job.optimizer, job.masters, _hyper_shapes(), shares)
    put = publish.lower(
        device.bank, device.scales, needs_model, job.masters, pages, job.factors, mesh=mesh, shape=device.bank_shape
    )
    read = read_lane.lower(device.train, pages, number, num_layers=L)
    kept = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        read.out_info,
        read.compile().output_shardings,
    )
    write = write_lane.lower(device.train, kept, pages, number, num_layers=L)
    return JobPrograms(*(program.compile() for program in (take, apply, put, read, write)))


def job_shapes(masters: Masters, optimizer: Any, factors: Factors, name: str, rank: int, num_pages: int) -> JobShapes:
    return JobShapes(shapes_of(masters), shapes_of(optimizer), shapes_of(factors), name, rank, num_pages)


def shapes_of(tree: Any) -> Any:
    """Arrays to jax.ShapeDtypeStructs; those on devices with their shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def hyper_arrays(config: FinetuneConfig, total_steps: int, step: int) -> Hyper:
    """The numbers of one update, as the compiled program takes them."""
    return {name: np.float32(value) for name, value in hyperparameters(config, total_steps, step).items()}


def _hyper_shapes() -> dict[str, jax.ShapeDtypeStruct]:
    return dict.fromkeys(hyperparameters(FinetuneConfig(), 1, 0), jax.ShapeDtypeStruct((), np.float32))
