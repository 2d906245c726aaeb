"""A job's directory and a disk that refuses, without an engine."""

import threading
import time
from concurrent.futures import Future, wait
from types import SimpleNamespace

import numpy as np
import pytest

from jaxserve import faults
from jaxserve.engine.saver import RETRY_SECONDS, JobSaver
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Cursor, Dataset
from jaxserve.finetune.durable import newest
from jaxserve.finetune.errors import CheckpointError
from jaxserve.finetune.examples import Example
from jaxserve.finetune.folder import CHECKPOINTS, JobFolder, read_events
from jaxserve.finetune.job import Job, JobStatus


@pytest.fixture(autouse=True)
def _nothing_stays_armed():
    yield
    faults.disarm()


@pytest.fixture
def job():
    """A job after three steps, which notes what it is told."""
    notes = []
    return SimpleNamespace(
        step=3,
        start=None,
        notes=notes,
        events=list,
        meta=lambda cursor: {},
        note=lambda kind, message, **_: notes.append(message),
    )


@pytest.fixture
def saver(tmp_path, job):
    return JobSaver(job, JobFolder(tmp_path, {}, 1), -1, time.monotonic)


def save(saver: JobSaver) -> None:
    saver.save({"q_proj": {"a": np.ones(2)}}, {}, 3, Cursor())


def test_closing_tells_what_the_disk_refuses(saver, job):
    save(saver)
    faults.arm("fs.mkdir=ENOSPC")
    saver.close()
    assert job.notes == ["checkpoint 3 was not written: No space left on device"]


def test_of_a_job_that_is_over_the_events_tell_what_the_disk_refuses(saver, job):
    save(saver)
    faults.arm("fs.mkdir=ENOSPC")
    saver.close_soon()
    saver.folder.wait_closed()
    assert job.notes == ["checkpoint 3 was not written: No space left on device"]


def test_what_a_checkpoint_says_while_its_directory_is_closed_is_written(tmp_path):
    example = Example(np.zeros(5, np.int32), np.ones(5, np.float32), 0)
    job = Job("a", FinetuneConfig(), Dataset((example,)), SimpleNamespace(config={}))
    job.folder = JobFolder(tmp_path, {}, 1, lambda kind, message: job.note("warning", message))
    opened = threading.Event()
    job.folder._checkpoints._saver.submit(opened.wait)
    saved = job.folder.save(1, {"a": np.ones(2)}, {})
    faults.arm("ckpt.committed=EIO")
    threading.Timer(0.1, opened.set).start()
    job.folder.close()
    assert saved.result()
    assert [event.message for event in read_events(tmp_path)] == ["an old checkpoint stays: Input/output error"]


def test_closing_while_the_last_step_is_being_saved_saves_it_once(saver, job, tmp_path):
    save(saver)
    saver.start()
    save(saver)
    saver.close()
    assert job.notes == []
    assert newest(tmp_path / CHECKPOINTS).step == 3


def test_a_directory_that_takes_no_events_is_said_to_be_that(saver, job):
    faults.arm("fs.write=ENOSPC")
    with pytest.raises(CheckpointError, match=r"events\.jsonl: No space left on device"):
        saver.folder.rewind(job)
    saver.close()


def test_a_job_that_was_resumed_by_hand_and_paused_again_is_not_resumed_by_the_disk(saver, job):
    moved = []

    def settle_what_is_written():
        wait([saver.saving])
        saver.settle(lambda job, why: moved.append("pause"), lambda job: moved.append("resume"))

    job.status = JobStatus.RUNNING
    faults.arm("fs.mkdir=ENOSPC")
    save(saver)
    saver.start()
    settle_what_is_written()
    saver.retry()
    saver.start()
    job.status = JobStatus.PAUSED
    settle_what_is_written()
    assert moved == ["pause"]
    assert job.notes == ["checkpoint 3 is saved"]
    saver.close()


class Disk:
    """A folder whose writes end when the test says so."""

    def __init__(self):
        self.saves, self.adapters, self.closed = [], [], False

    def save(self, step, state, meta):
        self.saves.append((step, Future()))
        return self.saves[-1][1]

    def finish(self, write_adapter):
        self.adapters.append(Future())
        return self.adapters[-1]

    def close_soon(self):
        self.closed = True


@pytest.mark.parametrize(("number", "saved_step", "saves"), [(3, 2, [3]), (3, 3, []), (4, 2, [])])
def test_what_is_saved_is_newer_than_the_last_checkpoint_and_lacks_no_batch(job, number, saved_step, saves):
    saver = JobSaver(job, Disk(), saved_step, time.monotonic)
    saver.save({}, {}, number, Cursor())
    assert (saver.pending, saver.start() is not None) == (bool(saves), bool(saves))
    assert [step for step, _ in saver.folder.saves] == saves


def test_the_adapter_is_written_behind_the_last_checkpoint_and_again_where_the_disk_refused_it(job):
    now, disk = [0.0], Disk()
    saver = JobSaver(job, disk, -1, lambda: now[0])

    def settle():
        return saver.settle(lambda job, why: None, lambda job: None)

    save(saver)
    saver.start()
    saver.finish({})
    assert (settle(), len(disk.adapters)) == (False, 0)
    disk.saves[0][1].set_result(None)
    assert (settle(), len(disk.adapters)) == (False, 1)
    assert saver.wait(0.001)
    disk.adapters[0].set_exception(OSError("No space left on device"))
    assert not settle()
    assert "will be tried again: No space left on device" in job.notes[-1]
    assert (settle(), saver.pending, saver.wait(0.001), len(disk.adapters)) == (False, True, False, 1)
    now[0] += RETRY_SECONDS
    assert (settle(), len(disk.adapters)) == (False, 2)
    disk.adapters[1].set_result(None)
    assert (settle(), saver.pending) == (True, False)


def test_a_job_that_is_over_leaves_what_is_due_and_then_its_directory(job):
    saver = JobSaver(job, Disk(), -1, time.monotonic)
    save(saver)
    saver.start()
    job.step = 4
    saver.save({}, {}, 4, Cursor())
    saver.close_soon()
    assert ([step for step, _ in saver.folder.saves], saver.folder.closed) == ([3, 4], True)
    idle = JobSaver(job, Disk(), -1, time.monotonic)
    idle.close_soon()
    assert (idle.folder.saves, idle.folder.closed) == ([], True)
