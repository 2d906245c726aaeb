"""The GPU benchmark's run of parts: none takes another down, and what became of each is told and kept."""

import json
import subprocess
from unittest.mock import Mock

import pytest

from jaxserve.bench import gpu_engine
from jaxserve.bench.gpu import Bench, Figure, Part, Report, main, run_parts


def one(bench):
    yield Figure(name="first", value=2.0, unit="ms", bound=1.0)
    yield Figure(name="second", value=None, unit="ms", note="no room")


def broken(bench):
    yield Figure(name="before", value=1.0, unit="ms")
    raise RuntimeError("out of memory")


def two(bench):
    for name in bench.in_time(["first", "second"]):
        yield Figure(name=name, value=1.0, unit="ms")
        yield Figure(name=f"{name}, of the same measurement", value=2.0, unit="ms")


def run(parts, tmp_path, limit=100.0):
    ticks = iter(range(10_000))
    report = Report(tmp_path / "out.json", {"device": "none"})
    outcomes = run_parts(parts, Bench(smoke=True, clock=lambda: float(next(ticks))), report, limit)
    return outcomes, json.loads((tmp_path / "out.json").read_text())


def test_a_part_that_fails_keeps_its_figures_and_the_next_one_runs(tmp_path, capsys):
    outcomes, written = run([Part("bad", 50, broken), Part("good", 50, one)], tmp_path)
    assert [(o.status, o.reason, len(o.figures)) for o in outcomes] == [
        ("failed", "RuntimeError: out of memory", 1),
        ("done", "", 2),
    ]
    assert written["device"] == "none"
    assert [part["status"] for part in written["parts"]] == ["failed", "done"]
    told = capsys.readouterr().out
    assert "bad (failed" in told
    assert "out of memory" in told
    assert "2.00 of it" in told
    assert "no room" in told


def test_a_part_stops_at_its_limit_and_none_begins_after_the_whole_limit(tmp_path):
    outcomes, _ = run([Part("long", 4, two), Part("late", 50, one)], tmp_path, limit=5.0)
    assert [o.status for o in outcomes] == ["stopped", "skipped"]
    assert len(outcomes[0].figures) == 2
    assert not outcomes[1].figures


def test_a_part_whose_last_figure_comes_late_is_done(tmp_path):
    (outcome,), _ = run([Part("late", 9, two)], tmp_path)
    assert (outcome.status, len(outcome.figures)) == ("done", 4)
    assert outcome.seconds > 9


def test_the_smoke_run_measures_this_device(tmp_path):
    out = tmp_path / "gpu.json"
    assert main(["--smoke", "--parts", "device,ceilings", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["smoke"]
    assert written["device"]
    assert written["versions"]["jax"]
    assert all(figure["value"] > 0 for part in written["parts"] for figure in part["figures"])


def test_what_peft_has_measured_in_time_is_kept(tmp_path, monkeypatch):
    late = subprocess.TimeoutExpired("python", 65.0, output=b'{"tokens": 64, "seconds": 2.0}\n')
    monkeypatch.setattr(gpu_engine, "find_spec", lambda name: name)
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=late))
    (outcome,), _ = run([Part("PEFT", 70, gpu_engine.peft)], tmp_path)
    assert (outcome.reason, [figure.value for figure in outcome.figures]) == (
        "RuntimeError: not over after 65 s",
        [32.0 * gpu_engine.TOGETHER],
    )


def test_a_result_file_that_cannot_be_written_is_refused_before_the_first_part(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--smoke", "--parts", "device", "--out", str(tmp_path / "none" / "gpu.json")])
    assert "gpu.json: No such file or directory" in capsys.readouterr().err


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--smoke", "--parts", "nonsense"])
    assert "no part 'nonsense'" in capsys.readouterr().err
