"""A finetuning job on the host: its state, its progress, and the batch it is working on.

queued -> running <-> paused -> succeeded | failed | cancelled
"""

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jaxserve.adapters.weights import AdapterWeights
from jaxserve.errors import EngineError
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Cursor, Dataset
from jaxserve.finetune.examples import Example
from jaxserve.finetune.windows import TrainSequence


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
LEGAL = {
    JobStatus.QUEUED: {JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED, JobStatus.FAILED},
    JobStatus.RUNNING: {JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.PAUSED: {JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.CANCELLED, JobStatus.FAILED},
}


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """Progress of a job; ``number`` rises by one."""

    number: int
    created_at: float  # seconds since the epoch
    kind: str  # status | metrics
    message: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Batch:
    """The examples of one optimizer step. Weights are divided by their sum: the loss is a mean over tokens."""

    number: int  # of the optimizer step, from 1
    examples: list[Example]
    cursor_after: Cursor
    waiting: list[Example] = field(init=False)
    sequences: list[TrainSequence] = field(default_factory=list)
    retried: bool = False
    num_read: int = 0  # backward windows whose results the host has
    finite: bool = True

    def __post_init__(self):
        self.waiting = list(self.examples)

    @property
    def total_weight(self) -> float:
        return float(sum(float(e.weights.sum()) for e in self.examples))

    @property
    def num_tokens(self) -> int:
        return sum(e.num_trained for e in self.examples)

    @property
    def planned(self) -> bool:
        """Every window of every example is in a step."""
        return not self.waiting and all(seq.done for seq in self.sequences)

    @property
    def read(self) -> bool:
        """The host has every loss."""
        return self.planned and self.num_read == sum(len(seq.windows) for seq in self.sequences)

    @property
    def loss(self) -> float:
        return float(sum(float(seq.losses.sum(dtype="float64")) for seq in self.sequences))


class Job:
    """One adapter being trained. The engine's loop moves it on; other threads look, pause and cancel."""

    _ids = itertools.count()

    def __init__(self, adapter: str, config: FinetuneConfig, dataset: Dataset, start: AdapterWeights):
        self.id = f"ftjob-{next(self._ids)}"
        self.adapter, self.config, self.dataset, self.start = adapter, config, dataset, start
        self.total_steps = config.total_steps(len(dataset))
        self.status = JobStatus.QUEUED
        self.error: str | None = None
        self.step = 0  # optimizer steps done and read
        self.num_batches = 0  # begun
        self.cursor = Cursor()
        self.losses: list[float] = []
        self.trained_tokens = 0
        self.batch: Batch | None = None
        self.again: list[Batch] = []  # to be repeated: their update was not finite
        self.version: int | None = None  # newest published version of the adapter
        self._events: list[JobEvent] = []
        self._changed = threading.Condition()
        self.note("status", f"created: {len(dataset)} examples, {self.total_steps} steps")

    # looking

    @property
    def done(self) -> bool:
        return self.status in TERMINAL

    def events(self, after: int = -1) -> list[JobEvent]:
        """Events with a number above ``after``."""
        with self._changed:
            return self._events[after + 1 :]

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until the job is over; False when the time is. Another thread must be stepping the engine."""
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout)

    # moving on

    def note(self, kind: str, message: str, **data: Any) -> None:
        with self._changed:
            number = len(self._events)
            event = JobEvent(number=number, created_at=time.time(), kind=kind, message=message, data=data)
            self._events.append(event)
            self._changed.notify_all()

    def move(self, status: JobStatus, message: str = "", error: str | None = None) -> None:
        """Changes the status.

        Raises:
          EngineError: no such edge; terminal states are final.
        """
        if status is self.status:
            return
        if status not in LEGAL.get(self.status, ()):
            raise EngineError(f"job {self.id} is {self.status}; it cannot become {status}")
        self.status, self.error = status, error
        self.note("status", message or status.value)

    def next_batch(self) -> Batch | None:
        """Begins the batch of the next optimizer step; None when there is none left."""
        if self.again:
            return self.again.pop(0)
        if self.num_batches == self.total_steps:
            return None
        examples, self.cursor = self.dataset.batch(self.cursor, self.config.batch_size)
        self.num_batches += 1
        return Batch(self.num_batches, examples, self.cursor)

    def __iter__(self) -> Iterator[JobEvent]:
        return iter(self.events())

    def __repr__(self) -> str:
        return f"Job({self.id!r}, {self.adapter!r}, {self.status.value}, {self.step}/{self.total_steps})"
