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
from jaxserve.engine.sharing import sharing
from jaxserve.engine.times import StepLoad
from jaxserve.finetune.windows import FinetunePlan
from jaxserve.models.config import ModelConfig
from jaxserve.scheduler.limits import SchedulerConfig
from jaxserve.scheduler.policy import FORWARD_TOKEN, GRADIENT_TOKEN
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


class Slow:
    """A device on which a long prompt's chunk takes as long as many tokens."""

    def seconds(self, planned):
        return 0.02 + 1e-4 * planned.load.bucket.chunk_rows


def test_chunks_leave_running_requests_their_time_per_token_unless_a_first_token_would_be_late():
    def served(ttft):
        long = [BenchRequest(arrival_s=0.1, prompt_ids=(i, *[7] * 4000), output_tokens=1) for i in range(20)]
        running = BenchRequest(arrival_s=0.0, prompt_ids=(1, 2, 3), output_tokens=150)
        _, run = simulate(Slow(), [running, *long], None, jobs=0, objectives=(Objective(ttft, TPOT),))
        first, *_, last = run.requests[0].token_times
        return (last - first) / 149 <= TPOT, max(record.token_times[0] for record in run.requests)

    (met, last), (still_met, sooner) = served(ttft=1000.0), served(ttft=11.0)
    assert (met, still_met) == (True, False)
    assert sooner < last


class Started:
    """A device on which windows of any length take as long to begin, and a step of requests takes little."""

    def seconds(self, planned):
        bucket = planned.load.bucket
        rows = 2 * bucket.grad_rows + bucket.chunk_rows
        return 0.003 + (0.02 + 5e-5 * rows if rows else 0.0)


class Backwards:
    """A device on which gradient rows take long."""

    def seconds(self, planned):
        return 0.01 + 2e-4 * planned.load.bucket.grad_rows


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


class Counting:
    """A device that counts anew what each step holds."""

    def __init__(self, device):
        self.device, self.kinds = device, set()

    def seconds(self, planned):
        plan, (grads, forwards) = planned.plan, planned.plan.finetune or FinetunePlan()
        bucket, seen = planned.load.bucket, [position + 1 for position in plan.positions]
        trained, windows = rows_of(grads), rows_of(forwards) + ([] if bucket.stashed else rows_of(grads))
        blocks = rows_of(plan.chunks) + windows
        adapted = [seq for seq in plan.decoding if seq.request.adapter is not None]
        chunks = rows_of(chunk for chunk in plan.chunks if chunk.seq.request.adapter is not None)
        assert planned.load == StepLoad(
            bucket, False, sum(seen), max(seen, default=0), *keys(blocks), *keys(trained),
            len(adapted) + sum(map(len, chunks + windows)), sum(map(len, trained)),
        )  # fmt: skip
        self.kinds.add((bool(plan.positions), bool(plan.chunks), bool(grads), bool(forwards)))
        return self.device.seconds(planned)


def rows_of(segments):
    """How many keys each row sees, as a range, by segment."""
    return [range(start + 1, start + length + 1) for _, start, length in segments]


def keys(ranges):
    """Keys that rows see, and the most that one sees."""
    return sum(map(sum, ranges)), max((seen[-1] for seen in ranges), default=0)


@pytest.mark.parametrize("stash_blocks", [0, 128])
def test_what_a_step_holds_is_what_its_time_is_predicted_from(device, stashing, stash_blocks):
    counting = Counting(stashing if stash_blocks else device)
    requests = [replace(request, adapter=(None, "math")[i % 2]) for i, request in enumerate(load(8, 3))]
    simulate(counting, requests, 4.0, stash_blocks=stash_blocks)
    assert {(True, True, False, False), (True, False, True, True)} <= counting.kinds


@pytest.mark.parametrize("stash_blocks", [0, 128])
def test_a_job_that_has_the_engine_to_itself_is_cut_the_same_however_long_its_steps_take(stash_blocks):
    mixes = []
    for slow in (Slow(), Started(), Backwards()):
        jobs = [endless_job("job", [200, 900, 3000, 5000], batch_size=4)]
        settings = Settings(
            limits=LIMITS, num_pages=1000, max_grad_rows=1024, objectives=(Objective(),), stash_blocks=stash_blocks
        )
        steps = Simulator(settings, slow, jobs)([], 10.0).steps[:30]
        mixes.append([(step.mix.forward, step.mix.backward) for step in steps])
    assert len(mixes[0]) == 30
    assert mixes[0] == mixes[1] == mixes[2]


def test_after_a_failed_step_requests_go_alone_and_windows_where_there_are_none(device):
    jobs = [endless_job("job", [3000], batch_size=4)]
    settings = Settings(limits=LIMITS, num_pages=1000, max_grad_rows=1024, objectives=(Objective(),))
    simulator = Simulator(settings, device, jobs)
    simulator.training.held = True
    assert simulator.planner.plan(0.0).plan.finetune is not None
    simulator._add(load(1, 1)[0])
    assert simulator.planner.plan(0.0).plan.finetune is None
    simulator.training.held = False
    assert simulator.planner.plan(0.0).plan.finetune is not None


@pytest.mark.parametrize(("window", "most"), [(None, 1024), (256, 256), (4096, 1024)])
def test_windows_are_as_long_as_a_job_wants_them_and_a_step_holds(device, window, most):
    jobs = [endless_job("job", [5000], batch_size=4, window=window)]
    simulator = Simulator(Settings(limits=LIMITS, num_pages=1000, max_grad_rows=1024), device, jobs)
    simulator([], 1.0)
    assert {seq.window for seq in simulator.training.queue.active} == {most}


@pytest.mark.parametrize("stash_blocks", [0, 70])
def test_finetuning_is_charged_for_its_rows_to_the_tenant_of_its_job(device, stash_blocks):
    jobs = [endless_job("job", [200, 900, 3000], tenant="trains", batch_size=4)]
    limits = replace(LIMITS, policy="fair")
    settings = Settings(limits=limits, num_pages=1000, max_grad_rows=1024, stash_blocks=stash_blocks)
    simulator = Simulator(settings, device, jobs)
    mixes = [step.mix for step in simulator([], 5.0).steps]
    forward, backward = (sum(getattr(mix, kind) for mix in mixes) for kind in ("forward", "backward"))
    again = backward if stash_blocks else 0  # their forward was charged in an earlier step
    cost = FORWARD_TOKEN * (forward - again) + GRADIENT_TOKEN * backward
    assert simulator.scheduler.policy.served("trains") == pytest.approx(cost, rel=0.1)  # two steps are under way


@pytest.mark.parametrize("name", ["temporal:8", "temporal-dynamic", "inference-only", "finetune-only"])
def test_the_other_ways_to_share_do_what_they_say(device, name):
    _, run = simulate(device, load(2, 10), 12.0, sharing=name)
    mixed = [step for step in run.steps if step.mix.backward and step.mix.decode]
    assert not mixed
    assert (rate_of(run) > 0) == (name != "inference-only")
    served = [r for r in run.requests if r.token_times]
    assert (len(served) > 0) == (name != "finetune-only")


@pytest.mark.parametrize("name", ["temporal", "temporal:", "temporal:0", "temporal:x", "spatial:8", ""])
def test_a_way_to_share_of_no_such_name_is_refused(name):
    with pytest.raises(ValueError, match=r"is not one of coserve, .*temporal:N"):
        sharing(name)
