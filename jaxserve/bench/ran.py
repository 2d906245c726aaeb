"""What one run of one way to share recorded, on the engine or on the virtual clock, and what that comes to.

Two tables hold all of it, a row per request and a row per step; every figure of a report is computed from them, and can
be computed again from the CSV files.
"""

import csv
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxserve.bench.replay import Mix, mix_of
from jaxserve.bench.report import RequestRecord, failures, share_met
from jaxserve.bench.workload import BenchRequest
from jaxserve.engine.planner import Planned, Planner
from jaxserve.engine.times import StepLoad
from jaxserve.kvcache.pages import PagePool
from jaxserve.scheduler.request import NEVER, Objective
from jaxserve.scheduler.scheduler import Scheduler

NOT_OVER = "not over when the run ended"
DRAIN_SECONDS = 60.0  # at least, that requests may take to end when no more come
PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "tpot_all_tokens", "itl")


@dataclass(kw_only=True)
class Asked(RequestRecord):
    """A request of a run; it counts as served when it was over in time."""

    replica: int = 0
    tenant: str = ""
    output_tokens: int  # asked for

    @classmethod
    def of(cls, request: BenchRequest) -> "Asked":
        """One that nobody has begun to answer."""
        return cls(
            tenant=request.tenant,
            output_tokens=request.output_tokens,
            prompt_tokens=len(request.prompt_ids),
            start=request.arrival_s,
            error=NOT_OVER,
        )


class StepRow(NamedTuple):
    """One step of a device; times in seconds since the start of the run."""

    replica: int
    at: float
    seconds: float
    predicted: float
    bucket: str  # the compiled shape: gradient + chunk + decode rows
    mix: Mix
    running: int
    waiting: int
    kv_usage: float  # 0 to 1

    @property
    def end(self) -> float:
        return self.at + self.seconds


@dataclass(kw_only=True)
class Ran:
    """One run: what so many replicas did that all share their devices in one way."""

    name: str
    seconds: float  # requests came, and finetune tokens count, for so long
    replicas: int = 1
    requests: list[Asked] = field(default_factory=list)
    clipped: int = 0  # requests cut to the model's length
    steps: list[StepRow] = field(default_factory=list)
    preemptions: int = 0  # of requests
    evictions: int = 0  # of finetune sequences, whose pages requests needed
    duration: float = 0.0  # of a measured run, with what was left to do after ``seconds``
    cpu_seconds: float = 0.0  # of the process over ``duration``; of a simulation, what it took itself
    losses: dict[str, list[float]] = field(default_factory=dict)  # of optimizer steps, by adapter

    @property
    def finetune_rate(self) -> float:
        """Tokens per second and replica; one counts when its backward is done."""
        return finetune_tokens(self.steps, self.seconds) / (self.seconds * self.replicas)


def finetune_tokens(steps: Iterable[StepRow], seconds: float) -> int:
    """Tokens whose backward was done in this time."""
    return sum(step.mix.backward for step in steps if step.end <= seconds)


def drain_seconds(objective: Objective, requests: Iterable[BenchRequest]) -> float:
    """How long requests may take to end when no more come: the longest as long as its objectives allow. One that is not
    over by then counts as missed."""
    longest = max((request.output_tokens for request in requests), default=0)
    first = DRAIN_SECONDS if objective.ttft == NEVER else objective.ttft
    others = 0.0 if objective.tpot == NEVER else objective.tpot * longest
    return max(DRAIN_SECONDS, first + others)


def run_name(sharing: str, rate: float) -> str:
    """Of a run of one way to share at so many requests per second; 0: none came."""
    return f"{sharing} at {rate:g}" if rate else sharing


class Core(Protocol):
    """What an engine's core and a simulator have in common."""

    planner: Planner
    scheduler: Scheduler
    pool: PagePool


def step_row(core: Core, replica: int, planned: Planned, seconds: float, now: float) -> StepRow:
    """Of a step that took so long and was over at ``now``, before its results are taken in."""
    bucket, scheduler, pool = planned.load.bucket, core.scheduler, core.pool
    return StepRow(
        replica,
        now - seconds,
        seconds,
        planned.seconds,
        f"{bucket.grad_rows}+{bucket.chunk_rows}+{bucket.decode_rows}",
        mix_of(planned.plan),
        len(scheduler.running),
        len(scheduler.waiting),
        pool.num_used / pool.num_pages,
    )


class Watch:
    """Looks at every step that an engine plans and measures while the context lasts."""

    def __init__(self, core: Core):
        self.core = core
        self.steps: list[StepRow] = []
        self.loads: list[StepLoad] = []  # of the steps
        self.evictions = 0
        self._flying: deque[Planned] = deque()

    @contextmanager
    def __call__(self) -> Iterator["Watch"]:
        planner, scheduler = self.core.planner, self.core.scheduler
        plan, measured, forget, reclaim = planner.plan, planner.measured, planner.forget, scheduler.reclaim
        planner.plan, planner.measured = self._planning(plan), self._measuring(measured)
        planner.forget, scheduler.reclaim = self._forgetting(forget), self._reclaiming(reclaim)
        try:
            yield self
        finally:
            del planner.plan, planner.measured, planner.forget  # the class has the methods themselves
            scheduler.reclaim = reclaim

    def _planning(self, plan: Callable[..., Planned | None]) -> Callable[..., Planned | None]:
        def watched(now: float) -> Planned | None:
            planned = plan(now)
            if planned is not None:
                self._flying.append(planned)
            return planned

        return watched

    def _measuring(self, measured: Callable[..., None]) -> Callable[..., None]:
        def watched(load: StepLoad, seconds: float, now: float) -> None:
            measured(load, seconds, now)
            if not self._flying:  # sent before the context began
                return
            self.loads.append(load)
            self.steps.append(step_row(self.core, 0, self._flying.popleft(), seconds, now))

        return watched

    def _forgetting(self, forget: Callable[[], None]) -> Callable[[], None]:
        def watched() -> None:
            self._flying.clear()
            forget()

        return watched

    def _reclaiming(self, reclaim: Callable[[], bool]) -> Callable[[], bool]:
        def watched() -> bool:
            freed = reclaim()
            self.evictions += freed
            return freed

        return watched


# numbers


def serving_numbers(
    requests: Sequence[Asked], seconds: float, goals: Mapping[str, float], replicas: float = 1.0
) -> dict[str, Any]:
    """Latencies in ms, rates per second.

    Args:
      seconds: requests came, and output tokens count, for so long.
      replicas: among which the rates are shared.
    """
    done = [r for r in requests if r.error is None and r.token_times]
    values = {name: [v for r in done if (v := getattr(r, name)) is not None] for name in LATENCIES[:3]}
    values["itl"] = [later - earlier for r in done for earlier, later in pairwise(r.token_times)]
    met = share_met(requests, goals)
    in_time = sum(time <= seconds for r in requests for time in r.token_times)
    return {
        "requests": len(requests),
        "completed": len(done),
        "failures": failures(r for r in requests if r.error != NOT_OVER),
        "attainment": met,
        "attainment_by_objective": {name: share_met(requests, {name: goal}) for name, goal in goals.items()},
        "goodput": (met or 0.0) * len(requests) / (seconds * replicas),
        "output_tokens_per_s": in_time / (seconds * replicas),
        **{f"{name}_ms": percentiles(values[name]) for name in LATENCIES},
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in ms; None of no values."""
    if not values:
        return None
    array = np.asarray(values) * 1000
    found = np.percentile(array, PERCENTILES)
    return {"mean": float(array.mean())} | {f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}


def step_numbers(steps: Sequence[StepRow], seconds: float) -> dict[str, Any]:
    """Of the steps of the window: pages in use, and how far predictions were off."""
    inside = [step for step in steps if step.end <= seconds]
    weights = np.array([step.seconds for step in inside])
    usage = np.array([step.kv_usage for step in inside])
    errors = np.array([abs(s.predicted / s.seconds - 1) for s in inside if s.predicted < float("inf") and s.seconds])
    return {
        "steps": len(inside),
        "kv_usage_mean": float(np.average(usage, weights=weights)) if weights.sum() else None,
        "kv_usage_max": float(usage.max()) if len(usage) else None,
        "prediction_error_p90": float(np.quantile(errors, 0.9)) if len(errors) else None,
    }


# tables

REQUEST_COLUMNS = (
    "run", "replica", "tenant", "arrival_s", "prompt_tokens", "asked_tokens", "output_tokens", "ttft_ms", "tpot_ms",
    "tpot_all_tokens_ms", "error", "token_times_s",
)  # fmt: skip
STEP_COLUMNS = (
    "run", "replica", "at_s", "seconds", "predicted_s", "shape", *Mix._fields, "running", "waiting", "kv_usage",
)  # fmt: skip


def write_tables(directory: Path, runs: Iterable[Ran]) -> None:
    """requests.csv and steps.csv; times to the nanosecond, so that sums and shares come out the same again."""
    with (
        open(directory / "requests.csv", "w", newline="", encoding="utf-8") as requests,
        open(directory / "steps.csv", "w", newline="", encoding="utf-8") as steps,
    ):
        to_requests, to_steps = csv.writer(requests), csv.writer(steps)
        to_requests.writerow(REQUEST_COLUMNS)
        to_steps.writerow(STEP_COLUMNS)
        for ran in runs:
            to_requests.writerows(_request_row(ran.name, r) for r in ran.requests)
            to_steps.writerows(_step_row(ran.name, s) for s in ran.steps)


def _request_row(name: str, r: Asked) -> list[Any]:
    times = [r.ttft, r.tpot, r.tpot_all_tokens] if r.token_times else [None] * 3
    return [
        name, r.replica, r.tenant, f"{r.start:.9f}", r.prompt_tokens, r.output_tokens, r.num_outputs,
        *("" if t is None else f"{t * 1000:.6f}" for t in times), r.error or "",
        " ".join(f"{t:.9f}" for t in r.token_times),
    ]  # fmt: skip


def _step_row(name: str, s: StepRow) -> list[Any]:
    times = (f"{value:.9f}" for value in (s.at, s.seconds, s.predicted))
    return [name, s.replica, *times, s.bucket, *s.mix, s.running, s.waiting, f"{s.kv_usage:.6f}"]


def read_tables(directory: Path) -> dict[str, tuple[list[Asked], list[StepRow]]]:
    """(requests, steps) of each run that ``write_tables`` wrote."""
    found: dict[str, tuple[list[Asked], list[StepRow]]] = {}
    with open(directory / "requests.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["run"], ([], []))[0].append(
                Asked(
                    replica=int(row["replica"]),
                    tenant=row["tenant"],
                    start=float(row["arrival_s"]),
                    prompt_tokens=int(row["prompt_tokens"]),
                    output_tokens=int(row["asked_tokens"]),
                    error=row["error"] or None,
                    token_times=[float(time) for time in row["token_times_s"].split()],
                )
            )
    with open(directory / "steps.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["run"], ([], []))[1].append(
                StepRow(
                    replica=int(row["replica"]),
                    at=float(row["at_s"]),
                    seconds=float(row["seconds"]),
                    predicted=float(row["predicted_s"]),
                    bucket=row["shape"],
                    mix=Mix(*(int(row[name]) for name in Mix._fields)),
                    running=int(row["running"]),
                    waiting=int(row["waiting"]),
                    kv_usage=float(row["kv_usage"]),
                )
            )
    return found
