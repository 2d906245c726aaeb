"""The engine's planning on a virtual clock: real scheduler, pages, latency budget and finetune windows, no arrays.

A device is a function from a step to its seconds: ``RooflineDevice`` computes them from a model's floating point
operations and bytes on a named accelerator, ``FittedDevice`` has them from the measurements of a running engine.
Adapters are always resident. What is simulated is who computes what, and when; with a ``FakeModel`` also what comes of
it, so that a page or an adapter that is not a request's own shows in its tokens.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxserve.bench import roofline
from jaxserve.bench.fake_model import FakeModel
from jaxserve.bench.ran import StepRow, step_row
from jaxserve.bench.report import RequestRecord
from jaxserve.bench.workload import BenchRequest
from jaxserve.config import Config
from jaxserve.engine.buckets import Buckets
from jaxserve.engine.planner import NOTHING, Planned, Planner
from jaxserve.engine.sharing import sharing
from jaxserve.engine.times import StepLoad, StepTimes
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Dataset
from jaxserve.finetune.examples import Example
from jaxserve.finetune.job import Job
from jaxserve.finetune.queue import FinetuneQueue, Running
from jaxserve.finetune.windows import FinetunePlan, Lane, WindowRows
from jaxserve.kvcache.pages import PagePool
from jaxserve.models.config import ModelConfig
from jaxserve.sampling import SamplingParams
from jaxserve.scheduler.plan import NO_REQUESTS, StepResult
from jaxserve.scheduler.request import NO_OBJECTIVE, Objective, Request
from jaxserve.scheduler.request import Sequence as Choice
from jaxserve.scheduler.scheduler import Scheduler, SchedulerConfig
from jaxserve.scheduler.slo import LatencyBudget

RUN_AHEAD = 2  # steps that the device has and the host has not read, at most
UNBOUNDED = 10**9
TRAINED = "trained"  # the adapter of made-up examples
ENDLESS: dict[str, Any] = {"max_steps": 10**9, "schedule": "constant"}


class Device(Protocol):
    """How long steps take."""

    def seconds(self, planned: Planned) -> float:
        """Of one step, padding and all."""
        ...


class FittedDevice:
    """A running engine's model of its own steps, with noise if wanted.

    Args:
      noise: standard deviation of a step's relative error.
    """

    def __init__(self, times: StepTimes, noise: float = 0.0, seed: int = 0):
        self.times, self.noise, self._rng = times, noise, np.random.default_rng(seed)

    def seconds(self, planned: Planned) -> float:
        return self.times.predict(planned.load) * max(1 + self.noise * self._rng.standard_normal(), 0.1)


class _Padding(roofline.Segment):
    """Rows that hold nothing: products are computed for them, attention is not."""

    def keys(self, window: int | None) -> int:
        return 0

    def keys_read(self, window: int | None) -> int:
        return 0


class RooflineDevice:
    """A named accelerator running a model.

    Args:
      rank: of an adapter that no job trains; job_ranks: of the jobs' adapters, in the order of their lanes.
      targets: the linear layers that every adapter changes.
      remat: of gradient rows; None: they have a stash.
      host_seconds: from one step's end to the next one's start.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: roofline.Device,
        efficiency: roofline.Efficiency = roofline.EXPECTED,
        *,
        tensor_parallel: int = 1,
        rank: int = 16,
        job_ranks: Mapping[str, int] | None = None,
        targets: Sequence[str] = roofline.ALL_LINEAR,
        remat: str | None = "attention",
        host_seconds: float = 0.0,
    ):
        self.model, self.device, self.efficiency = model, device, efficiency
        self.rank, self.targets, self.host_seconds = rank, tuple(targets), host_seconds
        self._job_ranks: dict[Any, int] = dict(job_ranks or {})
        self._lane_ranks = tuple(self._job_ranks.values())
        self._steps = roofline.Steps(model, tensor_parallel=tensor_parallel, remat=remat)
        self._clock = roofline.StepClock(self._steps, device, efficiency)

    def seconds(self, planned: Planned) -> float:
        return self._clock.seconds(self.load(planned)) + self.host_seconds

    def alone(self, parts: Iterable[roofline.Work]) -> float:
        """Seconds of a step of these parts that has the device to itself."""
        return roofline.seconds(parts, self.device, self.efficiency) + self.host_seconds

    def parts(self, planned: Planned) -> tuple[roofline.Work, ...]:
        return self._steps.work(self.load(planned))

    def load(self, planned: Planned) -> roofline.StepLoad:
        """The step in the terms of the roofline."""
        plan, bucket = planned.plan, planned.load.bucket
        grads, forwards = plan.finetune or FinetunePlan()
        blocks = [roofline.Segment(length, start) for _, start, length in (*plan.chunks, *forwards)]
        trained = [roofline.Segment(length, start) for _, start, length in grads]
        idle_block = bucket.chunk_rows - sum([rows for rows, _ in blocks])
        idle_grad = bucket.grad_rows - sum([rows for rows, _ in trained])
        if idle_block > 0:
            blocks.append(_Padding(idle_block))
        if idle_grad > 0:
            trained.append(_Padding(idle_grad))
        requests = _adapters(plan.decoding).union([chunk.seq.request.adapter for chunk in plan.chunks]) - {None}
        lanes = {seq.lane.index for seq, _, _ in (*grads, *forwards)}
        ranks = [self._job_ranks.get(name, self.rank) for name in requests]
        return roofline.StepLoad(
            decodes=[*plan.positions, *[0] * (bucket.decode_rows - len(plan.positions))],
            chunks=blocks,
            grads=trained,
            stashed_rows=sum([length for seq, _, length in forwards if seq.stash_blocks]),
            adapters=(*ranks, *map(self._lane_rank, lanes)),
            adapter_rows=planned.load.adapter_rows,
            grad_rank=self._grad_rank(grads),
            targets=self.targets,
        )

    def _lane_rank(self, lane: int) -> int:
        return self._lane_ranks[lane] if self._lane_ranks else self.rank

    def _grad_rank(self, grads: Sequence[WindowRows]) -> int:
        """Of gradient rows on average."""
        if len(set(self._lane_ranks)) < 2 or not grads:
            return self._lane_rank(0)
        rows = [(length, self._lane_rank(seq.lane.index)) for seq, _, length in grads]
        return round(sum(length * rank for length, rank in rows) / sum(length for length, _ in rows))


@lru_cache(maxsize=1)  # most steps have the same decode rows as the one before
def _adapters(decoding: tuple[Choice, ...]) -> frozenset[object]:
    return frozenset([seq.request.adapter for seq in decoding])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The sizes of a simulated engine, and what its requests are promised."""

    limits: SchedulerConfig
    num_pages: int
    page_size: int = 16
    enable_prefix_caching: bool = True
    max_grad_rows: int = 0  # 0: no finetuning
    train_slots: int = 8
    acc_pages: int | None = None  # by default two sequences of full length
    stash_blocks: int = 0  # row blocks between forward and backward
    objectives: tuple[Objective, ...] = (NO_OBJECTIVE,)  # the first one is every request's
    finetune_floor: float = 0.0
    sharing: str = "coserve"


@dataclass
class Simulated:
    """What came of a run; times in seconds of the virtual clock."""

    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    preemptions: int = 0
    evictions: int = 0  # of finetune sequences, whose pages requests needed


class VirtualTraining:
    """Jobs without arrays: batches follow each other as in the engine."""

    held = False

    def __init__(self, settings: Settings, pool: PagePool, jobs: Iterable[Job]):
        per_seq = pool.pages_for(settings.limits.max_model_len)
        self.queue = FinetuneQueue(
            pool,
            settings.train_slots,
            2 * per_seq if settings.acc_pages is None else settings.acc_pages,
            settings.limits.row_block,
            settings.max_grad_rows,
            stash_blocks=settings.stash_blocks,
            clear=lambda pages: None,
        )
        self.queue.running = [Running(job, Lane(i, (), (), ())) for i, job in enumerate(jobs)]
        self.steps_done: dict[str, int] = {}  # optimizer steps by adapter
        self.evictions = 0

    def give_way(self) -> bool:
        """Frees pages of a sequence, if one can be taken back."""
        gave_way = self.queue.give_way()
        self.evictions += gave_way
        return gave_way

    def settle(self) -> None:
        self.queue.running = [running for running in self.queue.running if not running.job.exhausted]

    def after_dispatch(self) -> None:
        """Batches that are wholly planned end in an optimizer step."""
        for job, batch in self.queue.retire():
            job.batch = None
            self.steps_done[job.adapter] = self.steps_done.get(job.adapter, 0) + 1
            for seq in batch.sequences:
                self.queue.owner.pop(seq, None)


class _Resident:
    """Every adapter is on the device."""

    def try_acquire(self, version: object, /) -> bool:
        return True

    def release(self, version: object, /) -> None: ...


class _Flying(NamedTuple):
    planned: Planned
    tokens: list[int]
    sent: float
    end: float


class Simulator:
    """One engine on a virtual clock.

    Args:
      look: called after every turn of the loop.
      model: draws the tokens; None: all of them are 0.
      buckets: of an engine that is there; by default those that one with these settings and jobs has.
      replica: its number, in the rows of its steps.
    """

    def __init__(
        self,
        settings: Settings,
        device: Device,
        jobs: Sequence[Job] = (),
        look: "Callable[[Simulator], None]" = lambda simulator: None,
        model: FakeModel | None = None,
        buckets: Buckets | None = None,
        replica: int = 0,
    ):
        limits = replace(settings.limits, max_queue=UNBOUNDED)  # others wait outside, and it counts for them as well
        self.settings, self.device, self.look, self.model, self.replica = settings, device, look, model, replica
        self.pool = PagePool(settings.num_pages, settings.page_size, settings.enable_prefix_caching)
        self.scheduler = Scheduler(limits, self.pool, _Resident())
        rows = settings.max_grad_rows if jobs else 0
        sizes = limits.max_chunk_rows, limits.max_num_seqs, limits.row_block
        buckets = buckets or Buckets.make(*sizes, rows, settings.stash_blocks > 0)
        budget = LatencyBudget(settings.objectives, settings.finetune_floor)
        self.planner = Planner(self.scheduler, buckets, limits.max_model_len, budget, sharing(settings.sharing))
        self.training = VirtualTraining(settings, self.pool, jobs) if jobs else None
        if self.training is not None:
            self.planner.finetuning = self.training
            self.scheduler.reclaim = self.training.give_way
        for bucket in buckets:
            nothing = Planned(NOTHING, StepLoad(bucket), 0.0)
            self.planner.times.calibrate(bucket, False, self._calibrated(nothing))
        self.now = self._free_at = self._last_done = 0.0
        self._flying: deque[_Flying] = deque()
        self._records: dict[Choice, RequestRecord] = {}  # of the living
        self._decoding: tuple[Choice, ...] = ()  # in the step that was read last
        self._decoding_times: list[list[float]] = []
        self.run = Simulated()

    def _calibrated(self, nothing: Planned) -> float:
        if isinstance(self.device, FittedDevice):
            return self.device.times.base.get((nothing.load.bucket, False), float("inf"))
        return self.device.seconds(nothing)

    def __call__(self, requests: Sequence[BenchRequest], until: float | None = None) -> Simulated:
        """Serves requests to their end, or until a time."""
        with _uncollected():
            return self._serve(deque(sorted(requests, key=lambda request: request.arrival_s)), until)

    def _serve(self, coming: deque[BenchRequest], until: float | None) -> Simulated:
        end = float("inf") if until is None else until
        while self.now < end:
            while coming and coming[0].arrival_s <= self.now:
                self._add(coming.popleft())
            if not (coming or self.scheduler.has_requests) and until is None:
                break
            if not self._turn():
                if not coming:
                    break
                self.now = max(self.now, coming[0].arrival_s)
            self.look(self)
        for seq, record in self._records.items():
            record.token_ids = seq.output_ids
        self.run.preemptions = self.scheduler.counts().preemptions
        self.run.evictions = self.training.evictions if self.training else 0
        return self.run

    def _add(self, request: BenchRequest) -> None:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=request.output_tokens)
        self.add(
            Request(
                id=str(len(self.run.requests)),
                prompt_ids=request.prompt_ids,
                params=params,
                adapter=request.adapter,
                adapter_digest=(request.adapter or "").encode(),
                tenant=request.tenant,
                arrival=request.arrival_s,
                objective=self.settings.objectives[0],
            )
        )

    def add(self, request: Request) -> list[RequestRecord]:
        """Queues a request. Returns a record of each of its choices."""
        added = []
        for choice in self.scheduler.add(request):
            record = RequestRecord(prompt_tokens=len(request.prompt_ids), start=request.arrival)
            self._records[choice] = record
            added.append(record)
        self.run.requests += added
        return added

    def _turn(self) -> bool:
        """One turn of the loop: the next step is sent, the one before is read. False: nothing to do."""
        planned = self.planner.plan(self.now)
        if planned is not None:
            self._free_at = max(self.now, self._free_at) + self.device.seconds(planned)
            tokens = self.model.run(planned.plan) if self.model else [0] * planned.plan.num_samples
            self._flying.append(_Flying(planned, tokens, self.now, self._free_at))
            if self.training is not None:
                self.training.after_dispatch()
            if len(self._flying) < RUN_AHEAD:
                return True
        if not self._flying:
            return False
        self._read(self._flying.popleft())
        return True

    def _read(self, done: _Flying) -> None:
        planned, plan = done.planned, done.planned.plan
        self.now = now = max(self.now, done.end)
        seconds = now - max(done.sent, self._last_done)
        self.planner.measured(planned.load, seconds, now)
        self._last_done = now
        self.run.steps.append(step_row(self, self.replica, planned, seconds, now))
        if plan.index == NO_REQUESTS:
            return
        result = StepResult(done.tokens, [True] * len(done.tokens), [True] * len(plan.chunks))
        apart, outcomes = self.scheduler.read(plan, result, now)
        for times in self._times_of(plan.decoding, apart):
            times.append(now)
        for seq, token, finish_reason, _ in outcomes:
            assert token is not None, "every number is finite"
            self._records[seq].token_times.append(now)
            if finish_reason is not None:
                self._records.pop(seq).token_ids = seq.output_ids

    def _times_of(self, decoding: tuple[Choice, ...], apart: set[int]) -> list[list[float]]:
        """The token times of these sequences, but for those of some rows."""
        if apart:
            return [self._records[seq].token_times for row, seq in enumerate(decoding) if row not in apart]
        if decoding is not self._decoding:
            self._decoding, self._decoding_times = decoding, [self._records[seq].token_times for seq in decoding]
        return self._decoding_times


@contextmanager
def _uncollected() -> Iterator[None]:
    """A run keeps what it makes, and leaves nothing behind that reference counts do not find: looking for cycles in it
    again and again takes a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def endless_job(adapter: str, lengths: Sequence[int], tenant: str = "", **config: Any) -> Job:
    """A job over examples of these lengths that goes on for ever."""
    examples = tuple(
        Example(np.zeros(length, np.int32), np.ones(length, np.float32), index) for index, length in enumerate(lengths)
    )
    settings = FinetuneConfig(**ENDLESS | config)
    return Job(adapter, settings, Dataset(examples), start=None, tenant=tenant)  # pyright: ignore[reportArgumentType]


def endless_jobs(config: Config) -> dict[str, FinetuneConfig]:
    """By adapter: those of coserve.jobs, or one on made-up examples; none of them ends by itself."""
    shared: dict[str, Any] = {name: getattr(config.job, name) for name in FinetuneConfig.model_fields}
    if not config.coserve.jobs:
        shared["batch_size"] = config.bench.finetune_batch
        return {TRAINED: FinetuneConfig(**shared | ENDLESS)}
    return {job.adapter: FinetuneConfig(**shared | dict(job.settings) | ENDLESS) for job in config.coserve.jobs}
