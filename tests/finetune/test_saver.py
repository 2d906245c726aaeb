"""A job's directory and a disk that refuses, without an engine."""

import time
from concurrent.futures import wait
from types import SimpleNamespace

import numpy as np
import pytest

from jaxserve import faults
from jaxserve.engine.saver import JobSaver
from jaxserve.finetune.data import Cursor
from jaxserve.finetune.durable import newest
from jaxserve.finetune.errors import CheckpointError
from jaxserve.finetune.folder import CHECKPOINTS, JobFolder
from jaxserve.finetune.job import JobStatus


@pytest.fixture(autouse=True)
def _nothing_stays_armed():
    yield
    faults.disarm()


@pytest.fixture
def job():
    """A job after three steps, which notes what it is told."""
    notes = []
    return SimpleNamespace(
        step=3, notes=notes, events=list, meta=lambda cursor: {}, note=lambda kind, message, **_: notes.append(message)
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
