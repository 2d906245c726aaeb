"""Replays requests against an engine while its finetuning jobs run, and records what every step was made of.

A finetune token counts once, when its backward is done: where a step has failed, the batches that are made again bring
no new ones.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxserve.bench.report import RequestRecord, Run, StepRecord
from jaxserve.bench.runner import GREEDY, Runner
from jaxserve.bench.workload import BenchRequest, Workload
from jaxserve.finetune.job import TERMINAL
from jaxserve.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxserve import Engine, Event, FinetuneJob

STOPPED = "stopped"  # the error of requests that were in flight when a run was ended
IDLE_SECONDS = 0.05  # most that the loop sleeps without looking around


@dataclass(kw_only=True)
class ServedRequest(RequestRecord):
    """A request, and who answered it."""

    output_tokens: int  # asked for
    tenant: str = ""
    adapter: str | None = None
    version: int | None = None
    over: bool = False


class Mix(NamedTuple):
    """Tokens of one step by what they are for, padding left out."""

    decode: int = 0
    prefill: int = 0
    forward: int = 0  # of finetuning: windows whose backward is still to come, and validation
    backward: int = 0  # of finetuning: gradient rows; of a run, those that no earlier attempt at their batch had


@dataclass(frozen=True, kw_only=True)
class MixedStep(StepRecord):
    """One turn of the loop, and what the step that it sent to the device was made of."""

    at: float  # since the start of the run
    mix: Mix
    bucket: str  # the compiled shape: gradient + chunk + decode rows; empty where nothing was sent
    waiting: int


class Learnt(NamedTuple):
    """An optimizer step whose loss the host has read."""

    at: float  # since the start of the run
    step: int
    loss: float


@dataclass(kw_only=True)
class MixedRun(Run):
    """All that one run recorded."""

    learnt: dict[str, list[Learnt]] = field(default_factory=dict)  # by adapter
    served_until: float = 0.0  # when the last request ended
    trained_until: float = 0.0  # when the last job ended, or the run did

    @property
    def mixed(self) -> list[MixedStep]:
        return [step for step in self.steps if isinstance(step, MixedStep)]

    @property
    def served(self) -> list[ServedRequest]:
        return [request for request in self.requests if isinstance(request, ServedRequest)]

    @property
    def finetune_tokens(self) -> int:
        return sum(step.mix.backward for step in self.mixed)


class Replay(Runner):
    """One run of a workload beside jobs.

    Args:
      jobs: the engine's jobs, by adapter. A request for an adapter that has no version yet goes to the base model.
      finish_jobs: go on after the last request until every job is over; otherwise the run ends with the requests.
      stopped: asked between two steps; True ends the run, requests in flight are aborted.
      each_turn: called between two steps.
    """

    run: MixedRun

    def __init__(
        self,
        engine: "Engine",
        workload: Workload,
        jobs: "Mapping[str, FinetuneJob]",
        params: SamplingParams = GREEDY,
        *,
        max_concurrency: int | None = None,
        finish_jobs: bool = True,
        stopped: Callable[[], bool] = lambda: False,
        each_turn: "Callable[[Replay], None]" = lambda replay: None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        super().__init__(engine, workload, params, max_concurrency, clock, sleep)
        self.run = MixedRun(learnt={adapter: [] for adapter in jobs})
        self.jobs, self.finish_jobs, self.stopped, self.each_turn = dict(jobs), finish_jobs, stopped, each_turn
        self._sent: tuple[Mix, str] = (Mix(), "")
        self._left: dict[tuple[int, int], int] = {}  # rows whose backward has not come yet, by batch and example
        self._steps_before = {adapter: job.step for adapter, job in jobs.items()}  # of jobs that go on

    @property
    def now(self) -> float:
        """Seconds since the start of the run."""
        return self._now()

    @property
    def jobs_are_over(self) -> bool:
        return all(job.status in TERMINAL for job in self.jobs.values())

    def __call__(self) -> MixedRun:
        super().__call__()
        return self.run

    def _loop(self) -> None:
        with self._watched_plans():
            while self._goes_on():
                under_way = bool(self.waiting or self.alive), not self.jobs_are_over
                self._send_due()
                if self.engine.has_work():
                    self._step()
                else:
                    self.sleep(self._idle_seconds())
                self._note_progress(*under_way)
                self.each_turn(self)
        for request_id in list(self.alive):
            self.engine.abort(request_id)
        for record in self.alive.values():
            record.error = STOPPED

    def _goes_on(self) -> bool:
        if self.stopped():
            return False
        return bool(self.waiting or self.alive) or (self.finish_jobs and not self.jobs_are_over)

    def _idle_seconds(self) -> float:
        until_next = self.waiting[0].arrival_s - self._now() if self.waiting else IDLE_SECONDS
        return min(max(until_next, 0.0), IDLE_SECONDS)

    def _note_progress(self, serving: bool, training: bool) -> None:
        """After a turn; ``serving``, ``training``: there were requests, and jobs, before it."""
        now = self._now()
        for adapter, job in self.jobs.items():
            known = self.run.learnt[adapter]
            done = self._steps_before[adapter] + len(known)
            if job.step > done:
                known += [Learnt(now, step, loss) for step, loss in enumerate(job.losses[done:], done + 1)]
        if serving:
            self.run.served_until = now
        if training:
            self.run.trained_until = now

    def _send(self, request: BenchRequest) -> None:
        known = {info.name for info in self.engine.list_adapters()}
        super()._send(request if request.adapter in known else replace(request, adapter=None))

    def _record(self, request: BenchRequest, start: float) -> ServedRequest:
        return ServedRequest(
            prompt_tokens=len(request.prompt_ids),
            start=start,
            output_tokens=request.output_tokens,
            tenant=request.tenant,
            adapter=request.adapter,
        )

    def _take(self, event: "Event", now: float) -> None:
        record = self.alive.get(event.request_id)
        if record is None:
            return
        if isinstance(record, ServedRequest):
            record.version, record.over = event.adapter_version, event.finish_reason is not None
        super()._take(event, now)

    def _step(self) -> None:
        at, self._sent = self._now(), (Mix(), "")
        super()._step()
        mix, bucket = self._sent
        plain, waiting = self.run.steps.pop(), self.engine.stats()["waiting"]
        self.run.steps.append(MixedStep(**vars(plain), at=at, mix=mix, bucket=bucket, waiting=waiting))

    @contextmanager
    def _watched_plans(self) -> Iterator[None]:
        """Looks at every plan on its way to the device."""
        packer = self.engine.core.packer
        pack = packer.pack

        def watched(plan: Any, bucket: Any, *args: Any, **options: Any) -> Any:
            mix = mix_of(plan)
            mix = mix._replace(backward=mix.backward - self._repeated(plan))
            self._sent = (mix, f"{bucket.grad_rows}+{bucket.chunk_rows}+{bucket.decode_rows}")
            return pack(plan, bucket, *args, **options)

        packer.pack = watched
        try:
            yield
        finally:
            packer.pack = pack

    def _repeated(self, plan: Any) -> int:
        """Gradient rows that an earlier attempt at their batch has had."""
        trainer, repeated = self.engine.core.trainer, 0
        if trainer is None or plan.finetune is None:
            return 0
        for seq, start, length in plan.finetune.grads:
            key = trainer.queue.owner[seq][1].serial, id(seq.token_ids)
            left = self._left.get(key, seq.num_rows)
            repeated += length - max(min(start + length, left) - start, 0)
            self._left[key] = min(start, left)
        return repeated


def mix_of(plan: Any) -> Mix:
    """What a StepPlan's rows are for."""
    grads, forwards = plan.finetune or ((), ())
    return Mix(
        decode=len(plan.decoding),
        prefill=sum([length for _, _, length in plan.chunks]),
        forward=sum([length for _, _, length in forwards]),
        backward=sum([length for _, _, length in grads]),
    )
