"""Feeds an engine with a workload at the arrival times, and records what a client would see and what a step costs."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxserve.bench.report import RequestRecord, Run, StepRecord
from jaxserve.bench.workload import BenchRequest, Workload
from jaxserve.errors import JaxServeError
from jaxserve.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxserve import Engine, Event

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class StepClock:
    """Seconds that the parts of the host's work took since the last ``take``."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.seconds = {"plan": 0.0, "pack": 0.0, "commit": 0.0}

    def take(self) -> dict[str, float]:
        taken = {f"{part}_seconds": seconds for part, seconds in self.seconds.items()}
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return taken

    @contextmanager
    def watch(self, engine: "Engine") -> Iterator[None]:
        """Times the parts of an engine's host work while the context lasts."""
        owners = {"plan": engine.core.planner, "pack": engine.core.packer, "commit": engine.core}
        before = {part: vars(owner).get(part) for part, owner in owners.items()}
        for part, owner in owners.items():
            setattr(owner, part, self._timed(part, getattr(owner, part)))
        try:
            yield
        finally:
            for part, owner in owners.items():
                delattr(owner, part)  # the class has the method itself
                if before[part] is not None:  # somebody else looks at it as well
                    setattr(owner, part, before[part])

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args, **kwargs):
            start = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += self.clock() - start

        return timed


class Runner:
    """One run of a workload on an engine.

    A request's latencies count from its arrival, also where the engine was busy with a step by then or its queue was
    full; with ``max_concurrency`` from when it was let in.
    """

    def __init__(
        self,
        engine: "Engine",
        workload: Workload,
        params: SamplingParams = GREEDY,
        max_concurrency: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.engine, self.workload, self.params = engine, workload, params
        self.limit, self.clock, self.sleep = max_concurrency, clock, sleep
        self.run = Run()
        self.waiting = deque(workload.requests)
        self.alive: dict[str, RequestRecord] = {}
        self.parts = StepClock(clock)
        self.began = 0.0

    def __call__(self) -> Run:
        before = self.engine.stats()
        self.began, cpu = self.clock(), time.process_time()
        with self.parts.watch(self.engine):
            self._loop()
        self.run.duration, self.run.cpu_seconds = self._now(), time.process_time() - cpu
        after = self.engine.stats()
        self.run.recompiles = after["recompiles"] - before["recompiles"]
        self.run.preemptions = after["preemptions"] - before["preemptions"]
        self.run.prefix_hits = after["prefix_hits"] - before["prefix_hits"]
        return self.run

    def _loop(self) -> None:
        while self.waiting or self.alive:
            self._send_due()
            if self.alive:
                self._step()
            elif self.waiting:
                self.sleep(max(self.waiting[0].arrival_s - self._now(), 0.0))

    def _now(self) -> float:
        return self.clock() - self.began

    def _send_due(self) -> None:
        while self.waiting and self.waiting[0].arrival_s <= self._now():
            if self.limit is not None and len(self.alive) >= self.limit:
                return
            if not self.engine.queue_has_room(self.params):
                return
            self._send(self.waiting.popleft())

    def _send(self, request: BenchRequest) -> None:
        start = request.arrival_s if self.limit is None else self._now()
        record = self._record(request, start)
        self.run.requests.append(record)
        params = replace(self.params, max_tokens=request.output_tokens)
        try:
            request_id = self.engine.add_request(
                request.prompt_ids, params, adapter=request.adapter, tenant=request.tenant
            )
        except JaxServeError as error:
            record.error = str(error)
        else:
            self.alive[request_id] = record

    def _record(self, request: BenchRequest, start: float) -> RequestRecord:
        return RequestRecord(prompt_tokens=len(request.prompt_ids), start=start)

    def _step(self) -> None:
        before, start = self.engine.core.host_seconds, self.clock()
        events = self.engine.step()
        end = self.clock()
        for event in events:
            self._take(event, end - self.began)
        stats = self.engine.stats()
        step = StepRecord(
            seconds=end - start,
            host_seconds=self.engine.core.host_seconds - before,
            tokens=sum(len(event.token_ids) for event in events),
            running=stats["running"],
            kv_usage=stats["kv_usage"],
            **self.parts.take(),
        )
        self.run.steps.append(step)

    def _take(self, event: "Event", now: float) -> None:
        record = self.alive[event.request_id]
        record.token_times += [now] * len(event.token_ids)
        record.token_ids += event.token_ids
        if event.finish_reason is not None:
            record.error = event.error
            del self.alive[event.request_id]
