"""Finetuning inside the engine's loop: lanes, optimizer steps, new versions.

When the last window of a batch is in a step, the optimizer step follows it to the device at once, and with it the new
version of the adapter: the next batch and the next request already use it, before the host has read the losses.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.adapters.bank import sites_touched
from jaxserve.adapters.residency import Residency
from jaxserve.adapters.store import AdapterStore, AdapterVersion
from jaxserve.engine.gradient import TrainShape, TrainState
from jaxserve.engine.lanes import masters_of, pairs_of, scales_of, take_gradients
from jaxserve.engine.step import StepOutput
from jaxserve.finetune.job import Batch, Job, JobStatus
from jaxserve.finetune.live import LiveWeights
from jaxserve.finetune.optimizer import apply_gradients, hyperparameters, init_state
from jaxserve.finetune.queue import FinetuneQueue, Running
from jaxserve.finetune.windows import FinetunePlan, Lane
from jaxserve.kvcache.pages import PagePool
from jaxserve.models.config import ModelConfig

logger = logging.getLogger(__name__)


@jax.jit
def clear_pages(train: TrainState, page_X) -> TrainState:
    """Sets accumulator pages back to zero; entries out of range are dropped."""
    return replace(train, acc=[tuple(pool.at[page_X].set(0, mode="drop") for pool in layer) for layer in train.acc])


@dataclass(eq=False)
class Training:
    """A job's side of the device."""

    job: Job
    lane_pages: tuple[int, ...]
    masters: Any
    optimizer: Any
    scales: dict[str, np.ndarray]
    version: AdapterVersion
    unread: list[tuple[Batch, jax.Array]]  # optimizer steps whose gradient norm the host has not read


class Trainer:
    """All jobs of an engine."""

    def __init__(
        self,
        model: ModelConfig,
        mesh: jax.sharding.Mesh,
        shape: TrainShape,
        state: TrainState,
        pool: PagePool,
        residency: Residency,
        store: AdapterStore,
        *,
        lanes: int,
        row_block: int,
        max_window: int,
    ):
        self.model, self.mesh, self.shape, self.state = model, mesh, shape, state
        self.residency, self.store = residency, store
        self.queue = FinetuneQueue(pool, shape.num_slots, shape.acc_pages, row_block, max_window, clear=self._clear)
        pages = shape.lane_pages // lanes
        self._lanes = [tuple(range(i * pages, (i + 1) * pages)) for i in range(lanes)]
        self.waiting: list[Job] = []
        self.jobs: dict[str, Job] = {}
        self.training: dict[str, Training] = {}
        self.trained_tokens = 0

    # jobs

    def submit(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.waiting.append(job)

    def cancel(self, job: Job) -> None:
        """Ends a job; versions it has published stay."""
        if not job.done:
            self._release(job)
            job.move(JobStatus.CANCELLED)

    def has_work(self) -> bool:
        return any(job.status in (JobStatus.QUEUED, JobStatus.RUNNING) for job in self.jobs.values())

    def _start_waiting(self) -> None:
        for job in [job for job in self.waiting if job.status is JobStatus.QUEUED]:
            if not self._lanes:
                return
            version = self.store.put(job.adapter, self._live(job, masters := self._masters(job), 0))
            if not self.residency.try_acquire(version):
                return
            self.waiting.remove(job)
            lane_pages = self._lanes.pop(0)
            optimizer = init_state(job.config.optimizer, masters)
            scales = scales_of(job.start, self.model)
            training = Training(job, lane_pages, masters, optimizer, scales, version, [])
            self.training[job.id] = training
            job.version = version.version
            self.queue.running.append(Running(job, self._lane(training)))
            job.move(JobStatus.RUNNING)

    def _masters(self, job: Job) -> Any:
        return masters_of(job.start, self.model, self.mesh)

    def _live(self, job: Job, masters: Any, step: int) -> Any:
        return LiveWeights(job.start, masters, pairs_of, job.id, step)

    def _lane(self, training: Training) -> Lane:
        members = sorted({member for _, member in training.version.weights.scaling})
        pages = self.residency.pages_of(training.version)
        lane_pages = training.lane_pages[: len(pages)]
        return Lane(training.lane_pages[0], pages, sites_touched(members), lane_pages)

    def _release(self, job: Job) -> None:
        """Takes a job out of the lanes."""
        self.queue.drop(job)
        if job in self.waiting:
            self.waiting.remove(job)
        training = self.training.pop(job.id, None)
        if training is not None:
            self._take_gradients(training)  # what is left of a batch that will not be finished
            self.residency.release(training.version)
            self._lanes.append(training.lane_pages)

    def _clear(self, pages: list[int]) -> None:
        padded = np.full(-(-len(pages) // 64) * 64, self.shape.acc_pages, np.int32)
        padded[: len(pages)] = pages
        self.state = clear_pages(self.state, padded)

    # the loop

    def plan(self, grad_rows: int, chunk_rows: int) -> FinetunePlan | None:
        """The finetune rows of the next step."""
        self._start_waiting()
        return self.queue.plan(grad_rows, chunk_rows)

    def after_dispatch(self) -> None:
        """Sends the optimizer steps of batches that are wholly in flight after them."""
        for job, batch in self.queue.retire():
            self._optimize(self.training[job.id], batch)

    def _optimize(self, training: Training, batch: Batch) -> None:
        job = training.job
        gradients = self._take_gradients(training)
        hyper = hyperparameters(job.config, job.total_steps, batch.number - 1)
        training.masters, training.optimizer, norm = apply_gradients(
            job.config.optimizer, training.masters, training.optimizer, gradients, hyper
        )
        training.unread.append((batch, norm))
        job.batch = None
        self._publish(training, batch.number)

    def _take_gradients(self, training: Training) -> Any:
        """A lane's gradients, in the form of its masters; the lane is zero afterwards."""
        lanes, gradients = take_gradients(
            self.state.lanes,
            jnp.asarray(training.lane_pages, jnp.int32),
            training.scales,
            mesh=self.mesh,
            rank=training.job.start.rank,
            num_layers=self.model.num_layers,
        )
        self.state = replace(self.state, lanes=lanes)
        return gradients

    def _publish(self, training: Training, step: int) -> None:
        """Makes the masters the newest version of the adapter: on the device, in the next step."""
        job, old = training.job, training.version
        version = self.store.put(job.adapter, self._live(job, training.masters, step))
        self.residency.release(old)
        if not self.residency.try_acquire(version):
            raise RuntimeError(f"no room in the adapter bank for version {version.version} of {job.adapter!r}")
        self.residency.drop(old)
        training.version, job.version = version, version.version
        for running in self.queue.running:
            if running.job is job:
                running.lane = self._lane(training)

    def commit(self, plan: FinetunePlan, output: StepOutput, finite_slots: np.ndarray) -> None:
        """Takes in the losses of a step that has been read, and what followed from them."""
        loss_W, logprob_W = np.asarray(output.loss_W), np.asarray(output.train_logprob_W)
        row = 0
        for window in plan.grads:
            seq, rows = window.seq, slice(row, row + window.length)
            seq.losses[window.start + 1 : window.end + 1] = loss_W[rows]
            seq.logprobs[window.start + 1 : window.end + 1] = logprob_W[rows]
            row += -(-window.length // self.queue.row_block) * self.queue.row_block
            if id(seq) in self.queue.owner:
                _, batch = self.queue.owner[id(seq)]
                batch.num_read += 1
                batch.finite &= bool(np.isfinite(loss_W[rows]).all()) and bool(finite_slots[seq.slot])
        for training in list(self.training.values()):
            while training.unread and training.unread[0][0].read:
                self._step_done(training, *training.unread.pop(0))

    def _step_done(self, training: Training, batch: Batch, norm: jax.Array) -> None:
        job = training.job
        for seq in batch.sequences:
            self.queue.owner.pop(id(seq), None)
        size = float(norm)
        if not (batch.finite and np.isfinite(size)):
            self._not_finite(training, batch)
            return
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
            adapter_version=job.version,
        )
        if job.step == job.total_steps:
            self._release(job)
            job.move(JobStatus.SUCCEEDED)

    def _not_finite(self, training: Training, batch: Batch) -> None:
        """An update that is not finite was not applied. Its batch is tried once more, then the job fails."""
        job = training.job
        if batch.retried:
            message = f"loss or gradient of step {batch.number} is not finite, twice"
            self._release(job)
            job.move(JobStatus.FAILED, message, error=message)
            return
        job.note("status", f"loss or gradient of step {batch.number} is not finite; its data are tried again")
        again = Batch(batch.number, batch.examples, batch.cursor_after)
        again.retried = True
        job.again.append(again)
