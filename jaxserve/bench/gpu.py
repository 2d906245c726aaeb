"""``python -m jaxserve.bench gpu``: what the kernels and the engine reach on the GPU that is here, in eight minutes.

Random weights, no network. A part that fails is told with its reason and the others run on; figures are written after
every part. Parts stop between two measurements when their time is over; where one hangs, the process ends at the limit.
"""

import argparse
import json
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from jaxserve.bench.roofline import DEVICES, Device
from jaxserve.bench.serving import versions

T = TypeVar("T")

LIMIT = 480.0  # seconds of a whole run
PACKAGES = ("jaxserve", "jax", "jaxlib", "jax-cuda13-plugin", "numpy", "torch", "peft", "transformers")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number, and the best that it can be where that is known."""

    name: str
    value: float | None  # None: could not be measured, the note says why
    unit: str
    bound: float | None = None  # in the same unit
    note: str = ""
    seconds: float = 0.0  # that it took, with what had to be compiled for it


@dataclass(kw_only=True)
class Outcome:
    """What became of a part."""

    part: str
    status: str = "running"  # done, failed, stopped (no time left for the rest), skipped (none at all)
    reason: str = ""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)


class OutOfTime(Exception):
    """A part's time is over, and something of it is left."""


@dataclass(kw_only=True)
class Bench:
    """What the parts share."""

    smoke: bool  # tiny sizes, XLA implementations: the path, not the numbers
    layers: int = 32  # of the engine's model
    few: bool = False  # fewer requests and programs: for a device that is lent for minutes
    facts: dict[str, Any] = field(default_factory=dict)  # go to the result file
    shared: dict[str, Any] = field(default_factory=dict)  # the engine, once there is one
    clock: Callable[[], float] = time.perf_counter
    stop: float = math.inf  # when the part that runs has no time left

    def in_time(self, items: Iterable[T]) -> Iterator[T]:
        """What a part measures, one after another. Raises OutOfTime before one for which no time is left."""
        for item in items:
            if self.clock() >= self.stop:
                raise OutOfTime
            yield item

    @property
    def device(self) -> Device | None:
        """The data sheet of the device, where we have one."""
        import jax

        kind = jax.devices()[0].device_kind.lower()
        return next((device for name, device in DEVICES.items() if name.split("-")[0] in kind), None)


@dataclass(frozen=True)
class Part:
    """A piece of the benchmark; ``run`` yields figures as they come."""

    name: str
    seconds: float  # most that it takes
    run: Callable[[Bench], Iterator[Figure]]


class Report:
    """The outcomes so far, on the terminal and in a file."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts, self.outcomes = path, facts, list[Outcome]()

    def write(self) -> None:
        text = json.dumps({**self.facts, "parts": [asdict(outcome) for outcome in self.outcomes]}, indent=1)
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, self.path)


def run_parts(
    parts: Sequence[Part],
    bench: Bench,
    report: Report,
    limit: float = LIMIT,
) -> list[Outcome]:
    """Runs the parts one after another; none may take another down."""
    clock = bench.clock
    began = clock()
    for part in parts:
        outcome = Outcome(part=part.name)
        report.outcomes.append(outcome)
        start = clock()
        bench.stop = min(start + part.seconds, began + limit)
        if start >= began + limit:
            outcome.status, outcome.reason = "skipped", f"the {limit:g} s are over"
        else:
            _run(part, bench, outcome)
        outcome.seconds = clock() - start
        print("\n".join(lines(outcome)), flush=True)
        report.write()
    return report.outcomes


def _run(part: Part, bench: Bench, outcome: Outcome) -> None:
    begin = bench.clock()
    try:
        for figure in part.run(bench):
            outcome.figures.append(replace(figure, seconds=bench.clock() - begin))
            begin = bench.clock()
        outcome.status = "done"
    except OutOfTime:
        outcome.status, outcome.reason = "stopped", f"{part.seconds:g} s are over; what was left is not measured"
    except Exception as error:  # whatever it is, the next part runs
        outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {error}"[:2000]
        traceback.print_exc()


def lines(outcome: Outcome) -> list[str]:
    """The part as a table."""
    reason = f": {outcome.reason.splitlines()[0][:200]}" if outcome.reason else ""
    told = [f"== {outcome.part} ({outcome.status}, {outcome.seconds:.1f} s){reason}"]
    for figure in outcome.figures:
        value = "-" if figure.value is None else f"{figure.value:.4g}"
        bound = ""
        if figure.bound and figure.value is not None:
            bound = f"  bound {figure.bound:10.4g}, {figure.value / figure.bound:6.2f} of it"
        told.append(f"  {figure.name:<46} {value:>10} {figure.unit:<10}{bound}  {figure.note}".rstrip())
    return told


def all_parts() -> tuple[Part, ...]:
    """Every part in its order. PEFT comes first, in a process of its own, while the device's memory is free."""
    from jaxserve.bench import gpu_engine, gpu_kernels

    return (
        Part("PEFT and PyTorch", 70, gpu_engine.peft),
        Part("device", 15, gpu_kernels.device),
        Part("ceilings", 20, gpu_kernels.ceilings),
        Part("kernels are right", 60, gpu_kernels.correctness),
        Part("kernels are fast", 60, gpu_kernels.speed),
        Part("engine", 240, gpu_engine.start),
        Part("decode step", 25, gpu_engine.decode),
        Part("prefill", 10, gpu_engine.prefill),
        Part("finetuning alone", 40, gpu_engine.finetune),
        Part("where the time goes", 40, gpu_engine.profile),
        Part("adapters", 40, gpu_engine.adapters),
        Part("co-serving", 60, gpu_engine.coserve),
        Part("memory", 5, gpu_engine.memory),
    )


def facts(smoke: bool) -> dict[str, Any]:
    """Date, versions, and that it was a smoke test if it was one; the device is asked for by the first part."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": now, "smoke": smoke, "versions": versions(PACKAGES), "processors": os.cpu_count()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if no part failed, else 1."""
    parser = argparse.ArgumentParser(prog="jaxserve bench gpu", description="Measure kernels and engine on a GPU.")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and XLA implementations, on any device")
    parser.add_argument("--out", type=Path, default=Path("gpu-bench.json"), help="result file")
    parser.add_argument("--layers", type=int, default=32, help="layers of the engine's model; fewer compile sooner")
    parser.add_argument("--few", action="store_true", help="64 requests at most and half the programs: starts sooner")
    parser.add_argument("--parts", help="names of parts, with commas between; all by default")
    options = parser.parse_args(arguments)
    parts = all_parts()
    if options.parts is not None:
        wanted = options.parts.split(",")
        unknown = sorted(set(wanted) - {part.name for part in parts})
        if unknown:
            parser.error(f"--parts: no part {unknown[0]!r}; there are {', '.join(part.name for part in parts)}")
        parts = tuple(part for part in parts if part.name in wanted)
    report = Report(options.out, facts(options.smoke) | {"layers": options.layers, "few": options.few})
    try:
        report.write()
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    bench = Bench(smoke=options.smoke, layers=options.layers, few=options.few, facts=report.facts)
    watchdog = threading.Timer(LIMIT, _give_up, (report,))
    watchdog.daemon = True
    watchdog.start()
    outcomes = run_parts(parts, bench, report, LIMIT - 10)
    watchdog.cancel()
    bad = [outcome.part for outcome in outcomes if outcome.status != "done"]
    print(
        f"{options.out}: {len(outcomes) - len(bad)} of {len(outcomes)} parts done"
        + f"; not: {', '.join(bad)}" * bool(bad)
    )
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


def _give_up(report: Report) -> None:
    """The time is over and something hangs."""
    report.outcomes[-1].status, report.outcomes[-1].reason = "failed", f"still running after {LIMIT:g} s in all"
    report.write()
    print("\n".join(lines(report.outcomes[-1])), flush=True)
    os._exit(1)
