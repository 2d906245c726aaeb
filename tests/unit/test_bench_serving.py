import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from jaxserve.assets import STORYTELLER
from jaxserve.bench import finetune, serving, sweep
from jaxserve.bench.report import (
    RequestRecord,
    Run,
    StepRecord,
    detail,
    failures,
    is_good,
    metrics,
    objectives,
    text_block,
)
from jaxserve.bench.runner import Runner
from jaxserve.bench.workload import BenchRequest, Workload
from jaxserve.cli import coserve
from jaxserve.config import Config, Entry, resolve
from jaxserve.config.schema import LoraSection
from jaxserve.errors import ConfigError, EngineError, InvalidRequest
from jaxserve.outputs import Event

pytestmark = pytest.mark.quick_compiles

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


class TickingEngine:
    """Takes a second per step, of which a tenth is the host's; gives every request a token per step, two at a time."""

    def __init__(self, max_queue: int = 100):
        self.now, self.max_queue = 0.0, max_queue
        self.slept: list[float] = []
        self.alive: dict[str, list] = {}
        self.given: list[tuple] = []
        core = type("Core", (), {"commit": lambda core: self._pass(0.01)})
        self.core = core()
        self.core.host_seconds = 0.0
        self.core.planner = type("Planner", (), {"plan": lambda planner: self._pass(0.05)})()
        self.core.packer = type("Packer", (), {"pack": lambda packer: self._pass(0.02)})()

    def _pass(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def add_request(self, prompt, params, *, adapter, tenant):
        if len(prompt) > 9:
            raise InvalidRequest("prompt is too long", "prompt")
        self.given.append((params, adapter, tenant))
        request_id = f"r{len(self.given)}"
        self.alive[request_id] = [params.max_tokens]
        return request_id

    def queue_has_room(self, params) -> bool:
        return len(self.alive) - 2 < self.max_queue

    def step(self) -> list[Event]:
        start = self.now
        self.core.planner.plan()
        self.core.packer.pack()
        self.core.commit()
        self.core.host_seconds += 0.1
        self.now = start + 1.0
        events = []
        for request_id, left in list(self.alive.items())[:2]:
            left[0] -= 1
            events.append(
                Event(request_id=request_id, index=0, token_ids=[7], finish_reason=None if left[0] else "length")
            )
            if not left[0]:
                del self.alive[request_id]
        return events

    def stats(self):
        counts = {"recompiles": 0, "preemptions": 0, "prefix_hits": 0}
        return {**counts, "running": len(self.alive), "kv_usage": len(self.alive) / 4}


def request(arrival: float, outputs: int, prompt: int = 3, **fields) -> BenchRequest:
    return BenchRequest(arrival_s=arrival, prompt_ids=(1,) * prompt, output_tokens=outputs, **fields)


def run(*requests: BenchRequest, max_queue: int = 100, **options) -> tuple[Run, TickingEngine]:
    engine = TickingEngine(max_queue)
    load = Workload(requests=requests, source="test")
    return Runner(engine, load, clock=lambda: engine.now, sleep=engine.sleep, **options)(), engine


# the runner


def test_requests_are_sent_when_they_are_due_and_the_engine_sleeps_until_then():
    found, engine = run(request(0.5, 1), request(4.0, 2))
    assert engine.slept == [0.5, 2.5]
    assert [r.token_times for r in found.requests] == [[1.5], [5.0, 6.0]]
    assert found.duration == 6.0


def test_latency_counts_from_the_arrival_even_if_a_step_was_running():
    found, _ = run(request(0.0, 3), request(0.25, 1))
    assert [r.ttft for r in found.requests] == [1.0, 1.75]


def test_no_more_requests_are_in_flight_than_allowed():
    found, _ = run(*[request(0.0, 2) for _ in range(3)], max_concurrency=1)
    assert [r.start for r in found.requests] == [0.0, 2.0, 4.0]
    assert [r.ttft for r in found.requests] == [1.0, 1.0, 1.0]
    assert {step.running for step in found.steps} == {0, 1}


def test_requests_wait_for_room_in_the_queue_and_their_latencies_count_from_their_arrival():
    found, _ = run(*[request(0.0, 2) for _ in range(6)], max_queue=1)
    assert [r.start for r in found.requests] == [0.0] * 6
    assert [r.ttft for r in found.requests] == [1.0, 1.0, 3.0, 3.0, 5.0, 5.0]
    assert max(step.running for step in found.steps) == 3
    assert found.duration == 6.0


def test_requests_run_greedily_to_their_length_on_their_adapter_and_tenant():
    found, engine = run(request(0.0, 3, adapter="a", tenant="t"))
    params, adapter, tenant = engine.given[0]
    assert (params.max_tokens, params.temperature, params.ignore_eos) == (3, 0.0, True)
    assert (adapter, tenant) == ("a", "t")
    assert found.requests[0].token_ids == [7, 7, 7]


def test_a_refused_request_fails_alone():
    found, _ = run(request(0.0, 1), request(0.0, 1, prompt=10))
    assert [r.error for r in found.requests] == [None, "prompt is too long"]
    numbers = metrics(found)
    assert (numbers["completed"], numbers["failed"], numbers["total_input_tokens"]) == (1, 1, 3)
    assert failures(found.requests) == ["1 failed: prompt is too long"]


def test_who_else_looks_at_the_plans_still_does_so_after_a_run():
    engine, seen = TickingEngine(), []
    planner = engine.core.planner
    plan = planner.plan
    planner.plan = watched = lambda: seen.append(plan())
    load = Workload(requests=(request(0.0, 3),), source="test")
    Runner(engine, load, clock=lambda: engine.now, sleep=engine.sleep)()
    assert len(seen) == 3
    assert planner.plan is watched


def test_each_step_knows_what_the_parts_of_the_host_took():
    found, engine = run(request(0.0, 2))
    step = found.steps[0]
    parts = (step.plan_seconds, step.pack_seconds, step.dispatch_seconds, step.commit_seconds)
    assert parts == pytest.approx((0.05, 0.02, 0.02, 0.01))
    assert (step.seconds, step.host_seconds, step.kv_usage) == pytest.approx((1.0, 0.1, 0.25))
    assert "plan" not in vars(engine.core.planner)  # the stopwatch is gone again


# the numbers


def record(start: float, *times: float) -> RequestRecord:
    return RequestRecord(prompt_tokens=10, start=start, token_times=list(times), token_ids=[1] * len(times))


def step(running: int, tokens: int, host: float) -> StepRecord:
    parts = {"plan_seconds": host / 2, "pack_seconds": host / 8, "commit_seconds": host / 4}
    return StepRecord(seconds=0.1, host_seconds=host, tokens=tokens, running=running, kv_usage=running / 10, **parts)


RUN = Run(
    requests=[record(0.0, 1.0, 1.2, 1.4), record(1.0, 1.5), record(0.0)],
    steps=[step(1, 0, 0.02), step(2, 2, 0.01), step(2, 2, 0.03)],
    duration=2.0,
)


def test_the_two_definitions_of_time_per_output_token_differ_in_what_they_divide_by():
    first = RUN.requests[0]
    assert first.tpot == pytest.approx(0.4 / 2)
    assert first.tpot_all_tokens == pytest.approx(0.4 / 3)
    assert RUN.requests[1].tpot is RUN.requests[1].tpot_all_tokens is None


def test_the_metrics_are_those_a_hand_computes():
    numbers = metrics(RUN)
    expected = {
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 20,
        "total_output_tokens": 4,
        "request_throughput": 1.0,
        "output_throughput": 2.0,
        "total_token_throughput": 12.0,
        "max_output_tokens_per_s": 4,
        "max_concurrent_requests": 2,
        "mean_ttft_ms": 750.0,
        "median_ttft_ms": 750.0,
        "p99_ttft_ms": 995.0,
        "std_ttft_ms": 250.0,
        "mean_tpot_ms": 200.0,
        "mean_itl_ms": 200.0,
        "mean_e2el_ms": 950.0,
        "num_steps": 3,
        "kv_usage_mean": 0.5 / 3,
        "kv_usage_max": 0.2,
        "host_share": 0.2,
        "recompiles": 0,
    }
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)
    assert numbers["request_goodput"] is None


def test_host_time_of_a_full_batch_counts_only_steps_that_drew_a_token_for_every_sequence():
    full = metrics(RUN)["host_full_batch"]
    assert (full["running"], full["steps"]) == (2, 2)
    assert (full["median"], full["plan"]) == pytest.approx((20.0, 10.0))
    assert (full["send"], full["min"]) == pytest.approx((15.0, 7.5))  # without what is taken in afterwards


def test_a_step_that_sends_nothing_does_not_count():
    last = replace(step(2, 2, 0.001), pack_seconds=0.0)
    full = metrics(replace(RUN, steps=[*RUN.steps, last]))["host_full_batch"]
    assert full == metrics(RUN)["host_full_batch"]


@pytest.mark.parametrize(
    ("goals", "good"),
    [
        (["ttft:1000"], 2),
        (["ttft:999"], 1),
        (["tpot:201"], 2),  # a single token has no gap to judge
        (["tpot:199"], 1),
        (["e2el:600", "ttft:2000"], 1),
        (["itl:199"], 1),
    ],
)
def test_goodput_counts_requests_that_meet_every_objective(goals, good):
    assert metrics(RUN, goals)["request_goodput"] == good / 2.0
    assert sum(is_good(r, objectives(goals)) for r in RUN.done) == good


def test_a_run_in_which_nothing_succeeded_still_has_numbers():
    numbers = metrics(Run(requests=[record(0.0)], duration=1.0))
    assert (numbers["completed"], numbers["output_throughput"], numbers["mean_ttft_ms"]) == (0, 0.0, None)
    assert "Failed requests:                         1" in text_block(numbers)


def test_a_latency_that_no_request_has_is_no_number():
    single = RequestRecord(prompt_tokens=5, start=0.0, token_times=[0.5], token_ids=[1])
    found = metrics(Run(requests=[single], steps=RUN.steps, duration=2.0))
    assert found["mean_ttft_ms"] == 500.0
    assert found["median_tpot_ms"] is found["p99_itl_ms"] is None
    assert "Mean TPOT (ms):                          -         " in text_block(found).splitlines()


def test_the_text_block_is_that_of_vllm_and_shows_goodput_only_where_asked_for():
    lines = text_block(metrics(RUN)).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "Successful requests:                     2         " in lines
    assert "Mean TTFT (ms):                          750.00    " in lines
    assert not any("goodput" in line for line in lines)
    assert "Request goodput (req/s):                 1.00      " in text_block(metrics(RUN, ["ttft:1000"])).splitlines()


def test_the_details_hold_one_entry_per_request_and_per_step():
    found = detail(RUN)
    assert found["output_lens"] == [3, 1, 0]
    assert found["itls"][0] == pytest.approx([0.2, 0.2])
    assert found["ttfts"] == [1.0, 0.5, None]
    assert len(found["steps"]) == 3


# the command


def config(tmp_path, **bench) -> Config:
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return Config(
        model={"path": str(tmp_path), "load_format": "dummy", "dtype": "float32", "max_model_len": 32},
        engine={"max_num_seqs": 2, "max_num_batched_tokens": 18, "block_size": 8, "max_logprobs": 1},
        lora={"enable_lora": "num_adapters" in bench},
        bench={
            "num_prompts": 5,
            "random_input_len": 8,
            "random_output_len": 4,
            "result_file": str(tmp_path / "r.json"),
            **bench,
        },
    )


def result(tmp_path, **bench) -> dict:
    assert serving.main(config(tmp_path, **bench)) == 0
    return json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))


def test_the_result_files_folder_is_made_before_the_run(tmp_path):
    file = tmp_path / "new" / "folder" / "r.json"
    settings = config(tmp_path, result_file=str(file))
    serving.check_result_file(settings)
    serving.write_result(settings, {"completed": 3})
    assert json.loads(file.read_text(encoding="utf-8")) == {"completed": 3}


MAINS = [serving.main, finetune.main, sweep.main, partial(coserve.main, json_lines=False)]


@pytest.mark.parametrize("main", MAINS, ids=["serving", "finetune", "sweep", "coserve"])
def test_a_result_file_that_cannot_be_written_is_refused_before_the_run(tmp_path, main):
    (tmp_path / "file").write_text("")
    for place in ("file/r.json", "."):
        with pytest.raises(ConfigError, match=r"bench\.result_file .* cannot be written"):
            main(config(tmp_path, result_file=str(tmp_path / place)))


@pytest.mark.parametrize(("section", "check"), [("coserve", coserve.check), ("sweep", sweep.check)])
def test_a_directory_for_results_that_takes_no_files_is_refused_before_the_run(tmp_path, section, check):
    (tmp_path / "file").write_text("")
    bad = Config.model_validate({section: {"results_dir": str(tmp_path / "file" / "out")}})
    with pytest.raises(ConfigError, match=rf"{section}\.results_dir .* cannot be written: Not a directory"):
        check(bad)


def test_a_model_of_the_package_is_found_by_its_name():
    with serving.model_directory(Config(model={"path": "demo:storyteller"})) as path:
        assert path == str(STORYTELLER)


def test_objectives_are_judged_by_all_of_their_digits():
    given = Config(finetune={"ttft_objective_ms": 1234567.5})
    assert objectives(serving.goodput_of(given)) == {"ttft": 1234.5675}


def test_asking_whether_a_result_file_can_be_written_changes_none(tmp_path):
    (tmp_path / "old").write_text("kept")
    for place in ("old", "new"):
        serving.check_result_file(config(tmp_path, result_file=str(tmp_path / place)))
    assert (tmp_path / "old").read_text() == "kept"
    assert not (tmp_path / "new").exists()


def test_a_trace_is_replayed_and_its_numbers_are_printed_and_written(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n900,5,4\n900.1,40,3\n900.2,6,2\n", encoding="utf-8")
    found = result(tmp_path, trace=str(path), trace_speed=2.0, save_detailed=True, goodput=("ttft:60000",))
    printed = capsys.readouterr().out
    said = (
        f"trace {path} at 2 times its rate (time stretched), times from the first arrival at 900 s on; 1 of 3 clipped"
    )
    assert said in printed
    assert "Successful requests:                     3" in printed
    assert (found["completed"], found["failed"], found["num_clipped"], found["recompiles"]) == (3, 0, 1, 0)
    assert (found["input_lens"], found["output_lens"]) == ([5, 29, 6], [4, 3, 2])
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert 0 < found["host_share"] <= 1
    assert 0 < found["kv_usage_max"] <= 1
    assert set(found["versions"]) >= {"jax", "python", "numpy"}


def best(runs: list[dict]) -> float:
    return max(run["output_throughput"] for run in runs)


def test_adapters_are_compared_with_the_base_alone_in_one_run(tmp_path, capsys):
    options = {"num_adapters": 3, "adapter_rank": 4, "adapter_targets": ("down_proj",)}
    found = result(tmp_path, against="base", repeats=2, **options)
    printed = capsys.readouterr().out
    assert "adapters: 3 of rank 4 on down_proj, round-robin" in printed
    assert "adapters cost" in printed
    assert "by processor time instead of the clock" in printed
    both = found["against_base"]
    assert (len(both["ours"]), len(both["base"])) == (2, 2)
    assert both["ratio"] == pytest.approx(best(both["ours"]) / best(both["base"]))
    assert both["cost"] == pytest.approx(1 - both["ratio"])


def test_transformers_runs_the_same_requests_on_the_same_weights(tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = result(tmp_path, against="transformers")
    both = found["against_transformers"]
    assert both["same_tokens"] == 5
    assert {run["output_tokens"] for run in both["theirs"]} == {found["total_output_tokens"]}
    assert all(run["padded_tokens"] >= run["output_tokens"] for run in both["theirs"])
    assert both["ratio"] == pytest.approx(found["output_throughput"] / both["output_throughput"])
    assert "5 of 5 requests got the same tokens from both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"against": "base"}, "set bench.num_adapters"),
        ({"against": "transformers", "num_adapters": 2}, "leave the adapters out"),
        ({"num_adapters": 2, "adapter_targets": ("q_prj",)}, "adapter_targets names 'q_prj'"),
        ({"trace": "none.csv"}, "none.csv"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, options, problem):
    with pytest.raises(ConfigError, match=problem):
        serving.main(config(tmp_path, **options))


def test_adapters_where_none_are_served_are_refused_by_what_asks_for_them(tmp_path):
    asked = config(tmp_path).model_copy(update={"lora": LoraSection(enable_lora=False, modules=("a=b",))})
    with pytest.raises(ConfigError, match=r"^lora\.modules: lora\.enable_lora is off$"):
        serving.main(asked)


@pytest.mark.parametrize(
    ("bench", "problem"),
    [
        ({"trace_speed": 2.0}, r"bench\.trace_speed: there is no bench\.trace"),
        ({"trace": "none.csv", "request_rate": 2.0}, r"bench\.request_rate: the trace has its own"),
    ],
)
@pytest.mark.parametrize("main", [MAINS[0], MAINS[3]], ids=["serving", "coserve"])
def test_what_says_nothing_about_when_requests_come_is_refused(main, bench, problem):
    with pytest.raises(ConfigError, match=problem):
        main(Config(model={"path": "m"}, bench=bench))


@pytest.mark.parametrize("key", ["n", "max_tokens"])
@pytest.mark.parametrize("main", [*MAINS[:1], *MAINS[2:]], ids=["serving", "sweep", "coserve"])
def test_what_the_load_decides_is_not_asked_for(tmp_path, main, key):
    asked = config(tmp_path)
    asked = asked.model_copy(update={"sampling": asked.sampling.model_copy(update={key: 2})})
    with pytest.raises(ConfigError, match=f"sampling.{key}: "):
        main(asked)


def test_answers_end_at_end_tokens_where_that_is_asked_for():
    assert serving.sampling(resolve(flags={})).ignore_eos
    asked = resolve(flags={("sampling", "ignore_eos"): Entry(False, "--no-ignore-eos")})
    assert not serving.sampling(asked).ignore_eos


@pytest.mark.parametrize(
    ("key", "value"), [(("sampling", "ignore_eos"), False), (("sampling", "temperature"), 0.5)], ids=str
)
def test_beside_transformers_nothing_is_asked_for_that_it_would_not_do(tmp_path, key, value):
    given = {("model", "path"): "unused", ("bench", "against"): "transformers", key: value}
    asked = resolve(flags={path: Entry(given[path], "--flag") for path in given})
    with pytest.raises(ConfigError, match="leave sampling out"):
        serving.main(asked)
    with pytest.raises(ConfigError, match=r"leave bench\.request_rate out"):
        serving.main(config(tmp_path, against="transformers", request_rate=2.0))


def test_beside_transformers_the_requests_of_a_trace_come_at_once(tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,5,4\n600,7,3\n", encoding="utf-8")
    found = result(tmp_path, against="transformers", trace=str(path))
    assert found["duration"] < 300
    assert "all at once as for transformers; 0 of 2 clipped" in capsys.readouterr().out


def test_what_a_benchmark_of_finetuning_has_no_use_for_is_refused(tmp_path):
    asked = config(tmp_path, trace="some.csv", goodput=("ttft:5",))
    with pytest.raises(ConfigError) as error:
        finetune.main(asked)
    assert {line.partition(":")[0] for line in error.value.errors} == {
        "bench.trace", "bench.num_prompts", "bench.random_input_len", "bench.random_output_len", "bench.goodput",
        "lora.enable_lora is off",
    }  # fmt: skip


def test_layers_that_there_are_not_are_refused_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match="adapter_targets names 'q_prj'"):
        finetune.main(Config(model={"path": "m"}, bench={"adapter_targets": ("q_prj",)}))


def test_a_job_that_fails_is_no_fault_of_the_configuration():
    job = SimpleNamespace(wait=lambda: None, status="failed", error="not finite")
    with pytest.raises(EngineError, match="the job is failed: not finite"):
        finetune.train(SimpleNamespace(finetune=lambda *args, **fields: job), [[1, 2]], "a", {})  # pyright: ignore


def test_a_missing_peer_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torch is not installed; pip install torch transformers"):
        serving.main(config(tmp_path, against="transformers"))
