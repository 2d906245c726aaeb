"""Brings a job to its directory: checkpoints on the way, the adapter at the end.

The loop that trains never waits for the disk: it asks from step to step what has become of a write. A disk that refuses
a checkpoint makes its job wait until it takes one.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

from jaxserve.adapters.peft_io import save_peft
from jaxserve.engine.lanes import Masters, weights_of
from jaxserve.finetune.data import Cursor
from jaxserve.finetune.errors import CheckpointError
from jaxserve.finetune.folder import JobFolder
from jaxserve.finetune.job import Job, JobStatus

RETRY_SECONDS = 5.0  # between attempts to write what the disk refused


class Save(NamedTuple):
    """A checkpoint that is to be written."""

    step: int
    state: dict[str, Any]
    meta: dict[str, Any]


class JobSaver:
    """Writes one job's directory.

    Args:
      saved_step: of the checkpoint that the job goes on from; -1 where it begins.
    """

    def __init__(self, job: Job, folder: JobFolder, saved_step: int, clock: Callable[[], float]):
        self.job, self.folder, self._clock = job, folder, clock
        self.saving: Future | None = None
        self._saved_step = saved_step
        self._due: Save | None = None  # the newest checkpoint that is not being written yet
        self._current: Save | None = None  # the one that is
        self._retry_at: float | None = None  # the disk has refused to write: when to try again
        self._job_waits = False  # paused until the disk takes a checkpoint
        self._final: Masters | None = None  # the job's last, once all its steps are read
        self._finishing: Future | None = None

    @property
    def pending(self) -> bool:
        """A checkpoint is to be written, or to be tried again."""
        return self._due is not None or self._retry_at is not None

    @property
    def ending(self) -> bool:
        """The job's end is to be written."""
        return self._final is not None

    def save(self, masters: Masters, optimizer: Any, number: int, cursor: Cursor) -> None:
        """Notes that the job is to be saved as it was read last, after batch ``number``; of several the newest."""
        job = self.job
        complete = job.step == number  # else a batch is missing that the cursor has passed
        if complete and job.step > self._saved_step:
            self._due = Save(job.step, {"masters": masters, "optimizer": optimizer}, job.meta(cursor))

    def start(self) -> Future | None:
        """Begins to write what is due, unless something is being written. Returns what is."""
        if self._due is not None and self._due.step <= self._saved_step:
            self._due = None  # it was asked for twice
        if self._due is not None and self.saving is None:
            what, self._due = self._due, None
            self._current, self.saving = what, self.folder.save(what.step, what.state, what.meta)
        return self.saving

    def finish(self, masters: Masters) -> None:
        """All steps are read: what is left is the adapter, once the last checkpoint is written."""
        self._final = masters

    def retry(self) -> None:
        """Tries again at once what the disk has refused; the job does not wait for that any more."""
        self._retry_at, self._job_waits = None, False

    def settle(self, pause: Callable[[Job, str], None], resume: Callable[[Job], None]) -> bool:
        """Takes in what the disk has answered and goes on with what it has not. True: the adapter is written.

        Args:
          pause: called when the job is to wait for the disk, with why; resume: when it need not any more.
        """
        if self.saving is not None and self.saving.done():
            self._saved(self.saving, pause, resume)
        if self._retry_at is not None and self._clock() < self._retry_at:
            return False
        self._retry_at = None
        self.start()
        if self._final is None or self.saving is not None:
            return False
        if self._finishing is None:
            masters, like = self._final, self.job.start
            self._finishing = self.folder.finish(lambda path: save_peft(weights_of(masters, like), path))
            return False
        return self._finishing.done() and self._finished(self._finishing)

    def _saved(self, future: Future, pause: Callable[[Job, str], None], resume: Callable[[Job], None]) -> None:
        job, what, error = self.job, self._current, future.exception()
        assert what is not None
        self.saving = self._current = None
        if error is None:
            self._saved_step = what.step
            job.note("checkpoint", f"checkpoint {what.step} is saved", step=what.step)
            if self._job_waits and job.status is JobStatus.PAUSED:
                resume(job)
            self._job_waits = False
            return
        if not isinstance(error, CheckpointError):
            raise error
        self._due = self._due or what
        self._retry_at = self._clock() + RETRY_SECONDS
        if job.status is JobStatus.RUNNING and self._final is None:
            self._job_waits = True
            pause(job, f"{error}; the job waits until one can be")
        else:
            job.note("warning", str(error))

    def _finished(self, future: Future) -> bool:
        error, self._finishing = future.exception(), None
        if error is not None:
            self._retry_at = self._clock() + RETRY_SECONDS
            self.job.note("warning", f"the adapter was not written, and will be tried again: {error}")
        return error is None

    def wait(self, seconds: float) -> bool:
        """Waits a little for what is being written; False: nothing is."""
        for future in (self._finishing, self.saving):
            if future is not None:
                wait([future], seconds)
                return True
        return False

    def close_soon(self) -> None:
        """The job is over: writes what is due, and leaves the directory to others once that is done; the job's events
        tell what the disk has refused."""
        last = [] if self.saving is None else [self.saving]
        if self._due is not None and self._due.step > self._saved_step:
            last.append(self.folder.save(*self._due))
        for future in last:
            future.add_done_callback(self._tell)
        self.folder.close_soon()

    def _tell(self, saved: Future) -> None:
        if (error := saved.exception()) is not None:
            self.job.note("warning", str(error))

    def close(self) -> None:
        """Writes what is due and leaves the directory to others; the job's events tell what the disk has refused."""
        while (saving := self.start()) is not None:
            error, self.saving = saving.exception(), None
            if error is not None:
                self.job.note("warning", str(error))
            elif self._current is not None:
                self._saved_step = self._current.step
        self.folder.close()
