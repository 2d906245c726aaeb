"""Jobs by their directories: listing, and asking the process that has one to pause, resume or cancel it."""

import fcntl
import json
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.cli import coserve, jobs, main
from jaxserve.config import Config
from jaxserve.errors import AdapterNotFound, EngineError, InvalidRequest
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.control import CONTROL, Controls, ask, is_held, is_taken
from jaxserve.finetune.durable import LOCK
from jaxserve.finetune.errors import DataError
from jaxserve.finetune.folder import CHECKPOINTS, EVENTS, JOB, JobFolder

DESCRIBED = {
    "format": 1, "id": "ftjob-1", "adapter": "pirate", "tenant": "", "status": "running", "error": None, "step": 3,
    "total_steps": 9, "loss": 1.25, "validation_loss": None, "trained_tokens": 70, "created_at": 1.0,
    "updated_at": 2.0, "config": {"rank": 4, "epochs": None},
}  # fmt: skip


class RecordingJob:
    """Notes what it is asked for."""

    def __init__(self, id: str = "ftjob-1"):
        self.id, self.asked = id, []

    def pause(self):
        self.asked.append("pause")

    def resume(self):
        raise EngineError("it is not paused")

    def cancel(self):
        self.asked.append("cancel")


@pytest.fixture
def root(tmp_path):
    """A job's directory that no process has."""
    directory = tmp_path / "runs" / "pirate"
    (directory / CHECKPOINTS).mkdir(parents=True)
    (directory / CHECKPOINTS / LOCK).touch()
    (directory / JOB).write_text(json.dumps(DESCRIBED))
    return directory


@pytest.fixture
def held(root):
    with open(root / CHECKPOINTS / LOCK) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield root


def test_a_request_written_while_the_job_runs_is_obeyed_once(held):
    job, now = RecordingJob(), [0.0]
    controls = Controls({str(held): job}, seconds=1.0, clock=lambda: now[0])
    ask(held, "pause")
    now[0] = 2.0
    assert controls.poll() == [f"job ftjob-1: pause, as asked in {held / CONTROL}"]
    now[0] = 4.0
    assert controls.poll() == []
    assert (job.asked, is_taken(held)) == (["pause"], True)


def test_a_request_from_before_the_first_step_is_obeyed_then(held):
    ask(held, "pause")
    job = RecordingJob()
    assert len(Controls({str(held): job}, seconds=0.0).poll()) == 1
    assert job.asked == ["pause"]


def test_a_request_that_a_process_has_left_is_dropped_by_the_next(root):
    with open(root / CHECKPOINTS / LOCK) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ask(root, "cancel")
    folder = JobFolder(root, {}, 1)
    assert is_taken(root)
    folder.close()


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"format": 1, "job": "ftjob-2", "action": "pause"}', b'{"format": 2}', b"[" * 9999]
)
def test_what_is_no_request_about_this_job_is_dropped(held, content):
    job = RecordingJob()
    controls = Controls({str(held): job}, seconds=0.0)
    (held / CONTROL).write_bytes(content)
    (line,) = controls.poll()
    assert "not a request about this job" in line
    assert (job.asked, is_taken(held)) == ([], True)


def test_a_refusal_is_said_and_ends_nothing(held):
    controls = Controls({str(held): RecordingJob()}, seconds=0.0)
    ask(held, "resume")
    assert controls.poll() == ["asked to resume: it is not paused"]


def test_only_a_job_that_a_process_has_can_be_asked(root):
    assert not is_held(root)
    with pytest.raises(InvalidRequest, match="no process has this job"):
        ask(root, "pause")


def test_a_job_that_is_over_cannot_be_asked(held):
    (held / JOB).write_text(json.dumps({**DESCRIBED, "status": "succeeded"}))
    with pytest.raises(InvalidRequest, match="the job is succeeded"):
        ask(held, "pause")


def test_asking_waits_until_the_job_has_come_to_it(held):
    job = RecordingJob()
    controls = Controls({str(held): job}, seconds=0.0)

    def other_process(_: float) -> None:
        controls.poll()
        (held / JOB).write_text(json.dumps({**DESCRIBED, "status": "paused"}))

    assert jobs.request(held, "pause", 30.0, sleep=other_process)
    assert job.asked == ["pause"]


def test_a_job_that_is_over_before_it_could_pause_is_told_at_once(held):
    def other_process(_: float) -> None:
        (held / CONTROL).unlink()
        (held / JOB).write_text(json.dumps({**DESCRIBED, "status": "succeeded"}))

    with pytest.raises(InvalidRequest, match="the job is succeeded"):
        jobs.request(held, "pause", 30.0, sleep=other_process)


def test_a_request_that_nobody_takes_times_out(held):
    assert not jobs.request(held, "pause", 0.05)


def test_a_listing_tells_stopped_jobs_from_running_ones(root, capsys):
    main_status = _run(["jobs", str(root.parent)])
    assert main_status == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == list(jobs.COLUMNS)
    assert "stopped (running)" in line
    assert "3/9" in line
    assert "1.2500" in line


def test_a_listing_as_json_says_who_holds_the_job(held, capsys):
    assert _run(["jobs", "list", str(held.parent), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["directory"], found["held"], found["step"]) == (str(held), True, 3)


def test_a_directory_that_is_not_there_is_wrong_usage(tmp_path, capsys):
    assert _run(["jobs", str(tmp_path / "typo")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'typo'}: no such directory\n"


@pytest.mark.parametrize("content", ["{", '{"format": 1}', json.dumps(DESCRIBED).replace('"step"', '"stop"')])
def test_an_unreadable_job_is_listed_as_that(root, capsys, content):
    (root / JOB).write_text(content)
    assert _run(["jobs", str(root)]) == 0
    assert "unreadable" in capsys.readouterr().out
    assert _run(["jobs", "show", str(root)]) == 1
    assert f"error: {JOB}: " in capsys.readouterr().err


def test_events_that_cannot_be_read_are_told(root, capsys):
    (root / EVENTS).mkdir()
    assert _run(["jobs", "events", str(root)]) == 1
    assert capsys.readouterr().err == f"error: {EVENTS}: Is a directory\n"


def test_a_directory_without_a_job_has_nothing_to_show(tmp_path, capsys):
    assert _run(["jobs", "show", str(tmp_path)]) == 1
    assert JOB in capsys.readouterr().err


def _run(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    return exit.value.code or 0


def test_a_resumed_job_cancelled_before_its_first_step_takes_no_results_away(tmp_path, monkeypatch):
    def cancelled(directory):
        raise AdapterNotFound("adapter 'a' is not loaded")

    saved = []
    jobs = {
        "a": SimpleNamespace(step=3, status="cancelled", save=cancelled),
        "b": SimpleNamespace(step=3, status="succeeded", save=saved.append),
    }
    monkeypatch.setattr(coserve, "write", lambda *_: None)
    config = Config.model_validate({"coserve": {"results_dir": str(tmp_path)}})
    done: Any = SimpleNamespace(jobs=jobs, circumstances=None)
    coserve.leave(config, done, {}, "")
    assert saved == [tmp_path / "adapters" / "b"]


def test_data_that_the_engine_refuses_are_told_by_job():
    def finetune(*_):
        raise DataError(["line 2: 71 tokens, at most 64"])

    engine: Any = SimpleNamespace(finetune=finetune)
    with pytest.raises(DataError, match=r"^job of adapter 'a': line 2: 71 tokens"):
        coserve.start(engine, [coserve.Planned("a", "data.jsonl", FinetuneConfig())])


def test_data_that_cannot_be_trained_on_are_refused_before_anything_is_loaded(tmp_path, capsys):
    model, where = "demo:storyteller", ["--adapter", "a", "--output-dir", "x"]
    good, bad, empty = (tmp_path / f"{name}.jsonl" for name in ("good", "bad", "empty"))
    good.write_text('{"text": "a"}\n')
    bad.write_text('{"text": "a"}\n{"text": 5}\n')
    empty.write_text("\n")
    told = [
        (["finetune", model, str(bad), *where], "error: line 2: text must be"),
        (["finetune", model, str(empty), *where], "error: training data: no examples"),
        (
            ["finetune", model, str(good), *where, "--validation-data", "missing"],
            "error: validation_data: data file: No such file",
        ),
        (
            ["coserve", model, "--finetune-jobs", f"a={good}", "--finetune-jobs", f"b={bad}"],
            "error: job of adapter 'b': line 2: text must be",
        ),
    ]
    for argv, message in told:
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
