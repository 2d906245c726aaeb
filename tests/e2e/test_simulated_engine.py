"""The simulator beside the engine: told how long an engine's steps take, it says how much is finetuned, and whose
objectives are met."""

import pytest
import tiny_models

from jaxserve.bench import policies
from jaxserve.bench.live import Live, agreement
from jaxserve.bench.sweep import goals_of
from jaxserve.config import Config

pytestmark = pytest.mark.slow
RATE = 3.0
WITHIN = 0.1


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    config = {
        "model": {"path": str(tiny_models.build(tmp_path_factory.mktemp("model"), "llama")), "max_model_len": 128},
        "engine": {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 16},
        "lora": {"max_lora_rank": 16},
        "finetune": {"finetune_window": 32, "tpot_objective_ms": 100.0, "ttft_objective_ms": 2000.0},
        "job": {"rank": 8},
        "bench": {"random_input_len": 48, "random_output_len": 24, "finetune_shortest": 24, "finetune_longest": 100},
        "sweep": {"seconds": 10.0, "rates": (RATE,)},
    }
    return Live(Config(**config))


@pytest.mark.parametrize("policy", ["coserve", "temporal:8", "temporal-dynamic"])
def test_the_simulator_predicts_finetuning_and_attainment(live, policy):
    measured = policies.Runs(live).cell(policy, RATE).serving
    found = agreement(measured, live.predict(policy, RATE), goals_of(live.config))
    assert measured.finetune_rate > 0
    assert abs(found["finetune_error"]) < WITHIN, found
    assert abs(found["attainment_error"]) < WITHIN, found


def test_the_simulator_predicts_requests_alone(live):
    live.run("finetune-only", 0.0)  # as after other ways to share, the engine's programs are those for finetuning
    measured = policies.Runs(live).cell("inference-only", RATE).serving
    found = agreement(measured, live.predict("inference-only", RATE), goals_of(live.config))
    assert abs(found["attainment_error"]) < WITHIN, found


def test_the_engines_runs_leave_nothing_behind(live):
    core = live.engine.core
    for _ in range(2):
        live.run("coserve", RATE)
        assert not live.engine.has_work()
        assert core.trainer.queue.active == []
        assert core.pool.num_used == 0
        assert live.engine.list_adapters() == []


def test_beside_few_requests_a_second_process_finetunes_for_all_of_the_runs_seconds(live):
    serving, training = live.spatial(0.1)
    assert max(request.token_times[-1] for request in serving.requests) < 8.0
    assert training.steps[-1].end > 9.0
    assert training.finetune_rate > 0
