"""Lets one process ask another to pause, resume or cancel a job, through a file in the job's directory.

The asker puts control.json there; the process that trains takes it between two steps, does what it says and deletes
it. A request names the job, so none outlives the job it was meant for, and only a process that holds the directory is
asked.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from jaxserve.errors import EngineError, InvalidRequest
from jaxserve.finetune.durable import LOCK, replace_file
from jaxserve.finetune.errors import CheckpointError
from jaxserve.finetune.folder import CHECKPOINTS, CONTROL, read_job
from jaxserve.finetune.job import TERMINAL

TAKEN = ".control.json.taken"
FORMAT = 1
MAX_BYTES = 4096
ACTIONS = ("pause", "resume", "cancel")


class Controlled(Protocol):
    """What is asked for: a job in this process."""

    @property
    def id(self) -> str: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def cancel(self) -> None: ...


def is_held(root: str | os.PathLike[str]) -> bool:
    """Whether a process has the job in this directory now."""
    try:
        descriptor = os.open(Path(root) / CHECKPOINTS / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def ask(root: str | os.PathLike[str], action: str) -> None:
    """Asks the process that has the job of this directory; it acts between two of its steps.

    Raises:
      InvalidRequest: no such action, the job is over, or no process has it.
      CheckpointError: no job there, or its directory cannot be written.
    """
    if action not in ACTIONS:
        raise InvalidRequest(f"{action!r} is none of {', '.join(ACTIONS)}", "action")
    job = read_job(root)
    if job["status"] in TERMINAL:
        raise InvalidRequest(f"{root}: the job is {job['status']}", "action")
    if not is_held(root):
        raise InvalidRequest(f"{root}: no process has this job now; start it again to go on", "action")
    request = {"format": FORMAT, "job": job["id"], "action": action}
    try:
        replace_file(Path(root) / CONTROL, json.dumps(request).encode())
    except OSError as error:
        raise CheckpointError(f"{CONTROL}: {error.strerror}", "storage", error.errno) from None


def is_taken(root: str | os.PathLike[str]) -> bool:
    """Whether the last request has been taken."""
    return not (Path(root) / CONTROL).exists()


class Controls:
    """The other side: looks for requests about the jobs of this process.

    Args:
      jobs: by directory.
      seconds: least time between two looks.
    """

    def __init__(
        self,
        jobs: Mapping[str, Controlled],
        seconds: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.jobs, self.seconds, self.clock = jobs, seconds, clock
        self._next = clock()

    def poll(self) -> list[str]:
        """Does what was asked since the last time; says what, a line each. Call it between two steps."""
        if self.clock() < self._next:
            return []
        self._next = self.clock() + self.seconds
        return [line for root, job in self.jobs.items() if (line := _obey(Path(root), job)) is not None]


def _obey(root: Path, job: Controlled) -> str | None:
    request = _take(root)
    if request is None:
        return None
    action = request.get("action")
    if request.get("format") != FORMAT or request.get("job") != job.id or action not in ACTIONS:
        return f"{root / CONTROL}: not a request about this job; it is dropped"
    try:
        {"pause": job.pause, "resume": job.resume, "cancel": job.cancel}[action]()
    except EngineError as error:
        return f"asked to {action}: {error}"
    return f"job {job.id}: {action}, as asked in {root / CONTROL}"


def _take(root: Path) -> dict[str, Any] | None:
    """The request, which is gone afterwards; {} where it cannot be read. Renaming it first leaves a newer one alone."""
    taken = root / TAKEN
    try:
        os.rename(root / CONTROL, taken)
    except OSError:
        return None
    try:
        descriptor = os.open(taken, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            request = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        request = None
    with suppress(OSError):
        taken.unlink()
    return request if isinstance(request, dict) else {}
