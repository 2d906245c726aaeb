"""Named points at which a test can make the process die or a call fail. Nothing happens unless armed on purpose.

A specification is ``point=action@n;...``: at the n-th hit of the point (the first by default) the process is killed
(``kill``), a RuntimeError is raised (``raise``) or an OSError of that name (``EIO``, ``ENOSPC``, ...).
"""

import errno
import os
import signal
import threading
from dataclasses import dataclass

POINTS = {
    "ckpt.begin": "before the directory of a new checkpoint is made",
    "ckpt.mid_files": "some of its files are written",
    "ckpt.before_fsync": "all files are written, none is known to be on the disk",
    "ckpt.before_manifest": "all files are on the disk",
    "ckpt.before_rename": "the manifest is on the disk too",
    "ckpt.after_rename": "the checkpoint has its name, the name may not be on the disk",
    "ckpt.committed": "the name is on the disk, older checkpoints are still there",
    "ckpt.mid_delete": "an older checkpoint has lost its name, not all its files",
    "job.before_adapter": "a job's last checkpoint is saved, its adapter is not written",
    "job.after_adapter": "a job's adapter is written, the job does not say that it has succeeded",
    "fs.mkdir": "a directory is made",
    "fs.write": "a file is written",
    "fs.fsync": "a file or directory is flushed to the disk",
    "fs.rename": "a file or directory gets its name",
}


@dataclass
class _Fault:
    action: str
    at: int
    hits: int = 0


_armed: dict[str, _Fault] = {}
_lock = threading.Lock()


def arm(spec: str) -> None:
    """Replaces what is armed by ``spec``.

    Raises:
      ValueError: an unknown point or action, or a count below 1.
    """
    faults = dict(_parse(entry) for entry in spec.split(";") if entry.strip())
    with _lock:
        _armed.clear()
        _armed.update(faults)


def disarm() -> None:
    """Nothing happens any more."""
    arm("")


def armed() -> dict[str, int]:
    """Hits so far of every armed point."""
    with _lock:
        return {point: fault.hits for point, fault in _armed.items()}


def hit(point: str) -> None:
    """Passes ``point``; does what is armed there, normally nothing."""
    if not _armed:
        return
    assert point in POINTS, point
    with _lock:
        fault = _armed.get(point)
        if fault is None:
            return
        fault.hits += 1
        if fault.hits != fault.at:
            return
    _act(point, fault.action)


def _act(point: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise RuntimeError(f"fault at {point}")
    code = getattr(errno, action)
    raise OSError(code, os.strerror(code))


def _parse(entry: str) -> tuple[str, _Fault]:
    point, _, rest = entry.strip().partition("=")
    action, _, count = rest.partition("@")
    if point not in POINTS:
        raise ValueError(f"faults: {point!r} is no point; the points are {', '.join(POINTS)}")
    if action not in ("kill", "raise") and action not in errno.errorcode.values():
        raise ValueError(f"faults: {point}: action {action!r} must be kill, raise or the name of an errno")
    if not (count or "1").isdecimal() or int(count or "1") < 1:
        raise ValueError(f"faults: {point}: count {count!r} must be a number from 1")
    return point, _Fault(action, int(count or "1"))
