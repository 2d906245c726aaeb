"""Where a step's time goes on the device: the profiler's kernels, summed by name."""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GAP = 0.1  # of the device's idle time between kernels, what counts as time that the host took: milliseconds


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """All launches of one kernel."""

    name: str
    seconds: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One or more steps on one device."""

    kernels: tuple[KernelTime, ...]  # longest first
    busy: float  # seconds in kernels
    idle: float  # seconds between the first kernel and the last in which none ran, in gaps above ``GAP``


def record(run: Callable[[], Any]) -> Trace:
    """Runs under JAX's profiler; a trace without kernels where the device has no tracer."""
    import jax

    with tempfile.TemporaryDirectory(prefix="jaxserve-trace-") as folder:
        with jax.profiler.trace(folder):
            run()
        events = []
        for path in sorted(Path(folder).rglob("*.trace.json.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as file:
                events += json.load(file)["traceEvents"]
    return summed(events)


def summed(events: Iterable[dict[str, Any]]) -> Trace:
    """The first device's kernels in a list of Chrome trace events (times in microseconds)."""
    events = list(events)
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("ph") == "M" and e.get("name") == "process_name"}
    devices = sorted(pid for pid, name in names.items() if name.startswith("/device:GPU"))
    mine = [e for e in events if devices and e.get("ph") == "X" and e.get("pid") == devices[0]]
    mine.sort(key=lambda e: e["ts"])
    seconds, counts = defaultdict[str, float](float), defaultdict[str, int](int)
    idle, end = 0.0, mine[0]["ts"] if mine else 0.0
    for event in mine:
        kernel = _kind(event["name"])
        seconds[kernel] += event["dur"] * 1e-6
        counts[kernel] += 1
        gap = event["ts"] - end
        idle += gap * 1e-6 if gap > 1e3 * GAP else 0.0
        end = max(end, event["ts"] + event["dur"])
    kernels = [KernelTime(name=name, seconds=total, count=counts[name]) for name, total in seconds.items()]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return Trace(kernels=tuple(kernels), busy=sum(seconds.values()), idle=idle)


def _kind(name: str) -> str:
    """Kernels of one kind are told apart by numbers at their ends alone."""
    return re.sub(r"([_.]\d+)+$", "", name).removesuffix("_mosaic_gpu_kernel")
