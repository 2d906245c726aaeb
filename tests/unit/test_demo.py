"""The demo's settings, the sample configurations, and the page that a co-serving run leaves behind."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxserve.bench.coserve_numbers import Answer, Coserved, numbers, so_far, text_block
from jaxserve.bench.coserve_page import REPORT, write
from jaxserve.bench.replay import Learnt, Mix, MixedRun, MixedStep, ServedRequest
from jaxserve.cli import demo
from jaxserve.cli.coserve import check
from jaxserve.config import dump_config, resolve

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A run makes its folders before anything else."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["finetune", "coserve"])
def test_the_yaml_and_the_gin_file_are_the_same_run(name):
    assert resolve(str(CONFIGS / f"{name}.yaml")) == resolve(str(CONFIGS / f"{name}.gin"))


@pytest.mark.parametrize("config", [demo.settings("out", 30.0), resolve(str(CONFIGS / "coserve.yaml"))])
def test_both_sample_jobs_can_be_run(config):
    assert [job.adapter for job in check(config)] == ["pirate", "cards"]


def test_the_configuration_that_a_run_leaves_can_be_run_again(tmp_path):
    written = dump_config(resolve(str(CONFIGS / "coserve.yaml")).model_dump(mode="json"), "yaml")
    (tmp_path / "config.yaml").write_text(written)
    assert check(resolve(str(tmp_path / "config.yaml")))


def test_more_seconds_have_more_requests():
    counts = [demo.num_requests(seconds) for seconds in (5, 8, 30, 60)]
    assert counts == sorted(set(counts))


def _done() -> Coserved:
    requests = [
        ServedRequest(
            prompt_tokens=5, start=float(i), token_times=[i + 0.25, i + 0.26, i + 0.29], token_ids=[1, 2, 3],
            output_tokens=3, adapter=None if i % 2 else "pirate", version=None, over=True,
        )
        for i in range(4)
    ]  # fmt: skip
    timing = {"host_seconds": 0.001, "plan_seconds": 0.0, "pack_seconds": 0.0, "commit_seconds": 0.0}
    steps = [
        MixedStep(
            seconds=0.02, tokens=1, running=1, kv_usage=0.5, at=i / 10, mix=Mix(1, 2, 3, 4), bucket="32+64+8",
            waiting=0, **timing,
        )
        for i in range(40)
    ]  # fmt: skip
    learnt = {"pirate": [Learnt(0.5, 1, 4.5), Learnt(1.0, 2, 0.75)]}
    job = SimpleNamespace(
        id="ftjob-1", status="succeeded", error=None, step=2, total_steps=2, trained_tokens=123,
        losses=[4.5, 0.75], validation_losses=[(0, 4.625), (2, 0.875)],
    )  # fmt: skip
    run = MixedRun(requests=[*requests], steps=[*steps], learnt=learnt, duration=4.0)
    run.served_until, run.trained_until = 3.5, 4.0
    answers = [Answer(prompt="<b>Ahoy?</b>", texts={"base": "No.", "pirate": "Arr & ahoy!"})]
    return Coserved(
        run=run,
        jobs={"pirate": job},
        goodput=("ttft:1000", "tpot:40"),
        bursts=[(1.0, 2.0)],
        source="s",
        answers=answers,
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    done = _done()
    write(place, done, numbers(done), "A run")
    return (place / REPORT).read_text(), json.loads((place / "results.json").read_text())


def test_the_report_refers_to_nothing_outside(left):
    page, _ = left
    assert not re.search(r"""(?:src|href|action)\s*=|url\(|@import|<script|<link|<iframe|https?:|//\w""", page)


def test_the_reports_numbers_are_those_of_the_results(left):
    page, found = left
    served, tuned, (job,) = found["requests"], found["finetune"], found["jobs"]
    assert tuned["tokens"] == 40 * 4
    assert tuned["tokens_per_s"] == 40
    assert found["slo"]["attainment"] == 1.0
    for shown in (
        f"{served['median_ttft_ms']:.0f} ms",
        f"{served['median_tpot_ms']:.1f} ms",
        f"{found['slo']['attainment']:.1%}",
        f"{tuned['tokens_per_s']:,.0f} tokens/s",
        f"{job['first_validation_loss']:.2f} → {job['last_validation_loss']:.2f}",
        f"{job['first_loss']:.4f}",
        f"{job['last_loss']:.4f}",
    ):
        assert shown in page, shown


def test_a_latency_that_no_request_has_is_not_shown(tmp_path):
    done = _done()
    for request in done.run.requests:
        request.token_times = request.token_times[:1]
    found = numbers(done)
    write(tmp_path, done, found, "A run")
    assert found["requests"]["median_tpot_ms"] is so_far(done.run, done.goodput)["median_tpot_ms"] is None
    assert so_far(done.run, done.goodput)["median_ttft_ms"] == pytest.approx(250.0)
    page = (tmp_path / REPORT).read_text()
    assert "<b>- ms</b>" in page
    assert "<b>0.0 ms</b>" not in page
    assert "TPOT            mean -, median -, p99 - ms" in text_block(found)


def test_a_request_that_is_refused_is_over():
    run = MixedRun(requests=[ServedRequest(prompt_tokens=5, start=0.0, output_tokens=3, error="too long")])
    assert (so_far(run, ["ttft:500"])["done"], so_far(run, ["ttft:500"])["attainment"]) == (1, 0.0)


def test_what_models_say_is_text_and_no_markup(left):
    page, _ = left
    assert "&lt;b&gt;Ahoy?&lt;/b&gt;" in page
    assert "Arr &amp; ahoy!" in page
