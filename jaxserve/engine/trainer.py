"""Finetuning inside the engine's loop: lanes, optimizer steps, new versions, checkpoints.

When the last window of a batch is in a step, the optimizer step follows it to the device at once, and with it the new
version of the adapter: the next batch and the next request already use it, before the host has read the losses.
Nothing that a job has is donated, so what the host has read last is always there to go back to, and to save.
"""

import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxserve.adapters.bank import Bank, BankShape, sites_touched
from jaxserve.adapters.peft_io import save_peft
from jaxserve.adapters.residency import Residency
from jaxserve.adapters.scales import Scales, fused_inputs
from jaxserve.adapters.store import AdapterStore, AdapterVersion
from jaxserve.engine.gradient import TrainShape, TrainState, empty_scale_lanes
from jaxserve.engine.job_programs import (
    DeviceShapes,
    Hyper,
    JobPrograms,
    JobShapes,
    compile_programs,
    hyper_arrays,
    job_shapes,
)
from jaxserve.engine.lanes import MAGNITUDE, Factors, Masters, factors_of, masters_of, weights_of
from jaxserve.engine.step import StepOutput
from jaxserve.errors import EngineError
from jaxserve.finetune.data import Cursor
from jaxserve.finetune.errors import CheckpointError
from jaxserve.finetune.folder import JobFolder
from jaxserve.finetune.job import Batch, Job, JobStatus, Purpose
from jaxserve.finetune.live import LiveWeights
from jaxserve.finetune.optimizer import hyperparameters, init_state
from jaxserve.finetune.queue import FinetuneQueue, Running
from jaxserve.finetune.session import Session
from jaxserve.finetune.windows import FinetunePlan, Lane, total_rows
from jaxserve.kvcache.pages import PagePool
from jaxserve.models.config import ModelConfig
from pallas_kernels.lora_matmul import PAGE_RANK

MAX_FAILURES = 2  # steps with windows that fail in a row before the jobs in them are given up
RETRY_SECONDS = 5.0  # between attempts to write a checkpoint that the disk refused


@jax.jit
def clear_pages(train: TrainState, page_X) -> TrainState:
    """Sets accumulator pages back to zero; entries out of range are dropped."""
    return replace(train, acc=[tuple(pool.at[page_X].set(0, mode="drop") for pool in layer) for layer in train.acc])


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


class Save(NamedTuple):
    """A checkpoint that is to be written."""

    step: int
    state: dict[str, Any]
    meta: dict[str, Any]


class Publisher(NamedTuple):
    """How a version that was made here gets into the bank; all that it keeps of its job."""

    shapes: JobShapes
    factors: Factors
    needs_model: bool  # DoRA divides by the lengths of the base matrices' rows


@dataclass(eq=False)
class Training:
    """A job's side of the device."""

    job: Job
    folder: JobFolder | None
    shapes: JobShapes
    factors: Factors
    now: Progress  # sent to the device
    read: Progress  # known to be good
    run: str = field(default_factory=lambda: secrets.token_hex(8))  # names this attempt at the job
    version: AdapterVersion | None = None
    lane: int | None = None
    resident: bool = False  # the version has its pages in the bank, and a pin there
    norms: dict[str, jax.Array] = field(default_factory=dict)
    kept: Any = None  # sums of the lane it had, while it has none
    loaded: Any = None  # sums that a session began with
    unread: list[Update] = field(default_factory=list)
    due: Save | None = None  # the newest checkpoint that is not being written yet
    saving: Future | None = None
    saving_what: Save | None = None
    saved_step: int = -1
    retry_at: float | None = None  # the disk has refused to write: when to try again
    paused_by_disk: bool = False
    ending: bool = False  # all steps are read
    finishing: Future | None = None

    @property
    def pausing(self) -> bool:
        """Paused, and still in its lane."""
        return self.job.status is JobStatus.PAUSED and self.lane is not None

    @property
    def publisher(self) -> Publisher:
        needs_model = any(MAGNITUDE in leaves for leaves in self.factors.values())
        return Publisher(self.shapes, self.factors, needs_model)

    @property
    def scaled(self) -> bool:
        return bool(self.job.start.vectors)


class Trainer:
    """All jobs of an engine.

    Args:
      device_shapes: the engine's arrays as they are now, for compiling.
      preparing: a context in which compilations are expected.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
        bank: BankShape,
        shape: TrainShape,
        empty_state: Callable[[], TrainState],
        pool: PagePool,
        residency: Residency,
        store: AdapterStore,
        *,
        row_block: int,
        max_window: int,
        device_shapes: Callable[[], DeviceShapes],
        clock: Callable[[], float],
    ):
        self.model, self.mesh, self.shape, self._empty_state = model, mesh, shape, empty_state
        self.state, self._bank_shape = empty_state(), bank
        self.residency, self.store, self._device_shapes, self._clock = residency, store, device_shapes, clock
        self.queue = FinetuneQueue(pool, shape.num_slots, shape.acc_pages, row_block, max_window, clear=self._clear)
        self._lanes = list(range(shape.num_lanes))
        self.waiting: list[Training] = []
        self.trainings: dict[str, Training] = {}
        self._programs: dict[tuple, JobPrograms] = {}
        self._shapes: dict[tuple, tuple[JobShapes, bool]] = {}
        self.trained_tokens = 0
        self.failures = 0
        self.held = False  # after a failed step the requests go alone once

    # jobs from outside

    def prepare(self, job: Job, folder: JobFolder | None) -> Training:
        """Places a job's arrays, from its newest checkpoint if it has one, and compiles its programs.

        On the caller's thread; nothing here waits for the loop.
        """
        masters = masters_of(job.start, self.model, self.mesh)
        state = {"masters": masters, "optimizer": init_state(job.config.optimizer, masters)}
        checkpoint = folder.latest(like=state) if folder is not None else None
        if folder is not None and checkpoint is not None:
            job.restore(checkpoint.meta, folder.events())
            state = jax.tree.map(lambda saved, like: jax.device_put(saved, like.sharding), checkpoint.state, state)
        factors = factors_of(job.start, self.model)
        pages = max(1, -(-job.start.rank // PAGE_RANK))
        shapes = job_shapes(**state, factors=factors, name=job.config.optimizer, rank=job.start.rank, num_pages=pages)
        progress = Progress(**state, number=job.step, cursor=job.cursor)
        training = Training(
            job, folder, shapes, factors, progress, progress, saved_step=job.step if checkpoint is not None else -1
        )
        self.compile(shapes, training.scaled)
        return training

    def compile(self, shapes: JobShapes, scaled: bool) -> None:
        """Compiles the programs of jobs of these shapes, once."""
        device = self._device_shapes()
        key = self._key(shapes, device.scales is not None)
        if key not in self._programs:
            train = device.train if scaled else replace(device.train, scale_lanes=None)
            self._programs[key] = compile_programs(replace(device, train=train), shapes)
        self._shapes[shapes.key] = shapes, scaled

    def _key(self, shapes: JobShapes, scales: bool) -> tuple:
        return (*shapes.key, scales)

    def _programs_of(self, training: Training) -> JobPrograms:
        return self._programs[self._key(training.shapes, self._has_scales)]

    def submit(self, training: Training) -> None:
        self.trainings[training.job.id] = training
        self.waiting.append(training)

    def pause(self, job: Job, message: str = "") -> None:
        """Stops a job soon: at once, but for sequences whose backward has begun."""
        if job.status is JobStatus.QUEUED:
            self.waiting.remove(self.trainings[job.id])
        elif job.status is JobStatus.RUNNING:
            self.queue.hold(job)
        else:
            raise EngineError(f"job {job.id} is {job.status.value}; it cannot be paused")
        job.move(JobStatus.PAUSED, message)

    def resume(self, job: Job) -> None:
        """Lets a paused job go on where it stopped."""
        training = self.trainings.get(job.id)
        if training is None or job.status is not JobStatus.PAUSED:
            raise EngineError(f"job {job.id} is {job.status.value}; it cannot be resumed")
        training.retry_at = None
        job.move(JobStatus.QUEUED, "resumed")
        if training.lane is None:
            self.waiting.append(training)
        else:
            self.queue.go_on(job)
            job.move(JobStatus.RUNNING)

    def cancel(self, job: Job) -> None:
        """Ends a job; versions it has published stay."""
        if not job.done:
            self._end(job, JobStatus.CANCELLED)

    def checkpoint(self, job: Job) -> Future | None:
        """Saves a job as the host has last read it. None: it has no directory, or nothing new."""
        training = self.trainings.get(job.id)
        if training is None or training.folder is None:
            return None
        self._save(training)
        self._start_save(training)
        return training.saving

    def close(self) -> None:
        """Saves what was read last of every job that has a directory, and leaves the directories to others."""
        for training in self.trainings.values():
            if training.folder is not None:
                self._save(training)
                while training.due is not None or training.saving is not None:
                    self._start_save(training)
                    wait([training.saving] if training.saving is not None else [])
                    training.saving = None
                training.folder.close()

    def adapters(self) -> set[str]:
        """Names that are being trained."""
        return {training.job.adapter for training in self.trainings.values()}

    def has_work(self) -> bool:
        return any(
            t.unread or t.saving is not None or t.pausing or not (t.job.status is JobStatus.PAUSED or t.job.idle)
            for t in self.trainings.values()
        )

    def wait_for_disk(self, seconds: float) -> None:
        """Waits a little where jobs wait for nothing but the disk."""
        for training in self.trainings.values():
            for future in (training.finishing, training.saving):
                if future is not None:
                    wait([future], seconds)
                    return
        time.sleep(seconds)

    # lanes

    def _start_waiting(self) -> None:
        for training in list(self.waiting):
            if not self._lanes or not self._make_resident(training):
                return
            self.waiting.remove(training)
            training.lane = self._lanes.pop(0)
            if training.kept is not None:
                self._write_lane(training, training.kept)
                training.kept = None
            self.queue.running.append(Running(training.job, self._lane_of(training)))
            training.job.move(JobStatus.RUNNING)

    def _make_resident(self, training: Training) -> bool:
        """Publishes the job's version if there is none, and pins it in the bank; False: there is no room now."""
        if training.version is None:
            self._put(training, training.job.step)
        assert training.version is not None
        training.resident = training.resident or self.residency.try_acquire(training.version)
        return training.resident

    def _put(self, training: Training, step: int) -> AdapterVersion:
        live = LiveWeights(training.job.start, training.now.masters, weights_of, training.run, step)
        live.source = training.publisher
        training.version = self.store.put(training.job.adapter, live)
        training.job.version = training.version.version
        return training.version

    def _lane_of(self, training: Training) -> Lane:
        assert training.lane is not None
        start, pages = training.job.start, self.residency.pages_of(training.version)
        sites = sites_touched(sorted({member for _, member in start.pairs}))
        lane_pages = tuple(self._lane_pages(training).tolist())[: len(pages)]
        return Lane(training.lane, pages, sites, lane_pages, training.scaled, fused_inputs(start))

    def _place(self, training: Training) -> tuple[np.ndarray, np.int32]:
        """A job's lane, as its programs take it: lane pages [X] and the lane's number."""
        assert training.lane is not None
        return self._lane_pages(training), np.int32(training.lane)

    def _lane_pages(self, training: Training) -> np.ndarray:
        assert training.lane is not None
        each = self.shape.lane_pages // self.shape.num_lanes
        first = training.lane * each
        return np.arange(first, first + training.shapes.num_pages, dtype=np.int32)

    def _park(self, training: Training) -> None:
        """Puts a paused job's unfinished gradients aside and gives its lane to others."""
        if training.job.batch is not None or training.job.begun() or training.loaded is not None:
            training.kept = self._read_lane(training)
            self._take_gradients(training)
        self._leave_lane(training)
        if training.folder is not None and training.due is None and training.retry_at is None:
            self._save(training)

    def _leave_lane(self, training: Training) -> None:
        self.queue.forget(training.job)
        if training.resident:
            self.residency.release(training.version)
            training.resident = False
        if training.lane is not None:
            self._lanes.append(training.lane)
            training.lane = None

    def _end(self, job: Job, status: JobStatus, message: str = "", error: str | None = None) -> None:
        """Takes a job out of the lanes for good."""
        training = self.trainings.pop(job.id)
        self.queue.drop(job)
        if training in self.waiting:
            self.waiting.remove(training)
        if training.lane is not None:
            self._take_gradients(training)  # what is left of a batch that will not be finished
        self._leave_lane(training)
        job.move(status, message, error)
        if training.folder is not None:
            if training.due is not None and training.due.step > training.saved_step:
                training.folder.save(*training.due)
            training.folder.close_soon()

    def _clear(self, pages: list[int]) -> None:
        padded = np.full(-(-len(pages) // 64) * 64, self.shape.acc_pages, np.int32)
        padded[: len(pages)] = pages
        self.state = clear_pages(self.state, padded)

    # the gradients' sums

    @property
    def _has_scales(self) -> bool:
        return self.state.scale_lanes is not None

    def _sums(self, training: Training) -> TrainState:
        """The state that a job's programs take: no accumulators, and scales only where it has some."""
        return TrainState(
            acc=[], lanes=self.state.lanes, scale_lanes=self.state.scale_lanes if training.scaled else None
        )

    def _set_sums(self, sums: TrainState) -> None:
        scale_lanes = self.state.scale_lanes if sums.scale_lanes is None else sums.scale_lanes
        self.state = replace(self.state, lanes=sums.lanes, scale_lanes=scale_lanes)

    def _read_lane(self, training: Training) -> Any:
        """A lane's sums as they are."""
        return self._programs_of(training).read_lane(self._sums(training), *self._place(training))

    def _write_lane(self, training: Training, kept: Any) -> None:
        self._set_sums(self._programs_of(training).write_lane(self._sums(training), kept, *self._place(training)))

    def _take_gradients(self, training: Training) -> Masters:
        """A lane's gradients, in the form of its masters; the lane is zero afterwards."""
        sums, gradients = self._programs_of(training).take(
            self._sums(training),
            *self._place(training),
            training.factors,
            training.norms,
        )
        self._set_sums(sums)
        return gradients

    # the loop

    def settle(self) -> None:
        """Moves on what waits for the disk, for a lane or a place in the bank, or for the last results of a pause."""
        self._settle()
        self._start_waiting()

    def _settle(self) -> None:
        for training in list(self.trainings.values()):
            job = training.job
            self._settle_disk(training)
            running = job.status is JobStatus.RUNNING and training.lane is not None
            if running and not training.resident and self._make_resident(training):
                self._set_lane(training)
                self.queue.go_on(job)
            if training.lane is None or training.unread:
                continue
            if job.status is JobStatus.PAUSED and self.queue.is_idle(job) and (job.batch is None or job.batch.settled):
                self._park(training)
            elif job.status is JobStatus.RUNNING and job.exhausted:
                self._finish(training)

    def _set_lane(self, training: Training) -> None:
        for running in self.queue.running:
            if running.job is training.job:
                running.lane = self._lane_of(training)

    def after_dispatch(self) -> None:
        """Sends the optimizer steps of batches that are wholly in flight after them."""
        for job, batch in self.queue.retire():
            self._optimize(self.trainings[job.id], batch)

    def _optimize(self, training: Training, batch: Batch) -> None:
        job, norm = training.job, None
        job.batch = None
        if batch.purpose is Purpose.STEP:
            norm = self._apply(training, hyper_arrays(job.config, job.total_steps, batch.number - 1), batch)
        assert training.version is not None
        training.unread.append(Update(batch, norm, training.now, training.version))

    def _apply(self, training: Training, hyper: Hyper, batch: Batch) -> jax.Array:
        """The optimizer step, and the version it makes; returns the norm of the gradient."""
        now = training.now
        masters, optimizer, norm = self._programs_of(training).apply(
            now.masters, now.optimizer, self._take_gradients(training), hyper
        )
        number, cursor = max(now.number, batch.number), max(now.cursor, batch.cursor_after)
        training.now = Progress(masters, optimizer, number, cursor)
        self._publish(training, batch.number)
        return norm

    def _publish(self, training: Training, step: int) -> None:
        """Makes the masters the newest version of the adapter: on the device, in the next step. Where requests hold
        so many versions that the bank has no room, the job waits for one of them to end."""
        old = training.version
        assert old is not None
        self._put(training, step)
        self.residency.release(old)
        training.resident = False
        made = self._make_resident(training)
        self.residency.drop(old)
        if made or self._make_resident(training):
            self._set_lane(training)
        else:
            self.queue.hold(training.job)

    def upload(
        self, version: AdapterVersion, pages: list[int], bank: Bank, scales: Scales | None, params: Any
    ) -> tuple[Bank, Scales | None]:
        """Writes a version that was made here into bank pages."""
        live = version.weights
        assert isinstance(live, LiveWeights), version
        source: Publisher = live.source
        bank, scales, norms = self._programs[self._key(source.shapes, scales is not None)].publish(
            bank, scales, params if source.needs_model else None, live.masters, np.array(pages, np.int32),
            source.factors,
        )  # fmt: skip
        for training in self.trainings.values():
            if training.version is version:
                training.norms = norms
        return bank, scales

    # sessions

    def optim_step(self, session: Session, hyper: Hyper) -> tuple[float, bool]:
        """Takes an idle session's gradients: (their norm, whether they were finite and so applied)."""
        training = self.trainings[session.id]
        assert session.idle, session
        now, gradients = training.now, self._take_gradients(training)
        masters, optimizer, norm = self._programs_of(training).apply(now.masters, now.optimizer, gradients, hyper)
        size = float(norm)
        session.forget_gradients()
        training.loaded = None
        if not np.isfinite(size):
            return size, False
        session.step += 1
        training.now = training.read = Progress(masters, optimizer, session.step, now.cursor)
        self._publish(training, session.step)
        return size, True

    def state_of(self, session: Session) -> dict[str, Any]:
        """Everything of an idle session that is an array: parameters, moments, gradients so far."""
        training = self.trainings[session.id]
        assert session.idle, session
        gradients = training.kept if training.lane is None else self._read_lane(training)
        return {"masters": training.now.masters, "optimizer": training.now.optimizer, "gradients": gradients}

    def set_state(self, session: Session, state: Any, step: int, calls: int) -> None:
        """The opposite of ``state_of``; ``state`` may be on the host."""
        training, like = self.trainings[session.id], self.state_of(session)
        placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), state, like)
        training.now = training.read = Progress(placed["masters"], placed["optimizer"], step, training.now.cursor)
        training.loaded, session.step, session.num_batches = placed["gradients"], step, calls
        session.forget_gradients()
        self._write_lane(training, training.loaded)
        self._publish(training, step)

    # results

    def commit(self, plan: FinetunePlan, output: StepOutput, finite_slots: np.ndarray, chunk_rows: int) -> None:
        """Takes in the losses of a step that has been read, and what followed from them.

        Args:
          finite_slots: of the finetune slots; chunk_rows: rows of the requests' chunks, before the forward windows.
        """
        loss_W, logprob_W = np.asarray(output.loss_W), np.asarray(output.train_logprob_W)
        row, block = 0, self.queue.row_block
        for window in plan.grads:
            rows, tokens = slice(row, row + window.length), slice(window.start + 1, window.end + 1)
            window.seq.losses[tokens], window.seq.logprobs[tokens] = loss_W[rows], logprob_W[rows]
            self._read(window.seq, bool(np.isfinite(loss_W[rows]).all()) and bool(finite_slots[window.seq.slot]))
            row += total_rows([window], block)
        row = chunk_rows
        for window in plan.forwards:
            if window.seq.forward_only:
                rows, tokens = slice(row, row + window.length), slice(window.start + 1, window.end + 1)
                logprob_T = np.asarray(output.prompt_logprob_T)[rows]
                weights = window.seq.targets.weights[tokens]
                window.seq.logprobs[tokens] = logprob_T
                window.seq.losses[tokens] = np.where(weights > 0, -weights * logprob_T, 0)
                self._read(window.seq, bool(finite_slots[window.seq.slot]))
            row += total_rows([window], block)
        self.failures, self.held = 0, False
        for training in list(self.trainings.values()):
            while training.unread and training.unread[0].batch.read:
                self._update_done(training, training.unread.pop(0))

    def _read(self, seq: Any, finite: bool) -> None:
        if id(seq) in self.queue.owner:
            _, batch = self.queue.owner[id(seq)]
            seq.num_read += 1
            batch.finite &= finite

    def _update_done(self, training: Training, update: Update) -> None:
        job, batch = training.job, update.batch
        for seq in batch.sequences:
            self.queue.owner.pop(id(seq), None)
        if isinstance(job, Session):
            job.read(batch)
            return
        if batch.purpose is Purpose.FORWARD:
            self._validated(job, batch)
            return
        size = float(cast(jax.Array, update.norm))
        if not (batch.finite and np.isfinite(size)):
            self._not_finite(training, batch)
            return
        training.read = update.after
        job.step += 1
        job.losses.append(batch.loss)
        job.trained_tokens += batch.num_tokens
        self.trained_tokens += batch.num_tokens
        rate = hyperparameters(job.config, job.total_steps, batch.number - 1)["learning_rate"]
        job.note(
            "metrics",
            f"step {job.step}/{job.total_steps}: loss {batch.loss:.4f}",
            step=job.step,
            loss=batch.loss,
            tokens=batch.num_tokens,
            learning_rate=rate,
            gradient_norm=size,
            adapter_version=update.version.version,
        )
        if job.step % job.config.save_steps == 0:
            self._save(training)

    def _validated(self, job: Job, batch: Batch) -> None:
        if not (batch.finite and np.isfinite(batch.loss)):
            job.note("warning", f"validation loss after step {batch.number} is not finite")
            return
        job.validation_losses.append((batch.number, batch.loss))
        job.note(
            "validation",
            f"step {batch.number}/{job.total_steps}: validation loss {batch.loss:.4f}",
            step=batch.number,
            validation_loss=batch.loss,
            tokens=batch.num_tokens,
        )

    def _not_finite(self, training: Training, batch: Batch) -> None:
        """An update that is not finite was not applied. Its batch is tried once more, then the job fails."""
        job = training.job
        if batch.retried:
            message = f"loss or gradient of step {batch.number} is not finite, twice"
            self._end(job, JobStatus.FAILED, message, error=message)
            return
        job.note("warning", f"loss or gradient of step {batch.number} is not finite; its data are tried again")
        job.again.append(batch.again(retried=True))

    # the disk

    def _save(self, training: Training) -> None:
        """Notes that what was read last is to be saved; of several the newest."""
        job, read = training.job, training.read
        complete = job.step == read.number  # else a batch is missing that the cursor has passed
        if training.folder is not None and complete and job.step > training.saved_step:
            state = {"masters": read.masters, "optimizer": read.optimizer}
            training.due = Save(job.step, state, job.meta(read.cursor))

    def _start_save(self, training: Training) -> None:
        if training.due is not None and training.due.step <= training.saved_step:
            training.due = None  # it was asked for twice
        if training.due is not None and training.saving is None and training.folder is not None:
            what, training.due = training.due, None
            training.saving_what, training.saving = what, training.folder.save(what.step, what.state, what.meta)

    def _settle_disk(self, training: Training) -> None:
        job, folder = training.job, training.folder
        if folder is None:
            return
        if training.saving is not None and training.saving.done():
            self._saved(training, training.saving)
        if training.retry_at is not None and self._clock() < training.retry_at:
            return
        training.retry_at = None
        self._start_save(training)
        if not training.ending or training.saving is not None:
            return
        if training.finishing is None:
            masters, like = training.read.masters, job.start
            training.finishing = folder.finish(lambda path: save_peft(weights_of(masters, like), path))
        elif training.finishing.done():
            error = training.finishing.exception()
            training.finishing = None
            if error is None:
                self._end(job, JobStatus.SUCCEEDED)
                return
            training.retry_at = self._clock() + RETRY_SECONDS
            job.note("warning", f"the adapter was not written, and will be tried again: {error}")

    def _saved(self, training: Training, future: Future) -> None:
        """A checkpoint is on the disk, or the disk has refused it: then the job waits until it takes one."""
        job, what, error = training.job, training.saving_what, future.exception()
        assert what is not None
        training.saving = training.saving_what = None
        if error is None:
            training.saved_step = what.step
            job.note("checkpoint", f"checkpoint {what.step} is saved", step=what.step)
            if training.paused_by_disk and job.status is JobStatus.PAUSED:
                self.resume(job)
            training.paused_by_disk = False
            return
        if not isinstance(error, CheckpointError):
            raise error
        training.due = training.due or what
        training.retry_at = self._clock() + RETRY_SECONDS
        if job.status is JobStatus.RUNNING and not training.ending:
            training.paused_by_disk = True
            self.pause(job, f"{error}; the job waits until one can be")
        else:
            job.note("warning", str(error))

    def _finish(self, training: Training) -> None:
        """The last step is read: what is left is to save the end."""
        self._leave_lane(training)
        if training.folder is None:
            self._end(training.job, JobStatus.SUCCEEDED)
            return
        training.ending = True
        self._save(training)

    # faults

    def recover(self, plan: FinetunePlan | None) -> None:
        """After a step that failed on the device: its state is gone. Every job goes back to the step that the host has
        read last; jobs that were in too many failing steps in a row are given up.

        Args:
          plan: the windows of the step that failed.
        """
        blamed = [] if plan is None else [self.queue.owner.get(id(w.seq)) for w in (*plan.grads, *plan.forwards)]
        scaled, self.held = self._has_scales, True
        self.state = self._empty_state()
        if scaled:
            self._add_scale_lanes()
        for training in self.trainings.values():
            self._go_back(training)
        self.failures += bool(blamed)
        if self.failures <= MAX_FAILURES:
            return
        for job in {owner[0] for owner in blamed if owner is not None}:
            message = f"the engine's step failed {self.failures} times in a row with windows of this job"
            self._end(job, JobStatus.FAILED, message, error=message)
        self.failures = 0

    def _go_back(self, training: Training) -> None:
        job = training.job
        begun = job.begun() + [update.batch for update in training.unread]
        begun += [job.batch] if job.batch is not None else []
        if training.kept is not None and not _is_good(training.kept):
            training.kept = None
        if training.kept is not None:
            return
        self.queue.take_back_all(job)
        job.again = [batch.again(batch.retried) for batch in begun] + job.again
        job.batch, training.now = None, training.read
        if training.loaded is not None and training.lane is not None:
            self._write_lane(training, training.loaded)
        for version in {update.version for update in training.unread} | {training.version}:
            if version is not None:  # nobody has seen a token of these yet: their steps were not read
                cast(LiveWeights, version.weights).rebind(training.read.masters)
        training.unread = []

    def _add_scale_lanes(self) -> None:
        self.state = replace(self.state, scale_lanes=empty_scale_lanes(self.shape, self._bank_shape, self.mesh))

    def enable_scales(self) -> None:
        """Makes room for the gradients of scales, and new programs of the jobs there are."""
        self._add_scale_lanes()
        for shapes, scaled in list(self._shapes.values()):
            self.compile(shapes, scaled)


def _is_good(arrays: Any) -> bool:
    try:
        jax.block_until_ready(arrays)
    except Exception:  # what the device answers for a result that never came to be
        return False
    return True
