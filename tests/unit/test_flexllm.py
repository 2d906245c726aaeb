"""bench flexllm: whose requests are simulated, and what its tables are held against."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from jaxserve.bench import flexllm
from jaxserve.bench.arrivals import rows_at
from jaxserve.bench.ran import Ran, StepRow
from jaxserve.bench.replay import Mix
from jaxserve.bench.virtual import Virtual
from jaxserve.cli.app import app
from jaxserve.errors import ConfigError

EIGHT = flexllm.SETTINGS[0]


@pytest.mark.parametrize("name", flexllm.LENGTHS)
def test_requests_have_the_lengths_of_their_source(name):
    means = flexllm.LENGTHS[name]
    config = flexllm.config_of(EIGHT, Path("unused"), "h200", "down_proj", 60.0, name)
    rows, _ = rows_at(config, 20.0, 60.0)
    assert sum(row.prompt_tokens for row in rows) / len(rows) == pytest.approx(means.prompt, rel=0.05)
    assert sum(row.output_tokens for row in rows) / len(rows) == pytest.approx(means.output, rel=0.05)
    assert min(row.prompt_tokens for row in rows) < 0.6 * means.prompt


def test_a_trace_has_its_own_lengths():
    config = flexllm.config_of(EIGHT, Path("unused"), "a100-80gb", "all-linear", 60.0, "some.csv")
    assert (config.bench.trace, config.job.target_modules) == ("some.csv", "all-linear")


def test_what_was_done_to_a_trace_is_said(tmp_path, monkeypatch, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,20,5\n1,30,4\n2,10,6\n")
    monkeypatch.setattr(flexllm, "SETTINGS", (EIGHT,))
    monkeypatch.setattr(flexllm, "TARGETS", {"down_proj": ("down_proj",)})
    monkeypatch.setattr(flexllm, "RATES", (2.0,))
    monkeypatch.setattr(flexllm, "POLICIES", ("coserve", "inference-only"))
    models = Path(__file__).parents[2] / "configs" / "models"
    flexllm.main(str(tmp_path), str(models), 5.0, ["h200"], [], str(trace))
    said = capsys.readouterr().out
    assert f"trace {trace}, time stretched 0.5 times to 2 requests/s" in said
    assert "exponential" not in said
    (table,) = json.loads((tmp_path / "tables.json").read_text())
    assert [cell["policy"] for cell in table["cells"]] == ["coserve", "inference-only"]


def test_a_folder_that_takes_no_tables_is_refused_before_the_first_run(tmp_path):
    (tmp_path / "file").touch()
    models = Path(__file__).parents[2] / "configs" / "models"
    with pytest.raises(ConfigError, match=r"--out .* cannot be written"):
        flexllm.main(str(tmp_path / "file"), str(models), 5.0, ["h200"], ["azure"], None)


def test_lengths_beside_a_trace_are_refused():
    models = Path(__file__).parents[2] / "configs" / "models"
    with pytest.raises(ConfigError, match=r"--lengths azure: the requests of --trace have their own"):
        flexllm.main("out", str(models), 5.0, ["h200"], ["azure"], "trace.csv")


def claim(rate, ours, other, attainment=1.0, alone=True):
    return {
        "rate": rate, "requests_alone_meet": alone, "coserve_policy": "coserve:50", "coserve_attainment": attainment,
        "coserve_tokens_per_s": ours,
        "best_other": "separate:25", "best_other_tokens_per_s": other, "times_best_other": ours / other,
    }  # fmt: skip


def test_what_is_asked_is_judged_where_requests_alone_keep_their_objectives():
    cells = [
        {"policy": "coserve", "rate": rate, "finetune_tokens_per_s": rate * 1000, "finetuning_kept": 0.7}
        for rate in (1.0, 5.0)
    ]
    table = {
        "requests": "sharegpt", "model": EIGHT.directory, "device": "a100-80gb", "targets": "down_proj", "cells": cells,
        "claims": [claim(1.0, 1000, 800), claim(5.0, 5000, 4500, 0.98), claim(6.0, 10, 90, alone=False)],
        "published": {1.0: 500, 5.0: 4000},
    }  # fmt: skip
    met, ratios, like_theirs = flexllm.asked_lines([table])
    assert met == "of 2 cells in which requests alone meet their objectives for 99%, co-serving does in 1"
    assert "1.25 (coserve:50 over separate:25), 1.11 (coserve:50 over separate:25); at least 1.2 in 1 of 2" in ratios
    assert "70.0% of 68% asked" in like_theirs
    assert "at 1: 2.00 of 1.8 asked; times published at 5: 1.25 of 1.8 asked" in like_theirs
    assert len(list(flexllm.asked_lines([table | {"requests": "azure"}]))) == 2  # theirs were not so long


def test_tables_are_printed_and_left(tmp_path, monkeypatch):
    monkeypatch.setattr(flexllm, "SETTINGS", (EIGHT,))
    monkeypatch.setattr(flexllm, "TARGETS", {"down_proj": ("down_proj",)})
    monkeypatch.setattr(flexllm, "RATES", (1.0, 5.0))
    monkeypatch.setattr(flexllm, "POLICIES", ("coserve", "separate:25", "inference-only", "finetune-only"))
    models = Path(__file__).parents[2] / "configs" / "models"
    options = ["--models", str(models), "--seconds", "5", "--device", "a100-80gb", "--lengths", "sharegpt"]
    result = CliRunner().invoke(app, ["bench", "flexllm", "--out", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert "161 prompt and 338 output tokens" in result.output
    assert "times published at 1" in result.output
    (table,) = json.loads((tmp_path / "tables.json").read_text())
    assert (table["requests"], table["device"], len(table["cells"])) == ("sharegpt", "a100-80gb", 8)
    ours = [cell for cell in table["cells"] if cell["policy"] == "coserve"]
    assert all(cell["attainment"] >= 0.99 for cell in ours)
    assert ours[0]["finetuning_kept"] > 0.8


def test_prompts_leave_at_most_what_the_time_of_their_products_does():
    models = Path(__file__).parents[2] / "configs" / "models"
    given = flexllm.config_of(EIGHT, models / EIGHT.directory, "a100-80gb", "down_proj", 10.0, "sharegpt")
    prefill = StepRow(0, 0.0, 1.0, 1.0, "0+2048+8", Mix(prefill=30_000), 1, 0, 0.0)
    runs = SimpleNamespace(cell=lambda *_: SimpleNamespace(serving=Ran(name="", seconds=10.0, steps=[prefill])))
    cells = [{"policy": "coserve", "rate": 5.0, "finetune_tokens_per_s": 2132.6}]
    (line,) = flexllm._left(cells, runs, 4265.2, Virtual.of(given))
    assert "keeps 50% of finetuning alone" in line
    assert line.endswith("leave 76% at most")  # 3,000 a second, 2 x 6.98 GFLOP each, at 0.55 x 312 TFLOP/s


def test_missing_models_are_named(tmp_path):
    result = CliRunner().invoke(app, ["bench", "flexllm", "--models", str(tmp_path)])
    assert result.exit_code != 0
    assert EIGHT.directory in str(result.exception) + result.output
