"""The directory of a job: what it is, how it went, its checkpoints and, at the end, its adapter.

    job.json        status, progress and settings; replaced as a whole
    events.jsonl    one event a line
    checkpoints/    see ``checkpoint``
    adapter/        PEFT files, once the job has succeeded
    control.json    what another process asks for; see ``control``

All writing is done by one thread of its own, in order; the loop that trains never waits for the disk.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxserve import faults
from jaxserve.finetune.checkpoint import Checkpoint, CheckpointWriter, load_latest
from jaxserve.finetune.durable import OnEvent, ignore_event, replace_file
from jaxserve.finetune.errors import CheckpointError
from jaxserve.finetune.job import Job, JobEvent

logger = logging.getLogger(__name__)

JOB, EVENTS, CHECKPOINTS, ADAPTER, CONTROL = "job.json", "events.jsonl", "checkpoints", "adapter", "control.json"
FORMAT = 1
READ = ("id", "adapter", "status", "step", "total_steps", "loss", "validation_loss", "updated_at", "config")


class JobFolder:
    """Writes the directory of one job; one process at a time.

    Args:
      identity: JSON values that make a job the same job: adapter, base model, data and settings.
      keep: checkpoints that stay.
      on_event: called with (kind, message), from the thread that writes.

    Raises:
      CheckpointMismatch: the directory belongs to another job.
      CheckpointError: ``busy``, ``newer_format`` or ``storage``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        identity: Mapping[str, Any],
        keep: int,
        on_event: OnEvent = ignore_event,
    ):
        self.root = Path(root)
        self._identity = dict(identity)
        self._checkpoints = CheckpointWriter(self.root / CHECKPOINTS, identity, keep, on_event)
        with suppress(OSError):
            (self.root / CONTROL).unlink()  # asked of a process that is gone
        self._writer = ThreadPoolExecutor(1, "job-folder")
        self._on_event = on_event
        self._lock = threading.Lock()
        self._closing: threading.Thread | None = None
        self._news: tuple[bytes, dict[str, Any]] | None = None  # lines and description that are not written yet

    def latest(self, like: Any) -> Checkpoint | None:
        """The newest whole checkpoint, its state arranged as ``like``. Raises as ``load_latest``."""
        return load_latest(self.root / CHECKPOINTS, like=like, expect=self._identity, on_event=self._on_event)

    def events(self) -> list[JobEvent]:
        """The events written so far, up to the first line that is not whole."""
        return read_events(self.root)

    def rewind(self, job: Job) -> None:
        """Makes the files say what a job restored from a checkpoint knows, and nothing later.

        Raises:
          CheckpointError: ``storage``, not writable.
        """
        lines = b"".join(_line(event) for event in job.events())
        try:
            self._writer.submit(self._replace, EVENTS, lines).result()
        except OSError as error:
            raise CheckpointError(f"{EVENTS}: {error.strerror}", "storage", error.errno) from None
        self.note(job)

    def note(self, job: Job, event: JobEvent | None = None) -> None:
        """Writes a job's progress, and an event, soon; what comes meanwhile is written with it."""
        lines, description = b"" if event is None else _line(event), describe(job)
        with self._lock:
            waiting = self._news is not None
            self._news = ((self._news[0] if self._news else b"") + lines, description)
            if not waiting:
                self._writer.submit(self._write_news)

    def _write_news(self) -> None:
        with self._lock:
            assert self._news is not None
            (lines, description), self._news = self._news, None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if lines:
                with open(self.root / EVENTS, "ab") as file:
                    file.write(lines)
            self._replace(JOB, json.dumps(description, indent=1, allow_nan=False).encode())
        except OSError as error:  # progress is for people's eyes: training goes on without it
            logger.warning("progress of a job was not written: %s", error.strerror)

    def _replace(self, name: str, content: bytes) -> None:
        replace_file(self.root / name, content)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> Future[Path]:
        """Saves a checkpoint in the background."""
        return self._checkpoints.start_save(step, state, meta)

    def finish(self, write_adapter: Callable[[Path], None]) -> Future[None]:
        """Writes the adapter in the background, behind everything before it."""
        return self._writer.submit(self._finish, write_adapter)

    def _finish(self, write_adapter: Callable[[Path], None]) -> None:
        faults.hit("job.before_adapter")
        write_adapter(self.root / ADAPTER)
        faults.hit("job.after_adapter")

    def close_soon(self) -> None:
        """Lets others write, once everything is written; ``wait_closed`` waits for that."""
        if self._closing is None:
            self._closing = threading.Thread(target=self.close, name="job-folder-close")
            self._closing.start()

    def wait_closed(self) -> None:
        if self._closing is not None:
            self._closing.join()

    def close(self) -> None:
        """Waits for everything that is being written, and lets others write."""
        self._checkpoints.finish()  # what it has to say is written as well
        self._writer.shutdown()
        self._checkpoints.close()


def describe(job: Job) -> dict[str, Any]:
    """What job.json says of a job."""
    return {
        "format": FORMAT,
        "id": job.id,
        "adapter": job.adapter,
        "tenant": job.tenant,
        "status": job.status.value,
        "error": job.error,
        "step": job.step,
        "total_steps": job.total_steps,
        "loss": job.losses[-1] if job.losses else None,
        "validation_loss": job.validation_losses[-1][1] if job.validation_losses else None,
        "trained_tokens": job.trained_tokens,
        "created_at": job.created_at,
        "updated_at": time.time(),
        "config": job.config.model_dump(mode="json"),
    }


def read_job(root: str | os.PathLike[str]) -> dict[str, Any]:
    """job.json of a job's directory.

    Raises:
      CheckpointError: ``storage``, not there or not readable; ``newer_format``.
    """
    try:
        described = json.loads((Path(root) / JOB).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{JOB}: {error.strerror}", "storage", error.errno) from None
    except ValueError as error:
        raise CheckpointError(f"{JOB}: not JSON: {error}", "storage") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise CheckpointError(f"{JOB}: format {described!r:.40}, this version reads {FORMAT}", "newer_format")
    missing = [key for key in READ if key not in described]
    if missing:
        raise CheckpointError(f"{JOB}: {missing[0]!r} is missing", "storage")
    return described


def read_events(root: str | os.PathLike[str]) -> list[JobEvent]:
    """events.jsonl of a job's directory, up to the first line that is not whole; [] where there is none.

    Raises:
      CheckpointError: ``storage``, not readable.
    """
    events: list[JobEvent] = []
    try:
        with suppress(FileNotFoundError, ValueError, TypeError), open(Path(root) / EVENTS, "rb") as file:
            for line in file:
                event = JobEvent(**json.loads(line))
                if event.number != len(events):
                    break
                events.append(event)
    except OSError as error:
        raise CheckpointError(f"{EVENTS}: {error.strerror}", "storage", error.errno) from None
    return events


def _line(event: JobEvent) -> bytes:
    return json.dumps(event.to_json(), allow_nan=False).encode() + b"\n"
