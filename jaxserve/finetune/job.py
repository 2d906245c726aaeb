"""A finetuning job on the host: its state, its progress, and the batch it is working on.

queued -> running <-> paused -> succeeded | failed | cancelled
"""

import itertools
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from jaxserve.adapters.weights import AdapterWeights
from jaxserve.errors import EngineError
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Cursor, Dataset
from jaxserve.finetune.examples import Example
from jaxserve.finetune.packing import pack
from jaxserve.finetune.windows import Targets, TrainSequence, rounded
from pallas_kernels.cross_entropy import CROSS_ENTROPY


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
LEGAL = {
    JobStatus.QUEUED: {JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.FAILED},
    JobStatus.RUNNING: {JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.PAUSED: {JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.FAILED},  # saved its end
}


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """Progress of a job; ``number`` rises by one."""

    number: int
    created_at: float  # seconds since the epoch
    kind: str  # status | metrics | validation | checkpoint | warning
    message: str
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Purpose(StrEnum):
    STEP = "step"  # an optimizer step follows
    ACCUMULATE = "accumulate"  # gradients stay where they are
    FORWARD = "forward"  # for the losses alone


@dataclass(frozen=True)
class Loss:
    """What a batch is trained on; see ``pallas_kernels.cross_entropy.token_loss``."""

    kind: int = CROSS_ENTROPY
    clip: tuple[float, float] = (0.8, 1.2)  # of PPO's ratio
    dropout: bool = True  # the job's, if it has any


@dataclass(eq=False)
class Batch:
    """Examples that go through the step together."""

    number: int  # of the optimizer step, from 1; of the last one before a batch that only goes forward
    examples: tuple[Example, ...]
    epoch: int
    cursor_after: Cursor
    purpose: Purpose = Purpose.STEP
    loss_function: Loss = Loss()
    mean: bool = True  # the loss is a mean over tokens: weights are divided by their sum
    retried: bool = False
    serial: int = field(default_factory=itertools.count().__next__)  # the same for every attempt at it
    waiting: list[Example] = field(init=False)
    sequences: list[TrainSequence] = field(default_factory=list)
    finite: bool = True
    arranged: bool = field(init=False, default=False)

    def __post_init__(self):
        self.waiting = list(self.examples)

    def arrange(self, row_block: int, window: int) -> None:
        """Puts the examples, before any is begun, in an order in which they fill windows of so many rows."""
        self.arranged = True
        bins = pack([rounded(e.num_tokens - 1, row_block) for e in self.examples], window)
        self.waiting = [self.examples[place] for members in bins for place in members]

    def again(self, retried: bool) -> "Batch":
        """The same batch, not begun."""
        return replace(self, retried=retried, sequences=[], finite=True)

    @property
    def forward_only(self) -> bool:
        return self.purpose is Purpose.FORWARD

    def targets(self, example: Example) -> Targets:
        """What one of the examples is to learn."""
        total = self.total_weight if self.mean else 1.0  # may be beyond float32
        weights = (example.weights.astype(np.float64) / total).astype(np.float32)
        loss = self.loss_function
        return Targets(
            weights=weights,
            kind=loss.kind,
            clip=loss.clip,
            sampled_logprobs=example.sampled_logprobs,
            advantages=example.advantages,
        )

    @cached_property
    def total_weight(self) -> float:
        return sum(float(e.weights.sum(dtype=np.float64)) for e in self.examples)

    @cached_property
    def num_tokens(self) -> int:
        return sum(e.num_trained for e in self.examples)

    @property
    def planned(self) -> bool:
        """Every window of every example is in a step."""
        return not self.waiting and all(seq.done for seq in self.sequences)

    @property
    def read(self) -> bool:
        """The host has every loss."""
        return not self.waiting and self.settled

    @property
    def settled(self) -> bool:
        """The host has every loss of the sequences that were begun; they are through."""
        return all(seq.done for seq in self.sequences) and all(seq.num_read == seq.num_losses for seq in self.sequences)

    @property
    def loss(self) -> float:
        return float(sum(float(seq.losses.sum(dtype="float64")) for seq in self.sequences))


class Notebook(Protocol):
    """Keeps a job's events and progress somewhere."""

    def note(self, job: "Job", event: JobEvent | None = None) -> None: ...

    def wait_closed(self) -> None: ...


class Job:
    """One adapter being trained. The engine's loop moves it on; other threads look, pause and cancel."""

    def __init__(
        self,
        adapter: str,
        config: FinetuneConfig,
        dataset: Dataset,
        start: AdapterWeights,
        *,
        validation: Dataset | None = None,
        tenant: str = "",
    ):
        self.id = f"ftjob-{secrets.token_hex(12)}"
        self.adapter, self.config, self.dataset, self.start = adapter, config, dataset, start
        self.validation, self.tenant = validation, tenant
        self.folder: Notebook | None = None  # writes down what happens
        self.total_steps = config.total_steps(len(dataset))
        self.status = JobStatus.QUEUED
        self.error: str | None = None
        self.created_at = time.time()
        self.step = 0  # optimizer steps done and read
        self.num_batches = 0  # begun
        self.cursor = Cursor()
        self.losses: list[float] = []
        self.validation_losses: list[tuple[int, float]] = []  # (step, loss)
        self.trained_tokens = 0
        self.batch: Batch | None = None
        self.again: list[Batch] = []  # to be repeated: their update was not finite, or the device failed
        self.version: int | None = None  # newest published version of the adapter
        self._validated = -1  # the step after which a validation was last begun
        self._events: list[JobEvent] = []
        self._changed = threading.Condition()

    # what is kept on disk

    def meta(self, cursor: Cursor) -> dict[str, Any]:
        """Everything a checkpoint must know beside arrays, as JSON: the state after ``step`` steps, which have read
        the data up to ``cursor``. It is the caller's: what the job does next does not change it."""
        return {
            "id": self.id,
            "created_at": self.created_at,
            "step": self.step,
            "cursor": cursor.to_json(),
            "losses": list(self.losses),
            "validation_losses": list(self.validation_losses),
            "trained_tokens": self.trained_tokens,
            "num_events": len(self._events),
            "adapter_config": dict(self.start.config),
        }

    def restore(self, meta: Mapping[str, Any], events: list[JobEvent]) -> None:
        """Goes back to a checkpoint: to its ``meta`` and to the events up to it."""
        self.id, self.created_at, self.step = meta["id"], meta["created_at"], meta["step"]
        self.num_batches, self.cursor = meta["step"], Cursor.from_json(meta["cursor"])
        self.losses, self.trained_tokens = list(meta["losses"]), meta["trained_tokens"]
        self.validation_losses = [(step, loss) for step, loss in meta["validation_losses"]]
        self._validated = self.validation_losses[-1][0] if self.validation_losses else -1
        self._events = events[: meta["num_events"]]

    def announce(self) -> None:
        """The first event, also of a job that goes on from a checkpoint, and what a new one should know of its data."""
        if self.step:
            self.note("status", f"resumed from the checkpoint of step {self.step}/{self.total_steps}", step=self.step)
            return
        self.note("status", f"created: {len(self.dataset)} examples, {self.total_steps} steps")
        for name, data in (("training", self.dataset), ("validation", self.validation)):
            if data is not None and data.num_truncated:
                count = data.num_truncated
                self.note("warning", f"{name} data: {count} examples are too long, and are cut", truncated=count)
        if self.validation is not None and self.validation.digest == self.dataset.digest:
            self.note("warning", "validation data: the same as the training data")

    # looking

    @property
    def done(self) -> bool:
        return self.status in TERMINAL

    def events(self, after: int = -1) -> list[JobEvent]:
        """Events with a number above ``after``."""
        with self._changed:
            return self._events[max(after + 1, 0) :]

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
            if self.folder is not None:
                self.folder.note(self, event)
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
        """Begins the next optimizer step's batch, or a validation where one is due; None when nothing is left."""
        if self.again:
            return self.again.pop(0)
        if self._validated < self.num_batches and self._validation_is_due():
            self._validated = self.num_batches
            assert self.validation is not None
            examples = self.validation.examples
            return Batch(self.num_batches, examples, self.cursor.epoch, self.cursor, Purpose.FORWARD)
        if self.num_batches == self.total_steps:
            return None
        epoch = self.cursor.epoch
        examples, self.cursor = self.dataset.batch(self.cursor, self.config.batch_size)
        self.num_batches += 1
        return Batch(self.num_batches, tuple(examples), epoch, self.cursor)

    @property
    def exhausted(self) -> bool:
        """No batch is under way and ``next_batch`` has none."""
        validated = self.validation is None or self._validated == self.num_batches
        return self.batch is None and not self.again and self.num_batches == self.total_steps and validated

    def _validation_is_due(self) -> bool:
        """Before the first step, after the last, and every eval_steps or after each epoch in between."""
        if self.validation is None:
            return False
        if self.num_batches in (0, self.total_steps):
            return True
        every = self.config.eval_steps
        return self.cursor.position == 0 if every is None else self.num_batches % every == 0

    @property
    def idle(self) -> bool:
        """It waits for somebody outside."""
        return False

    def begun(self) -> list[Batch]:
        """Batches whose gradients are lost when the device's state is, besides those that nobody has read."""
        return []

    def __iter__(self) -> Iterator[JobEvent]:
        return iter(self.events())

    def __repr__(self) -> str:
        return f"Job({self.id!r}, {self.adapter!r}, {self.status.value}, {self.step}/{self.total_steps})"
