"""bench peers: the peer that takes turns, what runs of both sides come to, and one small run of the whole."""

import itertools
import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import tiny_models
from typer.testing import CliRunner

from jaxserve.bench import beside_peers
from jaxserve.bench.finetune import Backward
from jaxserve.bench.ran import NOT_OVER, Asked, Ran, StepRow
from jaxserve.bench.replay import Mix
from jaxserve.bench.time_sliced import TimeSliced
from jaxserve.bench.workload import BenchRequest, Workload
from jaxserve.cli.app import app
from jaxserve.config import Config, dump_config, resolve
from jaxserve.errors import ConfigError


class World:
    """A token takes a second, a backward two; an optimizer step is two backwards."""

    def __init__(self):
        self.now = 100.0
        self.batches: list[int] = []

    def generate(self, batch, each_token):
        self.batches.append(len(batch))
        for made in range(1, max(r.output_tokens for r in batch) + 1):
            self.now += 1
            if each_token():
                return [[7] * min(made, r.output_tokens) for r in batch]
        return [[7] * r.output_tokens for r in batch]

    def backwards(self):
        for number in itertools.count():
            self.now += 2
            yield Backward(tokens=10, loss=1.0, ends_step=number % 2 == 1)


def request(arrival: float, outputs: int) -> BenchRequest:
    return BenchRequest(arrival_s=arrival, prompt_ids=(1, 2, 3), output_tokens=outputs)


def sliced(policy: str, *requests: BenchRequest, **options) -> tuple[Ran, World]:
    world = World()
    options = {"seconds": 10.0, "drain_seconds": 10.0, "max_batch": 2} | options
    load = Workload(requests=requests, source="test")
    return TimeSliced(world.generate, world.backwards(), policy, load, clock=lambda: world.now, **options)(), world


def trained(ran: Ran) -> list[float]:
    return [step.at for step in ran.steps if step.mix.backward]


def test_requests_come_first_and_training_takes_what_is_left():
    ran, _ = sliced("serve-first", request(0.0, 3), request(1.0, 1), request(4.5, 2))
    assert [r.token_times for r in ran.requests] == [[1, 2, 3], [4], [7, 8]]  # the third waits for a backward
    assert trained(ran) == [4, 8]
    assert ran.finetune_rate == 20 / 10
    assert ran.losses == {"": [2.0]}


def test_alternating_owes_a_whole_optimizer_step_after_each_batch():
    ran, _ = sliced("alternate", request(0.0, 3), request(1.0, 1))
    assert [r.token_times for r in ran.requests] == [[1, 2, 3], [8]]
    assert trained(ran) == [3, 5, 8, 10]


def test_a_batch_is_cut_at_its_limit_and_tokens_past_a_request_do_not_count():
    ran, world = sliced("serve-first", request(0.0, 1), request(0.0, 2), request(0.0, 1))
    assert world.batches == [2, 1]
    assert [r.token_times for r in ran.requests] == [[1], [1, 2], [3]]
    assert [r.token_ids for r in ran.requests] == [[7], [7, 7], [7]]
    assert {r.error for r in ran.requests} == {None}


def test_what_is_not_over_after_the_drain_is_missed():
    ran, _ = sliced("serve-first", request(0.0, 50), request(1.0, 1), drain_seconds=2.0)
    first, second = ran.requests
    assert (first.error, first.num_outputs, second.error, second.num_outputs) == (NOT_OVER, 12, NOT_OVER, 0)
    assert ran.duration == 12.0


def test_both_sides_are_waited_for_as_long(tmp_path, monkeypatch):
    config, made = Config(**settings(tmp_path)), Mock()
    peer: Any = SimpleNamespace(config=config, batches=[], padded=True, serving=Mock(), training=Mock())
    monkeypatch.setattr(beside_peers, "TimeSliced", made)
    beside_peers.Peer.run(peer, "alternate", Workload(requests=(request(0.0, 90),), source="test"))
    assert made.call_args.kwargs["drain_seconds"] == 5 + 90  # as its objectives allow


def test_finetune_tokens_count_until_the_last_request_may_come():
    ran, _ = sliced("alternate", request(8.5, 2))
    assert trained(ran) == [0, 2, 4, 6, 8, 12]
    assert ran.finetune_rate == 50 / 10


# the numbers


def asked(*times: float, ids=(5,), error=None) -> Asked:
    return Asked(
        output_tokens=len(times), prompt_tokens=3, start=0.0, token_times=list(times), token_ids=[*ids], error=error
    )


def ran(tokens: int, *requests: Asked, losses=(9.0, 8.0)) -> Ran:
    steps = [StepRow(0, 1.0, 1.0, 1.0, "", Mix(backward=tokens), 0, 0, 0.0)]
    return Ran(name="", seconds=10.0, requests=[*requests], steps=steps, cpu_seconds=15.0, losses={"a": [*losses]})


KINDS = {
    "coserve": ran(80, asked(0.5, 0.6), asked(0.5, 12.0)),
    "serve-first": ran(30, asked(0.5, 0.6), asked(2.0, error=NOT_OVER)),
    "finetune-only": ran(100),
    "alternate": ran(60, asked(0.5, 0.6, ids=(6,)), asked(3.0, 3.1)),
    "peer-finetune-only": ran(120),
}


def test_each_side_is_measured_by_its_own_finetuning_alone():
    rows = {row["kind"]: row for row in beside_peers.numbers(KINDS, {"ttft": 1.0, "tpot": 0.2}, 0)}
    assert {kind: row["finetuning_kept"] for kind, row in rows.items()} == {
        "coserve": 0.8, "serve-first": 0.25, "finetune-only": 1.0, "alternate": 0.5, "peer-finetune-only": 1.0,
    }  # fmt: skip
    ours = rows["coserve"]
    assert (ours["attainment"], ours["output_tokens_per_s"], ours["completed"]) == (0.5, 0.3, 2)  # one token came late
    assert rows["serve-first"]["completed"] == 1
    assert rows["finetune-only"]["attainment"] is None
    assert {len(text) for text in map(beside_peers.line, rows.values())} == {len(beside_peers.HEADER.splitlines()[0])}


def test_losses_are_compared_with_those_of_the_same_steps():
    losses = {
        "coserve": [8.0, 4.0, 2.0],
        "alternate": [8.0, 4.4],
        "serve-first": [],
        "peer-probe": [8.0, 4.0, 2.0, 9.0],
    }
    apart = beside_peers.difference(losses)
    assert apart == pytest.approx(0.1)
    said, *rows = beside_peers.loss_lines(losses, apart)
    assert "the same steps differ by 1.0e-01 at most, MORE THAN 0.001" in said
    assert rows[1] == "  transformers + PEFT, alternate       2 8.000000 4.400000"
    assert beside_peers.difference(losses | {"coserve": []}) is None
    assert "made no optimizer step" in beside_peers.loss_lines(losses, None)[0]


def test_tokens_are_compared_where_both_sides_answered():
    ours, first, alternate = (KINDS[kind].requests for kind in ("coserve", "serve-first", "alternate"))
    assert beside_peers.same_tokens(ours, first) == {"same": 1, "answered_by_both": 1}
    assert beside_peers.same_tokens(ours, alternate) == {"same": 1, "answered_by_both": 2}


# the command


def settings(path) -> dict:
    return {
        "model": {"path": str(path), "load_format": "dummy", "dtype": "float32", "max_model_len": 64},
        "engine": {"max_num_seqs": 2, "max_num_batched_tokens": 32, "block_size": 8},
        "finetune": {"tpot_objective_ms": 1000.0, "ttft_objective_ms": 5000.0, "finetune_window": 16},
        "bench": {
            "request_rate": 2.0, "random_input_len": 8, "random_output_len": 4, "finetune_shortest": 8,
            "finetune_longest": 16, "finetune_batch": 2, "finetune_examples": 5, "adapter_rank": 4,
            "result_file": str(path / "result.json"),
        },
        "sweep": {"seconds": 3.0},
    }  # fmt: skip


def test_what_cannot_be_compared_is_refused_all_at_once(tmp_path):
    wrong = {
        "bench": {"adapter_targets": ("down_proj",), "num_prompts": 3},
        "sweep": {"simulate": "h200", "results_dir": "out"},
        "job": {"rank": 4},
        "sampling": {"temperature": 0.5},
        "coserve": {"answer_with": ("a",), "jobs": ("a=b",)},
        "lora": {"modules": ("a=b",)},
        "finetune": {},
    }
    with pytest.raises(ConfigError) as error:
        beside_peers.check(Config(**settings(tmp_path) | wrong))
    said = str(error.value)
    for part in (
        "tpot_objective_ms",
        "request_rate",
        "h200",
        "job",
        "sampling",
        "answer_with",
        "jobs",
        "modules",
        "num_prompts",
        "results_dir",
    ):
        assert part in said


def test_a_configuration_that_names_every_key_can_be_run(tmp_path, monkeypatch):
    monkeypatch.setattr(beside_peers, "require_peft", lambda asked: None)
    given = Config(**settings(tmp_path))
    (tmp_path / "config.yaml").write_text(dump_config(given.model_dump(mode="json"), "yaml"))
    beside_peers.check(resolve(str(tmp_path / "config.yaml")))


def test_a_missing_peer_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else name)
    with pytest.raises(ConfigError, match="bench peers: peft is not installed; pip install torch transformers peft"):
        beside_peers.main(Config(**settings(tmp_path)))


@pytest.mark.slow
def test_both_sides_do_the_same_work(tmp_path, monkeypatch):
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    # two threads that wait for each other hardly get on where another process has one of two processors
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.config_dict("llama")), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(json.dumps(settings(tmp_path)), encoding="utf-8")
    run = CliRunner().invoke(app, ["bench", "peers", "--config", str(tmp_path / "run.yaml")])
    assert run.exit_code == 0, run.output
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert found["losses_agree"]
    steps = {kind: len(losses) for kind, losses in found["losses"].items()}
    assert min(steps["coserve"], steps["serve-first"]) > 3  # beyond the first epoch, whose last batch is smaller
    assert found["losses_difference"] < 1e-4
    assert all(each["same"] == each["answered_by_both"] == found["num_requests"] for each in found["same_tokens"])
    assert {row["kind"] for row in found["runs"]} == set(KINDS)
    assert all(row["finetune_tokens_per_s"] > 0 for row in found["runs"])
    assert {"torch", "transformers", "peft", "jax"} <= set(found["versions"])
