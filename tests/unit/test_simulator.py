"""Co-serving on a virtual clock: what the latency budget promises, seen from the requests."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxserve.bench.report import share_met
from jaxserve.bench.roofline import DEVICES
from jaxserve.bench.simulator import RooflineDevice, Settings, Simulator, endless_job
from jaxserve.bench.workload import BenchRequest
from jaxserve.engine import planner
from jaxserve.models.config import ModelConfig
from jaxserve.scheduler.limits import SchedulerConfig
from jaxserve.scheduler.request import Objective

MODELS = Path(__file__).parents[2] / "configs" / "models"
TTFT, TPOT = 5.0, 0.045
GOALS = {"ttft": TTFT, "tpot": TPOT}
LIMITS = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8192, row_block=64)


@pytest.fixture(scope="module")
def device():
    config = json.loads((MODELS / "llama-3.1-8b" / "config.json").read_text())
    return RooflineDevice(ModelConfig.from_dict(config), DEVICES["h200"])


@pytest.fixture(scope="module")
def stashing(device):
    return RooflineDevice(device.model, device.device, remat=None)


def load(rate, seconds, seed=0, start=0.0, prompt=1000, outputs=200):
    rng = np.random.default_rng(seed)
    times = start + np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    return [
        BenchRequest(
            arrival_s=float(time),
            prompt_ids=(seed, i, *[7] * int(rng.integers(10, 2 * prompt))),
            output_tokens=int(rng.integers(2, 2 * outputs)),
        )
        for i, time in enumerate(times)
    ]


def simulate(device, requests, until, jobs=1, **settings):
    settings = {"num_pages": 20_000, "max_grad_rows": 1024, "objectives": (Objective(TTFT, TPOT),)} | settings
    lengths = np.random.default_rng(1).integers(200, 4000, 200).tolist()
    made = [endless_job(f"job-{i}", lengths, batch_size=4) for i in range(jobs)]
    simulator = Simulator(Settings(limits=LIMITS, **settings), device, made)
    return simulator, simulator(requests, until)


def rate_of(run, start=0.0, end=100.0):
    """Finetune tokens per second between two times."""
    return sum(step.mix.backward for step in run.steps if start < step.end <= end) / (end - start)


def errors_of(run):
    """How far predictions were off, as shares of what steps took."""
    return [abs(step.predicted / step.seconds - 1) for step in run.steps]


@pytest.fixture(scope="module")
def alone(device):
    return simulate(device, [], 20.0)[1]


def test_finetuning_fills_what_the_objectives_leave(device, alone):
    _, run = simulate(device, load(3, 20), 25.0)
    assert share_met(run.requests, GOALS) >= 0.99
    busy = simulate(device, load(3, 20), 25.0, jobs=0)[1]
    needed = sum(step.seconds for step in busy.steps if step.end < 20) / 20  # of the device, by requests alone
    assert rate_of(run, 2, 20) > 0.8 * (1 - needed) * rate_of(alone, 2, 20)
    assert np.quantile(errors_of(run), 0.9) < 0.15


def test_with_a_stash_more_is_trained_within_the_same_objectives(device, stashing):
    runs = [simulate(one, load(3, 20), 25.0, stash_blocks=blocks)[1] for one, blocks in ((device, 0), (stashing, 128))]
    assert all(share_met(run.requests, GOALS) >= 0.99 for run in runs)
    assert rate_of(runs[1], 2, 20) > 1.08 * rate_of(runs[0], 2, 20)
    assert np.quantile(errors_of(runs[1]), 0.9) < 0.15
    mixes = [step.mix for step in runs[1].steps]
    assert any(mix.backward and mix.decode for mix in mixes)
    assert any(mix.forward and mix.decode for mix in mixes)
    together = sum(mix.backward for mix in mixes if mix.forward)  # reading the weights once for both passes' rows
    assert together > 0.15 * sum(mix.backward for mix in mixes)


def test_requests_that_a_full_queue_would_refuse_wait(device):
    settings = Settings(limits=replace(LIMITS, max_queue=1), num_pages=2000)
    run = Simulator(settings, device)([replace(request, arrival_s=0.0) for request in load(4, 1)])
    assert all(request.num_outputs for request in run.requests)


def test_it_is_the_same_every_time(device):
    one, other = (simulate(device, load(3, 5), 6.0)[1] for _ in range(2))
    assert one.steps == other.steps
    assert [r.token_times for r in one.requests] == [r.token_times for r in other.requests]


def test_nothing_is_left_behind_in_cycles(device):
    """While it runs nobody looks for them."""
    gc.collect()
    gc.disable()
    try:
        simulator, run = simulate(device, load(3, 2), 3.0, stash_blocks=128)
        simulated = weakref.ref(simulator), weakref.ref(simulator.scheduler), weakref.ref(simulator.training)
        del simulator, run
        assert [ref() for ref in simulated] == [None] * 3
    finally:
        gc.enable()


def test_a_burst_stops_finetuning_and_it_is_back_soon_after(device):
    calm, burst = load(1, 30), load(40, 3, seed=1, start=10.0)
    _, run = simulate(device, calm + burst, 40.0)
    assert share_met(run.requests, GOALS) >= 0.99
    usual, burst, after = rate_of(run, 5, 10), rate_of(run, 10.5, 13), rate_of(run, 27, 32)
    assert burst < 0.2 * usual
    assert after > 0.7 * usual


class Started:
    """A device on which windows of any length take as long to begin, and a step of requests takes little."""

    def seconds(self, planned):
        bucket = planned.load.bucket
        rows = 2 * bucket.grad_rows + bucket.chunk_rows
        return 0.003 + (0.02 + 5e-5 * rows if rows else 0.0)


def with_and_without_waiting(monkeypatch, device, requests):
    """Finetune rates of both; the objectives are met in both."""
    rates = []
    for steps in (planner.MAX_WAIT, 0):
        monkeypatch.setattr(planner, "MAX_WAIT", steps)
        run = simulate(device, requests, 20.0, stash_blocks=128)[1]
        assert share_met(run.requests, {"tpot": TPOT}) >= 0.99
        rates.append(rate_of(run, 2, 20))
    return rates


@pytest.mark.parametrize(("rate", "outputs"), [(0.5, 600), (20, 30)])
def test_finetuning_stays_out_of_short_steps_for_the_sake_of_a_long_one(monkeypatch, rate, outputs):
    waiting, never = with_and_without_waiting(monkeypatch, Started(), load(rate, 20, prompt=20, outputs=outputs))
    assert waiting > 1.15 * never


def test_finetuning_does_not_wait_for_time_that_the_next_request_will_take(monkeypatch, device):
    slower = RooflineDevice(device.model, DEVICES["a100-80gb"], remat=None)
    waiting, never = with_and_without_waiting(monkeypatch, slower, load(40, 20, prompt=50, outputs=20))
    assert waiting > 0.97 * never


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_a_floor_keeps_finetuning_alive_in_an_overload(device, floor, alone):
    _, run = simulate(device, load(60, 20), 20.0, finetune_floor=floor)
    share = rate_of(run, 5, 20) / rate_of(alone, 5, 20)
    assert share < 0.05 if floor == 0 else 0.1 < share < 0.3


def test_when_pages_are_short_finetuning_gives_way_first(device):
    _, run = simulate(device, load(8, 10), 14.0, num_pages=700)
    assert rate_of(run) > 0
    assert run.evictions > 0
    without = simulate(device, load(8, 10), 14.0, num_pages=700, jobs=0)[1]
    assert share_met(run.requests, GOALS) >= share_met(without.requests, GOALS) - 0.02


@pytest.mark.parametrize("stash_blocks", [0, 70])
def test_pages_slots_accumulators_and_stash_are_all_given_back(device, stash_blocks):
    simulator, _ = simulate(device, load(5, 3), 40.0, jobs=3, num_pages=3000, stash_blocks=stash_blocks)
    queue = simulator.training.queue
    pages = 2 * simulator.pool.pages_for(LIMITS.max_model_len)
    queue.check(simulator.settings.train_slots, pages, stash_blocks)
    simulator.pool.check([seq.pages for seq in queue.active])
    assert len(simulator.training.steps_done) == 3  # no job starves


@pytest.mark.parametrize("name", ["temporal:8", "temporal-dynamic", "inference-only", "finetune-only"])
def test_the_other_ways_to_share_do_what_they_say(device, name):
    _, run = simulate(device, load(2, 10), 12.0, sharing=name)
    mixed = [step for step in run.steps if step.mix.backward and step.mix.decode]
    assert not mixed
    assert (rate_of(run) > 0) == (name != "inference-only")
    served = [r for r in run.requests if r.token_times]
    assert (len(served) > 0) == (name != "finetune-only")
