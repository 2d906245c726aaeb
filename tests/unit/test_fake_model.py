"""The simulator gives every request the tokens it gets alone, and broken pages or adapters are seen in them."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from jaxserve.bench.fake_model import FakeModel, _adapter, _slot, expected, expected_losses
from jaxserve.bench.simulator import Settings, Simulator
from jaxserve.bench.workload import BenchRequest
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Dataset
from jaxserve.finetune.examples import Example
from jaxserve.finetune.job import Job
from jaxserve.finetune.windows import TrainSequence
from jaxserve.kvcache.pages import PagePool
from jaxserve.sampling import SamplingParams
from jaxserve.scheduler.limits import SchedulerConfig
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.request import Objective, Request
from jaxserve.scheduler.scheduler import Scheduler

VOCAB = 50
LONGEST = 64
SHARED = tuple(random.Random(0).choices(range(VOCAB), k=40))  # prompts begin alike, so that prefixes are shared
ADAPTERS = (None, "math", "law")


class Clock:
    """A device whose steps take longer the more rows they have."""

    def seconds(self, planned):
        return 1e-3 + 1e-5 * planned.load.bucket.rows


class WatchedModel(FakeModel):
    """Remembers what it was given."""

    def __init__(self, *args):
        super().__init__(*args)
        self.trained, self.num_copies = set(), 0

    def run(self, plan):
        self.num_copies += len(plan.page_copies)
        self.trained |= {window.seq for window in plan.finetune.grads} if plan.finetune else set()
        return super().run(plan)


def job(rng: random.Random, name: str) -> Job:
    examples = []
    for index in range(6):
        length = rng.randrange(2, 40)
        tokens = np.array(rng.choices(range(VOCAB), k=length), np.int32)
        examples.append(Example(tokens, np.ones(length, np.float32), index))
    config = FinetuneConfig(max_steps=10**9, batch_size=rng.choice([1, 3]), deterministic=rng.random() < 0.3)
    return Job(name, config, Dataset(tuple(examples)), start=None)  # pyright: ignore[reportArgumentType]


def random_simulator(rng: random.Random, model_type: Callable = WatchedModel, **fixed) -> Simulator:
    page_size = rng.choice([1, 2, 4, 5])
    num_pages = rng.choice([LONGEST, 80, 150]) // page_size + 1
    row_block = rng.choice([1, 4])
    limits = SchedulerConfig(
        max_num_seqs=rng.choice([3, 5]),
        max_num_batched_tokens=rng.choice([8, 24, 64]),
        max_model_len=LONGEST,
        row_block=row_block,
        policy=rng.choice(["fcfs", "fair"]),
    )
    settings = Settings(
        limits=limits,
        num_pages=num_pages,
        page_size=page_size,
        max_grad_rows=rng.choice([8, 16]),
        train_slots=rng.choice([2, 4]),
        objectives=(rng.choice([Objective(), Objective(ttft=0.05, tpot=0.002)]),),
        finetune_floor=rng.choice([0.0, 0.3]),
        sharing=rng.choice(["coserve", "coserve", "temporal:3"]),
    )
    settings = replace(settings, **fixed)
    model = model_type(settings.num_pages, settings.page_size, limits.max_num_seqs, VOCAB)
    jobs = [job(rng, f"job-{i}") for i in range(rng.choice([0, 1, 2]))]
    return Simulator(settings, Clock(), jobs, model=model)


def random_request(rng: random.Random, id: str, arrival: float, objective: Objective) -> Request:
    prompt = SHARED[: rng.randrange(1, 40)] if rng.random() < 0.6 else rng.choices(range(VOCAB), k=rng.randrange(1, 20))
    adapter = rng.choice(ADAPTERS)
    return Request(
        id=id,
        prompt_ids=tuple(prompt),
        params=SamplingParams(max_tokens=rng.choice([1, 5, 20]), n=rng.choice([1, 1, 2, 3]), ignore_eos=True),
        adapter=adapter,
        adapter_digest=(adapter or "").encode(),
        tenant=rng.choice(["a", "b"]),
        arrival=arrival,
        objective=objective,
    )


@dataclass
class Trace:
    """A simulator that has served random requests."""

    simulator: Simulator
    requests: list[Request]
    num_given_way: int = 0  # training sequences whose pages requests needed

    def wrong(self) -> list[str]:
        """Choices whose tokens are not those that they get alone."""
        records = iter(self.simulator.run.requests)
        return [
            f"{request.id}[{choice}]"
            for request in self.requests
            for choice in range(request.params.n)
            if next(records).token_ids
            != expected(request.prompt_ids, request.adapter_digest, request.params.max_tokens or 0, choice, VOCAB)
        ]

    def wrong_losses(self) -> list[TrainSequence]:
        """Training sequences that are through, and whose losses are not those of their tokens."""
        return [
            seq
            for seq in self.model.trained
            if seq.done and seq.losses[1:].tolist() != expected_losses(seq.token_ids.tolist(), seq.lane)
        ]

    @property
    def model(self) -> WatchedModel:
        assert isinstance(self.simulator.model, WatchedModel)
        return self.simulator.model


def trace(seed: int, count: int = 12, **fixed) -> Trace:
    rng = random.Random(seed)
    simulator = random_simulator(rng, **fixed)
    made = Trace(simulator, [])
    reclaim = simulator.scheduler.reclaim

    def counted() -> bool:
        given = reclaim()
        made.num_given_way += given
        return given

    def arrive() -> None:
        made.requests.append(
            random_request(rng, str(len(made.requests)), simulator.now, simulator.settings.objectives[0])
        )
        simulator.add(made.requests[-1])

    def turn(_: Simulator) -> None:
        if len(made.requests) < count and rng.random() < 0.4:
            arrive()

    simulator.look, simulator.scheduler.reclaim = turn, counted
    while len(made.requests) < count:
        arrive()
        simulator([])
    return made


def test_hundreds_of_random_traces_give_every_choice_the_tokens_it_gets_alone():
    """Seed 140: requests and half a backward wait for each other's pages, and only requests have a turn."""
    seen = Counter()
    for seed in range(300):
        made = trace(seed)
        simulator, model = made.simulator, made.model
        assert not made.wrong(), f"{seed=}"
        assert not made.wrong_losses(), f"{seed=}"
        counts = simulator.scheduler.counts()
        seen["preemptions"] += counts.preemptions
        seen["cached"] += counts.cached_tokens
        seen["copies"] += model.num_copies
        seen["trained"] += sum(seq.done for seq in model.trained)
        seen["mixed"] += sum(bool(step.mix.decode and step.mix.backward) for step in simulator.run.steps)
        seen["gave way"] += made.num_given_way
    assert all(seen[kind] > 200 for kind in ("preemptions", "cached", "copies", "trained", "mixed", "gave way")), seen


def test_a_workload_in_few_pages_and_beside_jobs_has_its_own_tokens_and_the_times_it_has_without_a_model():
    rng = random.Random(5)
    requests = [
        BenchRequest(
            arrival_s=0.005 * i,
            prompt_ids=(*SHARED[: rng.choice([0, 20, 37])], *rng.choices(range(VOCAB), k=rng.randrange(1, 12))),
            output_tokens=rng.randrange(1, 15),
            adapter=ADAPTERS[i % 3],
        )
        for i in range(80)
    ]
    runs = []
    for model_type in (WatchedModel, lambda *sizes: None):
        simulator = random_simulator(random.Random(2), model_type, num_pages=34, page_size=2, sharing="coserve")
        runs.append(simulator(requests))
    for request, record in zip(requests, runs[0].requests, strict=True):
        digest = (request.adapter or "").encode()
        assert record.token_ids == expected(request.prompt_ids, digest, request.output_tokens, vocab_size=VOCAB)
    assert runs[0].preemptions > 5
    assert sum(step.mix.backward for step in runs[0].steps) > 100
    assert runs[0].steps == runs[1].steps
    assert [r.token_times for r in runs[0].requests] == [r.token_times for r in runs[1].requests]


# what is broken on purpose is found


class WithoutCopies(WatchedModel):
    def run(self, plan: StepPlan) -> list[int]:
        return super().run(replace(plan, page_copies=()))


class WithoutRestarts(WatchedModel):
    """A sequence that starts again gets the adapter of whoever had the slot."""

    def _admit(self, seq):
        if not seq.num_preempted:
            super()._admit(seq)


class SwappedAdapters(WatchedModel):
    def _admit(self, seq):
        super()._admit(seq)
        if seq.request.adapter == "math":
            self._adapters[_slot(seq.slot)] = _adapter(b"law")


def is_found(seeds: range = range(30), **fixed) -> bool:
    return any(trace(seed, **fixed).wrong() for seed in seeds)


@pytest.mark.parametrize("model_type", [WithoutCopies, WithoutRestarts, SwappedAdapters])
def test_a_broken_device_is_found(model_type):
    assert is_found(model_type=model_type)


def test_a_page_in_use_that_is_handed_out_is_found(monkeypatch):
    take, count = PagePool._take, 0

    def taken(pool):
        nonlocal count
        count += 1
        used = [page for page in range(pool.num_pages) if pool.refcount(page)]
        if count % 20 or not used:
            return take(pool)
        pool.share(used[0])
        return used[0]

    monkeypatch.setattr(PagePool, "_take", taken)
    traces = [trace(seed) for seed in range(10)]
    assert any(made.wrong() for made in traces)
    assert any(made.wrong_losses() for made in traces)


def test_a_prefix_of_another_adapter_is_found(monkeypatch):
    key = Scheduler._prefix_key
    monkeypatch.setattr(Scheduler, "_prefix_key", lambda self, request: replace(key(self, request), adapter_digest=b""))
    assert is_found(range(10))
