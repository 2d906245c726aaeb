"""A job's side of the device: its arrays, its lane, and the updates that the host has not read.

Nothing of it is donated, so what the host has read last is always there to go back to, and to save.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from jaxserve.adapters.store import AdapterVersion
from jaxserve.engine.job_programs import JobShapes
from jaxserve.engine.lanes import MAGNITUDE, Factors, Masters
from jaxserve.engine.saver import JobSaver
from jaxserve.finetune.data import Cursor
from jaxserve.finetune.job import Batch, Job, JobStatus


class Progress(NamedTuple):
    """A job's arrays after some optimizer steps."""

    masters: Masters
    optimizer: Any
    number: int  # of the last batch among them; one that was not finite may be missing
    cursor: Cursor


class Update(NamedTuple):
    """What followed a batch to the device; the host has not read it."""

    batch: Batch
    norm: jax.Array | None  # None: no optimizer step followed
    after: Progress
    version: AdapterVersion


class Publisher(NamedTuple):
    """How a version that was made here gets into the bank; all that it keeps of its job."""

    shapes: JobShapes
    factors: Factors
    needs_model: bool  # DoRA divides by the lengths of the base matrices' rows


@dataclass(eq=False)
class Training:
    """A job as the trainer moves it on."""

    job: Job
    saver: JobSaver | None  # None: it has no directory
    shapes: JobShapes
    factors: Factors
    shares: Any  # of each leaf of the masters, what is no padding
    now: Progress  # sent to the device
    read: Progress  # known to be good
    version: AdapterVersion | None = None
    lane: int | None = None
    resident: bool = False  # the version has its pages in the bank, and a pin there
    norms: dict[str, jax.Array] = field(default_factory=dict)
    kept: Any = None  # sums of the lane it had, while it has none
    loaded: Any = None  # sums that a session began with
    unread: list[Update] = field(default_factory=list)

    @property
    def pausing(self) -> bool:
        """Paused, and still in its lane."""
        return self.job.status is JobStatus.PAUSED and self.lane is not None

    @property
    def saving(self) -> Future | None:
        """A checkpoint that is being written."""
        return None if self.saver is None else self.saver.saving

    @property
    def ending(self) -> bool:
        """Nothing is left of it but to write its end, which a pause does not put off."""
        return self.saver is not None and self.saver.ending

    @property
    def publisher(self) -> Publisher:
        needs_model = any(MAGNITUDE in leaves for leaves in self.factors.values())
        return Publisher(self.shapes, self.factors, needs_model)

    @property
    def scaled(self) -> bool:
        return bool(self.job.start.vectors)
