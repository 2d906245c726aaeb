"""``jaxserve jobs``: the jobs whose directories lie below a directory, and requests to the processes that run them."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError, InvalidRequest, JaxServeError
from jaxserve.finetune.control import ask, is_held, is_taken
from jaxserve.finetune.folder import ADAPTER, CHECKPOINTS, JOB, read_events, read_job
from jaxserve.finetune.job import TERMINAL, JobEvent

COLUMNS = ("directory", "adapter", "status", "step", "loss", "validation", "updated")
REACHED = {"pause": ("paused",), "resume": ("running", "queued", "succeeded"), "cancel": ("cancelled",)}
POLL_SECONDS = 0.1


def find(roots: Iterable[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(directory, job.json) of every job at or below these directories; one that cannot be read has an ``error``.

    Raises:
      ConfigError: a directory that is not there.
    """
    for root in roots:
        if not Path(root).is_dir():
            raise ConfigError([f"{root}: no such directory"])
        for directory, below, names in os.walk(root):
            below[:] = sorted(name for name in below if name not in (CHECKPOINTS, ADAPTER))
            if JOB in names:
                yield Path(directory), describe(Path(directory))


def describe(root: Path) -> dict[str, Any]:
    """job.json and ``held``: whether a process has the job now."""
    try:
        return {**read_job(root), "held": is_held(root)}
    except JaxServeError as error:
        return {"error": str(error), "held": False}


def status(job: dict[str, Any]) -> str:
    """The job's status; one that was left in the middle and that no process has is stopped."""
    known = job.get("status", "unreadable")
    return known if known in TERMINAL or known == "unreadable" or job["held"] else f"stopped ({known})"


def listing(found: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """A line per job under a head line."""
    rows = [COLUMNS, *(_row(root, job) for root, job in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(root: Path, job: dict[str, Any]) -> tuple[str, ...]:
    if "status" not in job:
        return (str(root), "", status(job), "", "", "", "")
    return (
        str(root),
        job["adapter"],
        status(job),
        f"{job['step']}/{job['total_steps']}",
        _number(job["loss"]),
        _number(job["validation_loss"]),
        _when(job["updated_at"]),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="seconds")


def details(root: Path) -> str:
    """Everything job.json says, a line each.

    Raises:
      CheckpointError: no job there.
    """
    job = {**read_job(root), "held": is_held(root)}
    lines = [f"{'status':<16} {status(job)}"]
    for key, value in job.items():
        if key.endswith("_at"):
            value = _when(value)
        if key not in ("format", "status", "held", "config") and value not in (None, ""):
            lines.append(f"{key:<16} {value}")
    checkpoints = sorted(path.name for path in (root / CHECKPOINTS).glob("step-*"))
    lines.append(f"{'checkpoints':<16} {', '.join(checkpoints) or 'none'}")
    if (root / ADAPTER).is_dir():
        lines.append(f"{'directory':<16} {root / ADAPTER}")
    lines += [f"  {key:<20} {value}" for key, value in job["config"].items() if value is not None]
    return "\n".join(lines)


def follow(root: Path, show: Callable[[JobEvent], None], follow: bool, sleep: Callable[[float], None] = time.sleep):
    """Shows the events so far; with ``follow`` also those to come, until the job is over or its process gone.

    Raises:
      CheckpointError: no job there.
    """
    told = -1
    while True:
        job = {**read_job(root), "held": is_held(root)}  # before the events: none of an ended job is missed
        events = read_events(root)
        if events and events[-1].number < told:  # begun again from a checkpoint
            told = -1
        for event in events[told + 1 :]:
            told = event.number
            show(event)
        if not follow or job["status"] in TERMINAL or not job["held"]:
            return
        sleep(POLL_SECONDS)


def event_line(event: JobEvent) -> str:
    return f"{_when(event.created_at)}  {event.kind:<10}  {event.message}"


def request(root: Path, action: str, seconds: float, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Asks for an action and waits until the job has come to it; False: not within these seconds.

    Raises:
      InvalidRequest: the job is over, or no process has it.
      CheckpointError: no job there, or its directory cannot be written.
    """
    ask(root, action)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reached = read_job(root)["status"] if is_taken(root) else None
        if reached in REACHED[action]:
            return True
        if reached in TERMINAL:
            raise InvalidRequest(f"{root}: the job is {reached}", "action")
        sleep(POLL_SECONDS)
    return False


def as_json(root: Path, job: dict[str, Any]) -> str:
    return json.dumps({"directory": str(root), **job})
