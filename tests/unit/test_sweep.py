"""bench coserve: what ways to share come to, and the figures that its tables hold."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_models
from typer.testing import CliRunner

from jaxserve.assets import STORYTELLER
from jaxserve.bench import arrivals, live, parallel, policies, ran, serving, sweep, sweep_page, virtual
from jaxserve.bench.engine import options_of, room_for
from jaxserve.bench.load import read_prompts
from jaxserve.bench.replay import STOPPED, Mix, ServedRequest
from jaxserve.bench.runner import GREEDY
from jaxserve.bench.simulator import Settings, Simulator
from jaxserve.bench.virtual import Virtual
from jaxserve.bench.workload import BenchRequest, Row, Workload
from jaxserve.cli.app import app
from jaxserve.config import Config, resolve
from jaxserve.config.engine import SloClass
from jaxserve.errors import ConfigError, EngineError, InvalidRequest, JaxServeError, ModelError
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.errors import DataError
from jaxserve.models.config import ModelConfig
from jaxserve.scheduler.request import NEVER, Objective
from jaxserve.scheduler.scheduler import SchedulerConfig
from jaxserve.tokenizer import load_tokenizer

GOALS = {"ttft": 1.0, "tpot": 0.051}
EIGHT_DICT = tiny_models.config_dict(  # of the size of Llama-3.1-8B
    "llama", num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
)  # fmt: skip
EIGHT = ModelConfig.from_dict(EIGHT_DICT)


def step(at, seconds, backward=0, predicted=None):
    mix = Mix(**dict.fromkeys(Mix._fields, 0) | {"backward": backward})
    return ran.StepRow(0, at, seconds, predicted or seconds, "0+0+8", mix, 1, 0, 0.5)


def asked(start, *times, tokens=None):
    return ran.Asked(output_tokens=tokens or len(times), prompt_tokens=5, start=start, token_times=list(times))


class Arithmetic:
    """A backend whose finetuning is 100 tokens/s less 10 for each request per second."""

    def __init__(self):
        self.asked = []

    def run(self, sharing, rate):
        self.asked.append((sharing, rate))
        done = 0 if sharing == "inference-only" else int(100 - 10 * rate)
        late = 2.0 if rate > 8 else 0.5
        return ran.Ran(
            name=f"{sharing} {rate}", seconds=1.0, requests=[asked(0.0, late, late + 0.01)], steps=[step(0, 1.0, done)]
        )

    def spatial(self, rate):
        return self.run("inference-only", rate), self.run("finetune-only", 0.0)


def test_separate_replicas_are_counted_per_replica():
    backend = Arithmetic()
    cell = policies.Runs(backend).cell("separate:25", 2.0)
    assert backend.asked == [("inference-only", 8.0), ("finetune-only", 0.0)]
    assert cell.finetune_rate == 75.0
    assert "2 / 0.25 = 8 requests/s each" in cell.arithmetic
    found = policies.numbers(cell, GOALS, alone=100.0)
    assert found["finetuning_kept"] == 0.75
    assert found["goodput"] == 0.25  # one request in a second, on a quarter of the replicas


def test_replicas_that_get_all_requests_finetune_beside_them():
    backend = Arithmetic()
    cell = policies.Runs(backend).cell("coserve:50", 2.0)
    assert backend.asked == [("coserve", 4.0), ("finetune-only", 0.0)]
    assert cell.finetune_rate == 0.5 * 60 + 0.5 * 100
    assert "4 requests/s each and finetune, 0.5 x 60 = 30 tokens/s per replica; 50% finetune" in cell.arithmetic
    assert policies.numbers(cell, GOALS, alone=100.0)["goodput"] == 0.5  # one request in a second, on half of them


def test_co_serving_counts_on_as_many_replicas_as_is_best():
    class Convex(Arithmetic):
        def run(self, sharing, rate):
            made = super().run(sharing, rate)
            if sharing == "coserve":
                made.steps = [step(0, 1.0, int(90 - 2 * rate))]
            return made

    runs = policies.Runs(Convex())
    names = ("coserve", "coserve:25", "coserve:50", "separate:50", "inference-only")
    found = [policies.numbers(runs.cell(name, rate), GOALS, 100.0) for rate in (1.0, 3.0, 9.0) for name in names]
    light, heavy, too_heavy = policies.claims(found)
    assert (light["coserve_policy"], light["coserve_tokens_per_s"]) == ("coserve:25", 0.25 * 82 + 75)
    assert (light["best_other"], light["times_best_other"]) == ("separate:50", pytest.approx(95.5 / 50))
    assert heavy["coserve_policy"] == "coserve:50"  # on a quarter of them first tokens are late
    assert (too_heavy["coserve_policy"], too_heavy["coserve_attainment"]) == ("coserve", 0.0)


def test_co_serving_that_was_run_alone_is_compared_with_nothing():
    runs, said = policies.Runs(Arithmetic()), "at 1 requests/s coserve finetunes 90 tokens/s; no other way was run"
    cells = [policies.numbers(runs.cell(policy, 1.0), GOALS, None) for policy in ("coserve", "inference-only")]
    (line,) = sweep.claim_lines(policies.claims(cells))  # requests alone are no way to share
    assert line == f"{said}; 100.0% of its requests met the objectives"
    (claim,) = policies.claims(cells[:1])
    (line,) = sweep.claim_lines([claim])
    assert line == f"{said}; requests alone were not run; 100.0% of its requests met the objectives"
    tiles = sweep_page._tiles({"claims": [claim], "cells": cells})
    assert "90 tokens/s" in tiles
    assert " over " not in tiles


def test_a_run_that_several_ways_need_is_made_once():
    backend = Arithmetic()
    runs = policies.Runs(backend)
    for policy in ("separate:50", "separate:75", "finetune-only", "inference-only"):
        runs.cell(policy, 1.5)
    assert backend.asked.count(("finetune-only", 0.0)) == 1


def test_only_ways_that_keep_the_objectives_are_compared_with():
    runs = policies.Runs(Arithmetic())
    names = ("coserve", "separate:25", "separate:50", "inference-only", "finetune-only")
    found = [policies.numbers(runs.cell(name, rate), GOALS, 100.0) for rate in (1.0, 4.0) for name in names]
    light, heavy = policies.claims(found)
    assert (light["best_other"], light["times_best_other"]) == ("separate:25", pytest.approx(90 / 75))
    assert (
        heavy["best_other"] == "separate:50"
    )  # with a quarter of the replicas at 16 requests/s, first tokens are late
    assert heavy["requests_alone_meet"]


def test_figures_can_be_computed_again_from_the_tables(tmp_path):
    made = ran.Ran(
        name="coserve at 2",
        seconds=2.0,
        requests=[asked(0.1, 0.3, 0.35, 0.4), asked(0.5, 1.7, 1.75), asked(1.0, tokens=4)],
        steps=[step(0.0, 0.5, 10), step(0.5, 1.0, 20, predicted=1.1), step(1.6, 0.5, 40)],
    )
    made.requests[2].error = ran.NOT_OVER
    ran.write_tables(tmp_path, [made])
    requests, steps = ran.read_tables(tmp_path)["coserve at 2"]
    assert ran.finetune_tokens(steps, 2.0) == 30  # the last step ends after the run
    for one, other in (
        (ran.serving_numbers(requests, 2.0, GOALS), ran.serving_numbers(made.requests, 2.0, GOALS)),
        (ran.step_numbers(steps, 2.0), ran.step_numbers(made.steps, 2.0)),
    ):
        assert json.dumps(one) == json.dumps(other)
    numbers = ran.serving_numbers(requests, 2.0, GOALS)
    assert numbers["attainment"] == pytest.approx(1 / 3)
    assert numbers["tpot_ms"]["mean"] == pytest.approx(50.0)
    assert numbers["tpot_all_tokens_ms"]["mean"] == pytest.approx((100 / 3 + 25) / 2)


def test_output_tokens_count_while_requests_come():
    requests = [asked(0.1, 0.3, 1.9, 2.1, 2.2), asked(1.0, 1.5)]
    assert ran.serving_numbers(requests, 2.0, GOALS)["output_tokens_per_s"] == 1.5
    halved = ran.serving_numbers(requests, 2.0, GOALS, replicas=2)
    assert (halved["output_tokens_per_s"], halved["goodput"]) == (0.75, 0.25)


def test_a_plot_of_some_of_the_steps_says_so():
    cell = {"rate": 1.0, "prediction_error_p90": 0.1}
    made = ran.Ran(name="r", seconds=4.07, steps=[step(i / 100, 0.01, 7) for i in range(406)])
    page = sweep_page._over_time(cell, made, [])
    assert "One of" not in page
    more = ran.Ran(name="r", seconds=4.07, steps=[step(i / 1000, 0.001, 7) for i in range(4060)])
    assert "One of 3 steps is shown." in sweep_page._over_time(cell, more, [])


def test_requests_that_were_never_sent_have_missed_their_objectives():
    load = [BenchRequest(arrival_s=i / 4, prompt_ids=(1, 2), output_tokens=3, tenant="run\0t") for i in range(5)]
    each = {"prompt_tokens": 2, "output_tokens": 3}
    served = [
        ServedRequest(start=0.0, token_times=[0.1, 0.15, 0.2], over=True, **each),
        ServedRequest(start=0.25, token_times=[0.3], over=True, **each),  # a stop token ended it
        ServedRequest(start=0.5, token_times=[0.6], error=STOPPED, **each),
        ServedRequest(start=0.75, error="the prompt is too long", **each),
    ]
    found = live.asked(load, served)
    assert [r.error for r in found] == [None, None, ran.NOT_OVER, "the prompt is too long", ran.NOT_OVER]
    assert {(r.tenant, r.start) for r in found} == {("t", i / 4) for i in range(5)}
    numbers = ran.serving_numbers(found, 2.0, GOALS)
    assert numbers["attainment"] == pytest.approx(2 / 5)
    assert numbers["failures"] == ["1 failed: the prompt is too long"]


def test_a_sweep_says_which_runs_had_requests_or_jobs_that_failed(monkeypatch, capsys, tmp_path):
    class Failing(Arithmetic):
        def run(self, sharing, rate):
            made = super().run(sharing, rate)
            made.requests[0].error = "the prompt is too long" if rate else None
            return made

    monkeypatch.setattr(sweep, "make_backend", lambda config: Failing())
    monkeypatch.setattr(sweep, "agreements", lambda *_: [])
    options = {"simulate": "none", "policies": ("coserve", "finetune-only"), "results_dir": str(tmp_path)}
    assert sweep.main(simulated(sweep=options)) == 1
    line = "coserve 4.0: 1 failed: the prompt is too long (of 1 requests)"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "report.html").read_text()
    jobs = {"a": SimpleNamespace(status="running"), "b": SimpleNamespace(status="failed", error="not finite, twice")}
    with pytest.raises(EngineError, match=r"coserve at 2: the job of adapter 'b' failed: not finite, twice"):
        live.check_trained("coserve at 2", jobs)


def test_a_second_process_that_ends_is_not_waited_for(tmp_path, capfd):
    engine = object.__new__(live.Live)
    engine.config = Config(model={"path": str(tmp_path / "nowhere")})
    with pytest.raises(EngineError, match="the second process has ended"):
        engine.spatial(1.0)
    assert "nowhere" in capfd.readouterr().err


def test_made_up_requests_come_to_the_end_however_bursty_they_are():
    rows, _ = arrivals.rows_at(Config(bench={"burstiness": 0.05, "seed": 9}), 5.0, 60.0)
    assert 59 < rows[-1].arrival_s < 60
    rows, said = arrivals.rows_at(Config(coserve={"burst_factor": 10.0}), 5.0, 60.0)
    assert len(rows) == pytest.approx(5 * 60 * 3.25, rel=0.2)
    assert said.endswith("bursts of 10 times the rate for 3 s every 12 s")


def test_bursts_count_among_the_requests_that_can_be_kept():
    given = simulated(sweep={"rates": (1e5,), "policies": ("coserve",)}, coserve={"burst_factor": 100.0})
    with pytest.raises(ConfigError, match="are more than 10,000,000 requests"):
        sweep.main(given)


def test_a_trace_is_brought_to_any_rate_and_length():
    rows = [Row(10.0 + i, 5, 3) for i in range(11)]  # one a second
    found, said = arrivals.trace_at(rows, 2.0, 20.0, "stretch")
    assert len(found) == pytest.approx(40, abs=2)
    assert "time stretched 0.5 times" in said
    assert "times over, times from the first arrival at 10 s on" in said
    assert max(row.arrival_s for row in found) < 20
    thin, said = arrivals.trace_at(rows, 0.5, 10.0, "thin", seed=1)
    assert 0 < len(thin) <= 6
    assert "thinned to 0.5" in said
    with pytest.raises(ConfigError, match="come at once"):
        arrivals.trace_at([Row(1.0, 5, 3)] * 3, 2.0, 20.0, "stretch")


def test_the_rate_is_that_of_the_rows_which_come():
    times = [float(i) for i in range(100)] + [100 + i / 10 for i in range(1000)]  # quiet, then ten times as busy
    rows = [Row(time, 5, 3) for time in times]
    for rate, seconds in ((2.0, 20.0), (0.5, 60.0), (20.0, 40.0)):
        found, said = arrivals.trace_at(rows, rate, seconds, "stretch")
        assert len(found) == rate * seconds
        assert "over" not in said
    thin, said = arrivals.trace_at(rows, 0.5, 60.0, "thin", seed=1)
    assert "thinned to 0.5 of its rows" in said
    assert len(thin) == pytest.approx(30, abs=8)
    with pytest.raises(ConfigError, match=r"2 requests/s of a trace that has 1 in its first 60 s"):
        arrivals.trace_at(rows, 2.0, 60.0, "thin")


def test_a_trace_that_begins_with_many_at_once_is_stretched():
    rows = [Row(0.0, 5, 3)] * 9 + [Row(3.0, 5, 3)] * 9
    found, _ = arrivals.trace_at(rows, 1.0, 6.0, "stretch")
    assert [row.arrival_s for row in found] == [0.0] * 9


def test_a_rate_that_thinning_cannot_reach_is_refused_before_the_first_run(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,5,3\n1,5,3\n2,5,3\n")
    given = simulated(
        bench={"trace": str(trace), "trace_scaling": "thin"},
        sweep={"rates": (0.5,), "policies": ("coserve", "separate:25")},
    )
    with pytest.raises(ConfigError, match=r"sweep\.rates: 2 requests/s of a trace that has 1 in its first 3 s"):
        sweep.main(given)


class Slow:
    """A device whose steps all take as long."""

    def seconds(self, planned):
        return 0.1


def simulated(**sections):
    model = {"path": "unused", "max_model_len": 2048, **sections.pop("model", {})}
    sweep_section = {"simulate": "h200", "seconds": 10.0, "rates": (4.0,), **sections.pop("sweep", {})}
    finetune = {"tpot_objective_ms": 45.0, "ttft_objective_ms": 5000.0, "finetune_window": 1024}
    return Config(model=model, sweep=sweep_section, finetune=finetune, **sections)


def test_more_requests_than_can_be_kept_are_refused_before_the_first_run():
    given = simulated(sweep={"rates": (1e9,), "replicas": 2, "policies": ("coserve",)})
    with pytest.raises(ConfigError, match="on each of 2 replicas for 10 s are more than 10,000,000 requests"):
        sweep.main(given)


def test_the_load_that_is_told_is_that_of_all_replicas():
    given = simulated(sweep={"replicas": 2})
    said = sweep.preface(given, Virtual(config=given, model=EIGHT))[0]
    assert "load of 2 replicas together, at the first rate: random lengths, 8 requests/s" in said


def test_simulated_co_serving_keeps_the_objectives_and_more_finetuning_than_the_others():
    backend = Virtual(config=simulated(), model=EIGHT)
    runs = policies.Runs(backend)
    names = ("coserve", "temporal-dynamic", "separate:50", "spatial", "inference-only")
    alone = runs.cell("finetune-only", 4.0).finetune_rate
    found = [policies.numbers(runs.cell(name, 4.0), GOALS | {"ttft": 5.0}, alone) for name in names]
    (claim,) = policies.claims(found)
    assert claim["requests_alone_meet"]
    assert claim["coserve_attainment"] >= 0.99
    assert claim["times_best_other"] > 1.2
    again = policies.Runs(Virtual(config=simulated(), model=EIGHT)).cell("coserve", 4.0)
    assert again.finetune_rate == found[0]["finetune_tokens_per_s"]  # by seed


def test_simulated_examples_fit_into_the_stash():
    config = simulated(bench={"finetune_longest": 2048})
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"finetune_stash_tokens": 300})})
    backend = Virtual(config=config, model=EIGHT)
    assert backend.run("finetune-only", 1.0).finetune_rate > 0


def test_a_simulated_engine_is_sized_as_one_that_is_there():
    config = simulated(engine={"max_num_batched_tokens": 32, "max_num_seqs": 16})
    more = {"finetune_stash_tokens": 300, "slo_classes": (SloClass("chat", 100.0),)}
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update=more)})
    settings = virtual.settings_of(config, EIGHT, Virtual(config=config, model=EIGHT).device, "coserve")
    assert (settings.stash_blocks, settings.limits.max_num_batched_tokens) == (5, 64)
    assert settings.objectives == (Objective(5.0, 0.045), Objective(0.1, NEVER))
    with pytest.raises(ConfigError, match="max_model_len 9000 exceeds max_position_embeddings 8192"):
        Virtual(config=simulated(model={"max_model_len": 9000}), model=EIGHT).run("coserve", 1.0)


def test_what_a_process_asks_of_the_bandwidth_is_that_of_its_steps():
    backend = Virtual(config=simulated(), model=EIGHT)
    settings = virtual.settings_of(backend.config, EIGHT, backend.device, "finetune-only")
    device = virtual._Measured(backend.make_device(settings))
    Simulator(settings, device, backend.jobs())  # calibrates
    assert device.bandwidth == 0.0


def test_simulated_jobs_have_the_settings_that_are_given():
    job = {"deterministic": True, "window": 128}
    config = simulated(model={"max_model_len": 256}, bench={"finetune_longest": 4096}, job=job)
    (job,) = Virtual(config=config, model=EIGHT).jobs()
    assert (job.config.deterministic, job.config.window) == (True, 128)
    assert max(example.num_tokens for example in job.dataset.examples) <= 256
    assert any(" to 256 tokens, 8 to a batch" in line for line in Virtual(config=config, model=EIGHT).assumptions())


def test_what_a_simulated_device_knows_nothing_of_is_refused():
    config = simulated(
        model={"dtype": "float32"},
        job={"method": "dora"},
        coserve={
            "jobs": ("a=a.jsonl", '{"adapter": "b", "data": "b.jsonl", "target_modules": ["q_proj"], "method": "ia3"}')
        },
        sampling={"temperature": 0.5, "top_k": 3},
    )
    with pytest.raises(ConfigError) as error:
        sweep.check(config)
    assert [line.partition(";")[0] for line in error.value.errors] == [
        "model.dtype float32: a simulated device computes with operands of 16 bits",
        "coserve.jobs, a: method dora",
        "coserve.jobs, b: method ia3",
        "coserve.jobs, b: in a simulation all jobs have job.target_modules",
        "sampling: nothing is drawn in a simulation, whose answers are as long as the load says",
    ]
    sweep.check(simulated(sampling={"temperature": 0.0, "ignore_eos": True}))


def test_simulated_jobs_of_other_ranks_take_what_their_ranks_do():
    def backend(rank):
        other = {"adapter": "b", "data": "b.jsonl", "rank": rank}
        return Virtual(config=simulated(coserve={"jobs": ("a=a.jsonl", other)}), model=EIGHT)

    class Both:
        """Steps of two devices."""

        def seconds(self, planned):
            steps.append((wide.load(planned), plain.seconds(planned), wide.seconds(planned)))
            return 0.1

    settings = virtual.settings_of(simulated(), EIGHT, backend(16).device, "coserve")
    plain, wide = (backend(rank).make_device(settings) for rank in (16, 256))
    simulator, steps = Simulator(settings, Slow(), backend(256).jobs()), []
    simulator.device = Both()
    simulator((), 1.0)
    assert {load.adapters for load, *_ in steps} <= {(16,), (256,), (16, 256)}
    assert all(16 <= load.grad_rank <= 256 for load, *_ in steps)
    assert any(16 < load.grad_rank < 256 for load, *_ in steps)
    assert all((narrow < wide) == (256 in load.adapters) for load, narrow, wide in steps)
    assert any("rank 16, 256 on" in line for line in backend(256).assumptions())


def test_simulated_pages_are_found_again_only_where_they_are_kept():
    for keep in (True, False):
        config = simulated(bench={"shared_prefix_len": 64}, engine={"enable_prefix_caching": keep})
        settings = virtual.settings_of(config, EIGHT, Virtual(config=config, model=EIGHT).device, "inference-only")
        assert Simulator(settings, Slow()).pool.enable_prefix_cache == keep


def test_too_few_pages_are_named():
    config = simulated(engine={"num_kv_pages": 10})
    with pytest.raises(ConfigError, match=r"engine.num_kv_pages 10: 640 tokens, less than one sequence of 2048"):
        Virtual(config=config, model=EIGHT).run("coserve", 1.0)


def test_runs_are_listed_once_in_the_order_of_their_need():
    cells = [(policy, rate) for rate in (1.0, 2.0) for policy in ("coserve", "separate:50", "spatial", "finetune-only")]
    assert parallel.calls_of(cells) == [
        ("coserve", 1.0), ("inference-only", 2.0), ("finetune-only", 0.0), ("spatial", 1.0),
        ("coserve", 2.0), ("inference-only", 4.0), ("spatial", 2.0),
    ]  # fmt: skip


def test_with_one_process_nothing_is_made_elsewhere():
    backend = Virtual(config=simulated(), model=EIGHT)
    with parallel.Pool(1) as pool:
        assert pool.backend(backend, [("coserve", 4.0)]) is backend


@pytest.mark.slow
def test_other_processes_simulate_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EIGHT_DICT))
    config = simulated(sweep={"replicas": 2, "seconds": 5.0})
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path)})})
    backend, cells = Virtual.of(config), [("coserve", 4.0), ("spatial", 4.0), ("separate:50", 4.0)]
    here = policies.Runs(backend)
    with parallel.Pool(2) as pool:
        there = policies.Runs(pool.backend(backend, cells))
        for cell in cells:
            found = [policies.numbers(runs.cell(*cell), GOALS, 100.0) for runs in (here, there)]
            assert found[0] == found[1]
    for name, runs in (("here", here), ("there", there)):
        (tmp_path / name).mkdir()
        ran.write_tables(tmp_path / name, list(runs))
    for table in ("requests.csv", "steps.csv"):
        assert (tmp_path / "here" / table).read_bytes() == (tmp_path / "there" / table).read_bytes()


def test_processes_end_with_the_one_that_is_killed():
    code = (
        "import os, time\n"
        "from jaxserve.bench.processes import spawned\n"
        "pool = spawned(1)\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    try:
        assert parent.communicate(timeout=20) == ("", None)  # the worker has closed its end as well
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        raise


@pytest.mark.slow
def test_what_another_process_refuses_is_said_here(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EIGHT_DICT | {"num_hidden_layers": 120}))
    config = simulated()
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path)})})
    with parallel.Pool(2) as pool, pytest.raises(ConfigError) as error:
        pool.backend(Virtual.of(config), [("spatial", 4.0)]).spatial(4.0)
    assert error.value.errors == [str(error.value)]
    assert "2 x weights" in str(error.value)


@pytest.mark.parametrize(
    ("tensor_parallel", "refusal"), [(3, "does not divide"), (16, "at most num_key_value_heads 8")]
)
def test_a_model_that_no_engine_would_split_so_is_not_simulated(tmp_path, tensor_parallel, refusal):
    (tmp_path / "config.json").write_text(json.dumps(EIGHT_DICT))
    config = simulated(model={"path": str(tmp_path)}, engine={"tensor_parallel": tensor_parallel})
    with pytest.raises((ModelError, InvalidRequest), match=refusal):
        Virtual.of(config)


def test_what_cannot_be_run_is_said_before_anything_is_loaded():
    config = Config(
        sweep={"replicas": 4, "processes": 2, "matmul_efficiency": 0.5},
        lora={"enable_lora": False},
        coserve={"answer_with": ("base", "nobody", "a"), "jobs": ("a=a.jsonl",)},
    )
    with pytest.raises(ConfigError) as error:
        sweep.check(config)
    said = str(error.value)
    for part in (
        "MODEL",
        "tpot_objective_ms",
        "sweep.replicas: ",
        "sweep.processes: ",
        "sweep.matmul_efficiency: ",
        "enable_lora",
        "no 'nobody'",
    ):
        assert part in said
    assert len(error.value.errors) == 7


def test_data_that_is_not_there_is_said_before_anything_is_loaded():
    given = {"model": {"path": "demo:storyteller"}, "finetune": {"tpot_objective_ms": 45.0}}
    with pytest.raises(DataError, match=r"job of adapter 'a': data file: No such file"):
        sweep.check(Config(**given, coserve={"jobs": ("a=none.jsonl",)}))
    for model, problem in (("m", "m: not a model directory"), ("demo:storyteller", "none.jsonl: data file: No such")):
        with pytest.raises(JaxServeError, match=problem):
            sweep.check(Config(**given | {"model": {"path": model}}, coserve={"prompts": "none.jsonl"}))


def test_prompts_may_have_their_contents_in_parts(tmp_path):
    tokenizer = load_tokenizer(STORYTELLER)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n"
            for content in ("a\nb", [{"type": "text", "text": text} for text in "ab"])
        )
    )
    one, other = read_prompts(str(tmp_path / "prompts.jsonl"), tokenizer)
    assert one == other


def test_what_a_sweep_has_no_use_for_is_refused_with_what_says_it_instead():
    given = simulated(
        bench={"num_prompts": 7, "request_rate": 2.0, "trace_speed": 2.0, "repeats": 3}, coserve={"results_dir": "out"}
    )
    with pytest.raises(ConfigError) as error:
        sweep.check(given)
    assert {line.partition(":")[0] for line in error.value.errors} == {
        "bench.num_prompts", "bench.request_rate", "bench.trace_speed", "bench.repeats", "coserve.results_dir",
    }  # fmt: skip
    assert "--sweep-dir" in str(error.value)


def test_job_settings_that_a_sweep_does_not_keep_are_refused():
    jobs = ("a=a.jsonl", {"adapter": "b", "data": "b.jsonl", "schedule": "cosine"})
    given = simulated(job={"max_steps": 5, "output_dir": "out", "learning_rate": 0.1}, coserve={"jobs": jobs})
    with pytest.raises(ConfigError) as error:
        sweep.check(given)
    assert [line.partition(": the sweep's jobs go on")[0] for line in error.value.errors] == [
        "job.max_steps", "job.output_dir", "job of adapter 'b': schedule",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"^job.batch_size: that of made-up examples is bench.finetune_batch$"):
        sweep.check(simulated(job={"batch_size": 4}))


def test_the_configuration_that_a_sweep_leaves_can_be_run_again(tmp_path):
    given = simulated(coserve={"jobs": ("a=a.jsonl", "b=b.jsonl")})
    serving.write_config(given, tmp_path)
    again = resolve(str(tmp_path / "config.yaml"))
    sweep.check(again)
    assert serving.sampling(again) == GREEDY
    options = [options_of(config, room_for(config, [FinetuneConfig()] * 2)) for config in (given, again)]
    assert options[0] == options[1]
    assert options[0]["max_finetune_jobs"] == 2


@pytest.mark.parametrize(("objective", "over"), [((1.0, 0.11), True), ((NEVER, 0.05), True), ((1.0, 0.05), False)])
def test_a_long_answer_is_waited_for_as_long_as_its_objectives_allow(objective, over):
    limits = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=1024)
    given = Settings(limits=limits, num_pages=64, objectives=(Objective(*objective),))
    request = BenchRequest(arrival_s=0.0, prompt_ids=(1, 2, 3), output_tokens=900)
    (found,) = virtual.simulated("", Simulator(given, Slow()), Workload(requests=(request,), source=""), 1.0).requests
    assert (found.error is None) == over


@pytest.mark.parametrize("policy", ["coserve", "spatial"])
def test_requests_that_are_cut_to_the_models_length_are_counted(policy):
    config = simulated(bench={"random_input_len": 2000, "random_output_len": 100}, sweep={"replicas": 2})
    cell = policies.Runs(Virtual(config=config, model=EIGHT)).cell(policy, 0.5)
    cut = [r for r in cell.serving.requests if r.prompt_tokens + r.output_tokens == 2048]
    found = policies.numbers(cell, GOALS, None)
    assert 0 < found["clipped"] == len(cut) < found["requests"]
    (line,) = sweep.clip_lines([found])
    assert line == f"at 0.5 requests/s {len(cut)} of {found['requests']} requests were clipped to the model's length"


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), SystemExit(128 + signal.SIGTERM), EngineError("the second process has ended")],
    ids=type,
)
def test_a_sweep_that_ends_early_leaves_what_it_has(tmp_path, monkeypatch, capsys, error):
    (tmp_path / "config.json").write_text(json.dumps(EIGHT_DICT))
    config = simulated(
        sweep={
            "policies": ("coserve", "temporal:8", "inference-only"), "rates": (1.0, 2.0), "seconds": 2.0,
            "processes": 1, "results_dir": str(tmp_path / "out"),
        }
    )  # fmt: skip
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path)})})
    run = Virtual.run

    def failing(self, sharing, rate):
        if (sharing, rate) == ("temporal:8", 2.0):
            if isinstance(error, SystemExit):
                signal.raise_signal(signal.SIGTERM)
            raise error
        return run(self, sharing, rate)

    monkeypatch.setattr(Virtual, "run", failing)
    with pytest.raises(type(error)) as caught:
        sweep.main(config)
    assert str(caught.value) == str(error)
    assert "Ended early: 4 of 6 cells were run." in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["policy"] for cell in result["cells"]] == [*config.sweep.policies, "coserve"]
    assert "Ended early" in (tmp_path / "out" / "report.html").read_text()
    assert len(ran.read_tables(tmp_path / "out")) == 4


def test_a_disk_that_is_full_at_the_end_of_a_sweep_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EIGHT_DICT))
    (tmp_path / "steps.csv").symlink_to("/dev/full")
    few = {"policies": ("inference-only",), "rates": (1.0,), "seconds": 1.0, "processes": 1}
    config = simulated(sweep={**few, "results_dir": str(tmp_path)})
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path)})})
    with pytest.raises(EngineError, match=r"^not all results were written: .*No space left on device$"):
        sweep.main(config)
    assert (tmp_path / "results.json").stat().st_size


def test_a_simulated_sweep_prints_and_leaves_its_report(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EIGHT_DICT))
    arguments = [
        "bench", "coserve", str(tmp_path), "--simulate", "h200", "--rates", "3", "--seconds", "5",
        "--max-model-len", "1024", "--random-input-len", "400", "--random-output-len", "80",
        "--tpot-objective-ms", "40", "--policies", "coserve",
        "--policies", "separate:50", "--policies", "finetune-only", "--replicas", "2", "--processes", "1",
        "--sweep-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "coserve" in result.output
    assert "steps per second of it" in result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    tables = ran.read_tables(tmp_path / "out")
    ours = next(cell for cell in cells if cell["policy"] == "coserve")
    requests, steps = tables[ours["serving_run"]]
    assert {request.replica for request in requests} == {0, 1}
    assert ours["finetune_tokens_per_s"] == pytest.approx(ran.finetune_tokens(steps, 5.0) / 5.0 / 2)
