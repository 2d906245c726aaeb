"""The sums of gradients that jobs have on the device, and the programs that read, write and take them.

A running job owns a lane: pages of factors, and scales where it trains some. Programs depend on an adapter's shapes and
on whether the bank has scales; jobs of one shape share them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.adapters.bank import BankShape
from jaxserve.engine.gradient import TrainShape, TrainState, empty_scale_lanes, sums_alone
from jaxserve.engine.job_programs import DeviceShapes, JobPrograms, JobShapes, compile_programs
from jaxserve.engine.lanes import Masters, gathered, spread
from jaxserve.engine.training import Training

CLEARED = 64  # accumulator pages per device call


@partial(jax.jit, donate_argnums=0)
def clear_pages(acc, page_X):
    """Sets accumulator pages back to zero, in place; entries out of range are dropped."""
    return jax.tree.map(lambda pool: pool.at[page_X].set(0, mode="drop"), acc)


class LaneSums:
    """Owner of the finetuning state between steps.

    Args:
      empty: makes the state, without scales.
      device_shapes: the engine's arrays as they are now, for compiling.
    """

    def __init__(
        self,
        shape: TrainShape,
        bank: BankShape,
        mesh: Mesh,
        empty: Callable[[], TrainState],
        device_shapes: Callable[[], DeviceShapes],
    ):
        self.shape, self._bank, self._mesh, self._empty, self._device_shapes = shape, bank, mesh, empty, device_shapes
        self.state = empty()
        self._programs: dict[tuple, JobPrograms] = {}
        self._shapes: dict[tuple, tuple[JobShapes, bool]] = {}
        self._clear([])  # compiled before a job that is cancelled needs it

    @property
    def has_scales(self) -> bool:
        return self.state.scale_lanes is not None

    def reset(self) -> None:
        """Begins with zeros, after the device has lost everything."""
        scaled = self.has_scales
        self.state = self._empty()
        if scaled:
            self._add_scale_lanes()

    def enable_scales(self) -> None:
        """Makes room for the gradients of scales, and new programs of the shapes there are."""
        self._add_scale_lanes()
        for shapes, scaled in list(self._shapes.values()):
            self.compile(shapes, scaled)

    def _add_scale_lanes(self) -> None:
        self.state = replace(self.state, scale_lanes=empty_scale_lanes(self.shape, self._bank, self._mesh))

    def clear(self, pages: list[int]) -> None:
        """Sets accumulator pages back to zero."""
        for start in range(0, len(pages), CLEARED):
            self._clear(pages[start : start + CLEARED])

    def _clear(self, pages: list[int]) -> None:
        padded = np.full(CLEARED, self.shape.acc_pages, np.int32)
        padded[: len(pages)] = pages
        self.state = replace(self.state, acc=clear_pages(self.state.acc, padded))

    # programs

    def compile_ahead(self, device: DeviceShapes) -> None:
        """Compiles, for ``device``, what its arrays will be, the programs of the shapes there are."""
        for shapes, scaled in list(self._shapes.values()):
            self._compile(shapes, scaled, device)

    def compile(self, shapes: JobShapes, scaled: bool) -> None:
        """Compiles the programs of jobs of these shapes, once."""
        self._shapes[shapes.key] = shapes, scaled  # first: scales that come meanwhile need theirs, too
        self._compile(shapes, scaled, self._device_shapes())

    def _compile(self, shapes: JobShapes, scaled: bool, device: DeviceShapes) -> None:
        key = (*shapes.key, device.scales is not None)
        if key not in self._programs:
            train = device.train if scaled else replace(device.train, scale_lanes=None)
            self._programs[key] = compile_programs(replace(device, train=train), shapes)

    def programs(self, shapes: JobShapes, scales: bool | None = None) -> JobPrograms:
        """The programs of these shapes; ``scales``: whether the bank has some, by default as the lanes have."""
        return self._programs[*shapes.key, self.has_scales if scales is None else scales]

    # a job's lane

    def read(self, training: Training) -> Any:
        """A lane's sums as they are."""
        return self.programs(training.shapes).read_lane(self._of(training), *self._place(training))

    def to_host(self, training: Training) -> Any:
        """A lane's sums, or those of a job that has none now, as an engine on any number of devices takes them."""
        return gathered(training.kept if training.lane is None else self.read(training), self._bank)

    def from_host(self, training: Training, sums: Any) -> Any:
        """The opposite of ``to_host``, to be written into the job's lane."""
        return spread(sums, self.read(training), self._bank)

    def write(self, training: Training, kept: Any) -> None:
        """Gives a lane sums that were read before."""
        self._set(self.programs(training.shapes).write_lane(self._of(training), kept, *self._place(training)))

    def take(self, training: Training) -> Masters:
        """A lane's gradients, in the form of its masters; the lane is zero afterwards."""
        sums, gradients = self.programs(training.shapes).take(
            self._of(training), *self._place(training), training.factors, training.norms
        )
        self._set(sums)
        return gradients

    def pages(self, training: Training) -> np.ndarray:
        """Lane pages [X] of a job that has a lane."""
        assert training.lane is not None
        each = self.shape.lane_pages // self.shape.num_lanes
        first = training.lane * each
        return np.arange(first, first + training.shapes.num_pages, dtype=np.int32)

    def _place(self, training: Training) -> tuple[np.ndarray, np.int32]:
        """A job's lane, as its programs take it: lane pages [X] and the lane's number."""
        assert training.lane is not None
        return self.pages(training), np.int32(training.lane)

    def _of(self, training: Training) -> TrainState:
        """The state that a job's programs take: no accumulators, and scales only where it has some."""
        sums = sums_alone(self.state)
        return sums if training.scaled else replace(sums, scale_lanes=None)

    def _set(self, sums: TrainState) -> None:
        scale_lanes = self.state.scale_lanes if sums.scale_lanes is None else sums.scale_lanes
        self.state = replace(self.state, lanes=sums.lanes, scale_lanes=scale_lanes)
