"""``jaxserve coserve`` as a whole, on a tiny model: requests and a job, what is left behind, and going on from it."""

import csv
import json

import pytest
import tiny_models

from jaxserve.cli import main

pytestmark = pytest.mark.quick_compiles


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The directory of a finished run."""
    place = tmp_path_factory.mktemp("coserve")
    data = place / "data.jsonl"
    chat = {"messages": [{"role": "user", "content": "hello the"}, {"role": "assistant", "content": "and the hello"}]}
    data.write_text("\n".join(json.dumps(chat) for _ in range(6)) + "\n")
    model = tiny_models.build(place / "model", "llama", num_hidden_layers=1)
    config = {
        "model": {"path": str(model), "dtype": "float32", "max_model_len": 64},
        "engine": {"max_num_seqs": 2, "max_num_batched_tokens": 16, "block_size": 16},
        "lora": {"max_lora_rank": 16},
        "finetune": {"finetune_window": 16},
        "job": {"rank": 4, "learning_rate": 0.01, "batch_size": 3, "max_steps": 4, "output_dir": str(place / "jobs")},
        "coserve": {"jobs": [f"polite={data}"], "prompts": str(data), "results_dir": str(place / "out")},
        "bench": {"num_prompts": 6, "random_output_len": 6, "goodput": ["tpot:60000"]},
    }
    (place / "run.yaml").write_text(json.dumps(config))
    assert _run(["coserve", "--config", str(place / "run.yaml"), "--json"]) == 0
    return place


def _run(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    return exit.value.code or 0


def test_requests_are_served_and_the_adapter_learns_in_the_same_run(left):
    found = json.loads((left / "out" / "results.json").read_text())
    (job,) = found["jobs"]
    assert (found["requests"]["completed"], found["requests"]["failed"], found["requests"]["recompiles"]) == (6, 0, 0)
    assert (job["status"], job["steps"]) == ("succeeded", 4)
    assert job["last_loss"] < job["first_loss"]
    assert found["tokens"]["backward"] == found["finetune"]["tokens"] > 0
    assert found["slo"]["attainment"] == 1.0


def test_a_run_leaves_its_adapter_its_report_and_its_settings(left):
    out = left / "out"
    assert {path.name for path in out.iterdir()} >= {"report.html", "results.json", "requests.csv", "steps.csv"}
    assert json.loads((out / "adapters" / "polite" / "adapter_config.json").read_text())["r"] == 4
    assert len((out / "requests.csv").read_text().splitlines()) == 1 + 6


def test_the_last_token_came_within_the_seconds_that_rates_are_over(left):
    with open(left / "out" / "requests.csv", newline="") as file:
        times = [float(time) for row in csv.DictReader(file) for time in row["token_times_s"].split()]
    found = json.loads((left / "out" / "results.json").read_text())
    assert max(times) <= found["requests"]["duration"] + 1e-6
    assert found["finetune"]["seconds"] <= found["duration"]


def test_its_job_is_listed_as_done(left, capsys):
    assert _run(["jobs", str(left / "jobs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["adapter"], found["status"], found["step"], found["held"]) == ("polite", "succeeded", 4, False)


def test_results_that_cannot_be_written_are_shown_all_the_same(left, capsys):
    (left / "taken" / "results.json").mkdir(parents=True)
    again = ["coserve", "--config", str(left / "run.yaml"), "--results-dir", str(left / "taken"), "--json"]
    assert _run(again) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["type"] == "result"
    assert lines[-1]["requests"]["completed"] == 6
    assert "error: not all results were written: [Errno 21] Is a directory" in json.dumps(lines)
