"""Finetuning inside the engine's loop: who has a lane, optimizer steps, what the losses say, and failed steps.

When the last window of a batch is in a step, the optimizer step follows it to the device at once, and with it the new
version of the adapter: the next batch and the next request already use it, before the host has read the losses.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import jax
import numpy as np

from jaxserve.adapters.method import empty_adapter
from jaxserve.adapters.residency import Residency
from jaxserve.adapters.store import AdapterStore
from jaxserve.engine.job_programs import Hyper, hyper_arrays, job_shapes
from jaxserve.engine.lane_sums import LaneSums
from jaxserve.engine.lanes import Masters, factors_of, masters_of, on_mesh, shares_of
from jaxserve.engine.results import read_losses
from jaxserve.engine.saver import JobSaver
from jaxserve.engine.sessions import Sessions
from jaxserve.engine.step import StepOutput
from jaxserve.engine.training import Progress, Training, Update
from jaxserve.engine.versions import Versions
from jaxserve.errors import AdapterError, EngineError, InvalidRequest
from jaxserve.finetune.checkpoint import Checkpoint
from jaxserve.finetune.errors import CheckpointMismatch
from jaxserve.finetune.folder import JobFolder
from jaxserve.finetune.job import Batch, Job, JobStatus, Purpose
from jaxserve.finetune.live import LiveWeights
from jaxserve.finetune.optimizer import hyperparameters, init_state
from jaxserve.finetune.queue import FinetuneQueue, Running
from jaxserve.finetune.session import Session
from jaxserve.finetune.windows import FinetunePlan
from jaxserve.kvcache.pages import PagePool
from jaxserve.models.config import ModelConfig
from pallas_kernels.lora_matmul import PAGE_RANK

MAX_FAILURES = 2  # steps with windows that fail in a row before the jobs in them are given up


class Trainer:
    """All jobs of an engine.

    Args:
      sums: owns the finetuning state, and the programs on it.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
        sums: LaneSums,
        pool: PagePool,
        residency: Residency,
        store: AdapterStore,
        *,
        row_block: int,
        max_window: int,
        clock: Callable[[], float],
    ):
        self.model, self.mesh, self.sums, self.shape = model, mesh, sums, sums.shape
        self._clock, shape = clock, sums.shape
        self.queue = FinetuneQueue(
            pool, shape.num_slots, shape.acc_pages, row_block, max_window,
            stash_blocks=shape.stash_blocks, clear=sums.clear,
        )  # fmt: skip
        self._lanes = list(range(shape.num_lanes))
        self.waiting: list[Training] = []
        self.trainings: dict[str, Training] = {}
        self._ended: list[Training] = []  # with updates that the host had not read, and that may yet fail
        self.versions = Versions(self.trainings, sums, residency, store)
        self.sessions = Sessions(self.trainings, sums, self._publish)
        self.trained_tokens = 0
        self.failures = 0
        self.held = False  # after a failed step the requests go alone once

    # jobs from outside

    def prepare(self, job: Job, folder: JobFolder | None) -> Training:
        """Places a job's arrays, from its newest checkpoint if it has one, and compiles its programs.

        On the caller's thread; nothing here waits for the loop.
        """
        masters = masters_of(job.start, self.model, self.mesh)
        state = {"masters": masters, "optimizer": on_mesh(init_state(job.config.optimizer, masters), self.mesh)}
        checkpoint = folder.latest(like=state) if folder is not None else None
        if folder is not None and checkpoint is not None:
            _check_start(checkpoint, job, self.model)
            job.restore(checkpoint.meta, folder.events())
            state = jax.tree.map(lambda saved, like: jax.device_put(saved, like.sharding), checkpoint.state, state)
        factors = factors_of(job.start, self.model)
        pages = max(1, -(-job.start.rank // PAGE_RANK))
        shapes = job_shapes(**state, factors=factors, name=job.config.optimizer, rank=job.start.rank, num_pages=pages)
        progress = Progress(**state, number=job.step, cursor=job.cursor)
        saved_step = job.step if checkpoint is not None else -1
        saver = JobSaver(job, folder, saved_step, self._clock) if folder is not None else None
        training = Training(job, saver, shapes, factors, shares_of(job.start, masters), progress, progress)
        if folder is not None:
            folder.rewind(job)  # before what takes long: others may see the job from here on, and ask for it
            job.folder = folder
        self.sums.compile(shapes, training.scaled)
        return training

    def submit(self, training: Training) -> None:
        """Raises InvalidRequest where another thread was sooner with a job of that adapter."""
        self.check_free(training.job.adapter)
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
        if training.saver is None and job.config.output_dir is not None:
            raise EngineError(f"job {job.id} cannot be resumed: its directory was closed; begin it again to go on")
        if training.lane is None and not self.has_room:
            raise EngineError(f"job {job.id} cannot be resumed: {self.full}")
        if training.saver is not None:
            training.saver.retry()
        self._resume(job)

    def _resume(self, job: Job) -> None:
        training = self.trainings[job.id]
        job.move(JobStatus.QUEUED, "resumed")
        if training.lane is None:
            self.waiting.append(training)
            if not self.has_room:  # the disk lets it go on, not a caller, whom it could refuse
                job.note("warning", f"the job waits until an adapter is closed: {self.full}")
        else:
            if training.resident:  # else it goes on when its newest version has a place in the bank
                self.queue.go_on(job)
            job.move(JobStatus.RUNNING)

    def cancel(self, job: Job) -> None:
        """Ends a job; versions it has published stay."""
        if not job.done:
            self._end(job, JobStatus.CANCELLED)

    def checkpoint(self, job: Job) -> Future | None:
        """Saves a job as the host has last read it, behind a checkpoint that is being written: that is the one returned
        then. None: it has no directory, or nothing new."""
        self._settle()  # what has been written in the meantime
        training = self.trainings.get(job.id)
        if training is None or training.saver is None:
            return None
        training.saver.save(*training.read)
        return training.saver.start()

    def close(self) -> None:
        """Saves what was read last of every job that has a directory, and leaves the directories to others."""
        for training in list(self.trainings.values()):
            if training.saver is not None:
                training.saver.save(*training.read)
                training.saver.close()
                training.saver = training.job.folder = None

    def check_free(self, adapter: str) -> None:
        """Raises InvalidRequest for a name that is being trained."""
        if any(training.job.adapter == adapter for training in list(self.trainings.values())):
            raise InvalidRequest(f"adapter {adapter!r} is being trained by another job", "adapter")

    @property
    def has_room(self) -> bool:
        """Not every lane is an open adapter's, which keeps it until a call gives it back."""
        return sum(isinstance(t.job, Session) for t in list(self.trainings.values())) < self.shape.num_lanes

    @property
    def full(self) -> str:
        """Why there is no room."""
        return f"max_finetune_jobs is {self.shape.num_lanes}, and as many adapters are open"

    def has_work(self) -> bool:
        return any(
            t.unread
            or t.saving is not None
            or t.pausing
            or t.ending
            or not (t.job.status is JobStatus.PAUSED or t.job.idle)
            for t in list(self.trainings.values())  # another thread may add one
        )

    def learnt(self, job: Job) -> Masters | None:
        """What a job has learnt so far; None: it is over."""
        training = self.trainings.get(job.id)
        return None if training is None else training.now.masters

    def is_under_way(self, job: Job) -> bool:
        """Some batch of the job waits, is in a step or has not been read."""
        training = self.trainings.get(job.id)
        return training is not None and (bool(training.unread) or not job.idle)

    def wait_for_disk(self, seconds: float) -> None:
        """Waits a little where jobs wait for nothing but the disk."""
        savers = [training.saver for training in list(self.trainings.values()) if training.saver is not None]
        if not any(saver.wait(seconds) for saver in savers):
            time.sleep(seconds)

    # lanes

    def _start_waiting(self) -> None:
        for training in list(self.waiting):
            try:
                ready = bool(self._lanes) and self.versions.make_resident(training)
            except AdapterError as error:  # the host holds as many adapters as it may
                self._end(training.job, JobStatus.FAILED, str(error), error=str(error))
                continue
            if not ready:
                return
            self.waiting.remove(training)
            training.lane = self._lanes.pop(0)
            if training.kept is not None:
                self.sums.write(training, training.kept)
                training.kept = None
            self.queue.running.append(Running(training.job, self.versions.lane_of(training)))
            training.job.move(JobStatus.RUNNING)

    def _park(self, training: Training) -> None:
        """Puts a paused job's unfinished gradients aside and gives its lane to others."""
        if training.job.batch is not None or training.job.begun() or training.loaded is not None:
            training.kept = self.sums.read(training)
            self.sums.take(training)
        self._leave_lane(training)
        if training.saver is not None and not training.saver.pending:
            training.saver.save(*training.read)

    def _leave_lane(self, training: Training) -> None:
        self.queue.forget(training.job)
        self.versions.unpin(training)
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
            self.sums.take(training)  # what is left of a batch that will not be finished
        self._leave_lane(training)
        if training.unread:
            self._ended.append(training)
        job.move(status, message, error)
        if training.saver is not None:
            training.saver.close_soon()

    # the loop

    def settle(self) -> None:
        """Moves on what waits for the disk, for a lane or a place in the bank, or for the last results of a pause."""
        self._settle()
        self._start_waiting()

    def _settle(self) -> None:
        for training in list(self.trainings.values()):
            job = training.job
            if training.saver is not None and training.saver.settle(self.pause, self._resume):
                self._end(job, JobStatus.SUCCEEDED)
            running = job.status is JobStatus.RUNNING and training.lane is not None
            if running and not training.resident and self.versions.make_resident(training):
                self._has_place(training)
            if training.lane is None or training.unread:
                continue
            if job.status is JobStatus.PAUSED and self.queue.is_idle(job) and (job.batch is None or job.batch.settled):
                self._park(training)
            elif job.status is JobStatus.RUNNING and job.exhausted:
                self._finish(training)

    def _has_place(self, training: Training) -> None:
        """The newest version is in the bank: what begins from here on is trained on that, and need not wait for it."""
        for running in self.queue.running:
            if running.job is training.job:
                running.lane = self.versions.lane_of(training)
        if training.job.status is JobStatus.RUNNING:
            self.queue.go_on(training.job)

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
        masters, optimizer, norm = self.sums.programs(training.shapes).apply(
            now.masters, now.optimizer, self.sums.take(training), hyper, training.shares
        )
        number, cursor = max(now.number, batch.number), max(now.cursor, batch.cursor_after)
        training.now = Progress(masters, optimizer, number, cursor)
        self._publish(training)
        return norm

    def _publish(self, training: Training) -> None:
        """Makes the masters the newest version of the adapter: on the device, in the next step. Where requests hold
        so many versions that the bank has no room, the job waits for one of them to end."""
        if self.versions.publish(training):
            self._has_place(training)
        else:
            self.queue.hold(training.job)

    # results

    def commit(self, plan: FinetunePlan, output: StepOutput, finite_slots: np.ndarray, chunk_rows: int) -> None:
        """Takes in the losses of a step that has been read, and what followed from them.

        Args:
          finite_slots: of the finetune slots; chunk_rows: rows of the requests' chunks, before the forward windows.
        """
        for seq, finite in read_losses(plan, output, finite_slots, chunk_rows, self.queue.row_block):
            if seq in self.queue.owner:
                _, batch = self.queue.owner[seq]
                seq.num_read += 1
                batch.finite &= finite
        self.failures, self.held = 0, False
        self._ended = [training for training in self._ended if not _has_come(training.now.masters)]
        for training in list(self.trainings.values()):
            while training.unread and training.unread[0].batch.read:
                self._update_done(training, training.unread.pop(0))

    def _update_done(self, training: Training, update: Update) -> None:
        job, batch = training.job, update.batch
        for seq in batch.sequences:
            self.queue.owner.pop(seq, None)
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
        if training.saver is not None and job.step % job.config.save_steps == 0:
            training.saver.save(*training.read)

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

    def _finish(self, training: Training) -> None:
        """The last step is read: what is left is to save the end."""
        self._leave_lane(training)
        if training.saver is None:
            self._end(training.job, JobStatus.SUCCEEDED)
            return
        training.saver.finish(training.read.masters)
        training.saver.save(*training.read)

    # faults

    def recover(self, plan: FinetunePlan | None) -> None:
        """After a step that failed on the device: its state is gone. Every job goes back to the step that the host has
        read last; jobs that were in too many failing steps in a row are given up.

        Args:
          plan: the windows of the step that failed.
        """
        blamed = [] if plan is None else [self.queue.owner.get(w.seq) for w in (*plan.grads, *plan.forwards)]
        self.held = True
        self.sums.reset()
        for training in self.trainings.values():
            self._go_back(training)
        for training in self._ended:
            _rebind_unread(training)
        self._ended = []
        self.failures += bool(blamed)
        if self.failures <= MAX_FAILURES:
            return
        for job in {owner[0] for owner in blamed if owner is not None}:
            message = f"the engine's step failed {self.failures} times in a row with windows of this job"
            self._end(job, JobStatus.FAILED, message, error=message)
        self.failures = 0

    def take_back(self, session: Session, batch: Batch) -> None:
        """Forgets a batch that a session was handed. Where it had been begun, the other batches whose gradients no
        update has taken are summed again."""
        training = self.trainings.get(session.id)
        if session.withdraw(batch) or training is None:
            return
        self.queue.clear(session)
        self.sums.take(training)
        self._go_back(training)
        session.again = [each for each in session.again if each.serial != batch.serial]

    def _go_back(self, training: Training) -> None:
        job = training.job
        begun = job.begun() + [update.batch for update in training.unread]
        begun += [job.batch] if job.batch is not None else []
        if training.kept is not None and not _is_good(training.kept):
            training.kept = None
        if training.kept is not None:
            return
        self.queue.take_back_all(job)
        # one that was summed, taken back and begun again is among them twice
        once = {batch.serial: batch.again(batch.retried) for batch in [*begun, *job.again]}
        job.again = list(once.values())
        job.batch, training.now = None, training.read
        if training.loaded is not None and training.lane is not None:
            self.sums.write(training, training.loaded)
        _rebind_unread(training)
        training.unread = []


def _rebind_unread(training: Training) -> None:
    """Gives what was read last to the versions whose steps were not: nobody has seen a token of these yet."""
    for version in {update.version for update in training.unread} | {training.version}:
        if version is not None:
            cast(LiveWeights, version.weights).rebind(training.read.masters)


def _has_come(arrays: Any) -> bool:
    return all(array.is_ready() for array in jax.tree.leaves(arrays)) and _is_good(arrays)


def _is_good(arrays: Any) -> bool:
    try:
        jax.block_until_ready(arrays)
    except Exception:  # what the device answers for a result that never came to be
        return False
    return True


def _check_start(checkpoint: Checkpoint, job: Job, model: ModelConfig) -> None:
    """Raises CheckpointMismatch where the job's start has other modules, ranks or scaling than the checkpoint's."""
    began = empty_adapter(checkpoint.meta["adapter_config"], model)
    there, here = (
        (w.scaling, {k: p.rank for k, p in w.pairs.items()}, {k: v.kind for k, v in w.vectors.items()})
        for w in (began, job.start)
    )
    if there != here:
        raise CheckpointMismatch(
            f"checkpoint {checkpoint.step}: start {job.config.start!r} has other modules, ranks or scaling",
            ["start"],
        )
