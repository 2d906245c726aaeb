"""The scheduler under random company: same tokens as alone, everything given back, one end per choice."""

import random
from collections import Counter

import pytest
from fake_engine import EOS, FakeAdapter, FakeEngine, expected
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.errors import InvalidRequest
from jaxserve.kvcache.pages import PagePool
from jaxserve.sampling import SamplingParams
from jaxserve.scheduler.request import Request, Sequence, State
from jaxserve.scheduler.scheduler import SchedulerConfig

ADAPTERS = (
    None,
    FakeAdapter("math", version=1),
    FakeAdapter("math", version=2),
    FakeAdapter("law"),
    FakeAdapter("bad", poisoned_from=9),
)
SHARED = tuple(random.Random(0).choices(range(3), k=40))  # prompts begin alike, so that prefixes are shared


def random_engine(rng: random.Random, **fixed) -> FakeEngine:
    options = {
        "max_num_seqs": rng.choice([1, 2, 3, 5]),
        "max_num_batched_tokens": rng.choice([4, 9, 24, 64]),
        "row_block": rng.choice([1, 4]),
        "max_model_len": 48,
        "policy": rng.choice(["fcfs", "priority"]),
        "enable_chunked_prefill": rng.random() < 0.7,
        "max_queue": 30,
        "max_bypass": rng.choice([0, 3, 50]),
        "eos_token_ids": (EOS,),
        **fixed,
    }
    page_size = rng.choice([1, 2, 4, 5])
    pool = PagePool(rng.choice([48, 64, 100, 300]) // page_size, page_size, rng.random() < 0.7)
    return FakeEngine(
        SchedulerConfig(**options),
        pool,
        adapter_slots=rng.choice([1, 2, 4]),
        run_ahead=rng.choice([0, 1, 1]),
        report_chunks=rng.random() < 0.5,
    )


def random_request(rng: random.Random, id: str, arrival: float) -> Request:
    prompt = SHARED[: rng.randrange(1, 36)] if rng.random() < 0.6 else rng.choices(range(3), k=rng.randrange(1, 20))
    adapter = rng.choice(ADAPTERS)
    min_tokens = rng.choice([0, 0, 0, 3])
    return Request(
        id=id,
        prompt_ids=tuple(prompt),
        params=SamplingParams(
            max_tokens=rng.choice([None, min_tokens + 1, 5, 12]),
            n=rng.choice([1, 1, 1, 2, 3]),
            seed=rng.randrange(3),
            min_tokens=min_tokens,
            ignore_eos=rng.random() < 0.3,
            prompt_logprobs=rng.choice([None, None, None, 0]),
        ),
        adapter=adapter,
        adapter_digest=adapter.digest if adapter else b"",
        priority=rng.randrange(3),
        tenant=rng.choice(["", "t"]),
        salt=rng.choice(["", "s"]),
        arrival=arrival,
    )


def add(fake: FakeEngine, request: Request) -> None:
    """Adds it if it can be served, and sees it refused if not."""
    if fits(fake, request):
        fake.add(request)
    else:
        with pytest.raises(InvalidRequest):
            fake.add(request)


def fits(fake: FakeEngine, request: Request) -> bool:
    config, params, prompt = fake.config, request.params, len(request.prompt_ids)
    total = config.max_model_len if params.max_tokens is None else prompt + params.max_tokens
    waiting = sum(seq.state is State.WAITING for seq in fake.sequences)
    return (
        prompt < total <= config.max_model_len
        and params.n <= config.max_num_seqs
        and total - 1 <= fake.pool.num_pages * fake.pool.page_size
        and (prompt <= config.max_chunk_rows or config.enable_chunked_prefill)
        and waiting + params.n <= config.max_queue
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps in halves, aborts and stop strings at any time; tokens are compared with each request alone."""

    @initialize(seed=st.integers(0, 2**32 - 1))
    def build(self, seed):
        self.rng = random.Random(seed)
        self.fake = random_engine(self.rng)
        self.num_requests = 0
        self.reasons: dict = {}

    @rule(count=st.integers(1, 4), seed=st.integers(0, 2**16))
    def arrive(self, count, seed):
        rng = random.Random(seed)
        for _ in range(count):
            self.num_requests += 1
            add(self.fake, random_request(rng, str(self.num_requests), arrival=self.fake.clock - rng.choice([0, 0, 7])))

    @rule(count=st.integers(1, 12))
    def steps(self, count):
        for _ in range(count):
            self.fake.step()

    @precondition(lambda self: len(self.fake.flying) <= self.fake.run_ahead)
    @rule()
    def dispatch(self):
        self.fake.dispatch()

    @precondition(lambda self: self.fake.flying)
    @rule()
    def collect(self):
        self.fake.collect()

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def abort(self, data):
        seq = data.draw(st.sampled_from(self.live()))
        assert seq in self.fake.abort(seq.request.id)
        assert not self.fake.abort(seq.request.id)

    @precondition(lambda self: any(seq.num_outputs for seq in self.live()))
    @rule(data=st.data())
    def stop_string(self, data):
        self.fake.finish(data.draw(st.sampled_from([seq for seq in self.live() if seq.num_outputs])))

    @precondition(lambda self: self.fake.flying)
    @rule()
    def device_fails(self):
        self.fake.flying.clear()
        self.fake.cell_PG[:] = -1
        self.fake.scheduler.reset()

    @rule()
    def drain(self):
        self.fake.run()
        self.fake.check_idle()

    @invariant()
    def books_balance(self):
        if hasattr(self, "fake"):
            self.fake.check()

    @invariant()
    def finished_is_for_good(self):
        for seq in self.fake.sequences if hasattr(self, "fake") else ():
            first = self.reasons.setdefault(seq, seq.finish_reason)
            assert first in (None, seq.finish_reason)
            self.reasons[seq] = seq.finish_reason
            assert self.fake.terminal[seq] == (seq.state is State.FINISHED)

    def live(self):
        return [seq for seq in self.fake.sequences if seq.state is not State.FINISHED]

    def teardown(self):
        if hasattr(self, "fake"):
            self.fake.run()
            self.fake.check_idle()
            for seq in self.fake.sequences:
                self.fake.check_tokens(seq)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=300, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def crowd(seed: int, count: int = 25) -> list[Request]:
    rng = random.Random(seed)
    return [random_request(rng, str(i), arrival=float(i)) for i in range(count)]


def outputs(fake: FakeEngine) -> dict:
    return {(seq.request.id, seq.index): (seq.output_ids, seq.finish_reason) for seq in fake.sequences}


@pytest.mark.parametrize("seed", range(40))
def test_any_configuration_gives_every_request_the_tokens_it_gets_alone(seed):
    rng = random.Random(seed)
    fake = random_engine(rng, max_queue=1000)
    for request in crowd(seed):
        add(fake, request)
        for _ in range(rng.choice([0, 0, 1, 3])):
            fake.step()
            fake.check()
    fake.run()
    fake.check_idle()
    assert outputs(fake) == {
        (seq.request.id, seq.index): expected(seq.request, seq.index, fake.config) for seq in fake.sequences
    }


def test_the_random_crowd_meets_everything_that_makes_scheduling_hard():
    seen = Counter()
    for seed in range(40):
        fake = random_engine(random.Random(seed), max_queue=1000)
        for request in crowd(seed):
            add(fake, request)
        while fake.scheduler.has_work():
            copies = [plan.page_copies for plan, _ in fake.flying]
            seen["copies"] += any(copies)
            fake.step()
        seen["preemptions"] += fake.scheduler.counts().preemptions
        seen["cached"] += fake.scheduler.counts().cached_tokens
        seen["bypassed"] += sum(seq.num_bypassed for seq in fake.sequences)
        seen.update(seq.finish_reason for seq in fake.sequences)
        seen["followers preempted"] += sum(seq.num_preempted for seq in fake.sequences if seq.index)
    kinds = ["copies", "preemptions", "cached", "bypassed", "followers preempted", "stop", "length", "error"]
    assert all(seen[kind] > 20 for kind in kinds), seen


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_with_pages_for_one_long_request_somebody_gets_a_token_every_few_steps(policy):
    config = SchedulerConfig(
        max_num_seqs=5, max_num_batched_tokens=9, row_block=4, max_model_len=48, policy=policy, eos_token_ids=(EOS,)
    )
    fake = FakeEngine(config, PagePool(12, 4), adapter_slots=5)
    for request in crowd(11, count=60):
        add(fake, request)
    idle, best = 0, 0
    while fake.scheduler.has_work():
        fake.step()
        news = sum(seq.num_outputs for seq in fake.sequences) + fake.terminal.total()
        idle, best = (0, news) if news > best else (idle + 1, best)
        assert idle <= 48 / 8 + 2  # recomputing the longest sequence in chunks of 8 rows, and the step in flight
    assert fake.scheduler.counts().preemptions > 5
    fake.check_idle()


def test_ten_thousand_aborts_in_all_phases_leave_nothing_behind():
    rng = random.Random(3)
    config = SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=16, row_block=4, max_model_len=48, max_queue=20)
    fake = FakeEngine(config, PagePool(12, 4), adapter_slots=3)
    phases, number = Counter(), 0
    while phases.total() < 10_000:
        number += 1
        add(fake, random_request(rng, str(number), arrival=float(number)))
        for _ in range(rng.choice([0, 2, 8, 16])):
            half_step(fake, rng)
        live = [seq for seq in fake.sequences if seq.state is not State.FINISHED]
        for seq in rng.sample(live, min(len(live), rng.choice([0, 0, 1, 2, 3]))):
            phases[phase(seq)] += bool(fake.abort(seq.request.id))
        fake.check()
        assert all(fake.terminal[seq] == (seq.state is State.FINISHED) for seq in fake.sequences)
        fake.sequences = [seq for seq in fake.sequences if seq.state is not State.FINISHED]
    fake.run()
    fake.check_idle()
    kinds = ("queued", "prefill", "prefill for others", "follower", "decode", "token in flight", "preempted")
    assert all(phases[kind] > 30 for kind in kinds), phases


def half_step(fake: FakeEngine, rng: random.Random) -> None:
    """Dispatches or collects, so that an abort may find a step planned and not committed."""
    full = len(fake.flying) > fake.run_ahead
    planned = not full and rng.random() < 0.5 and fake.dispatch()
    if fake.flying and not planned:
        fake.collect()


def phase(seq: Sequence) -> str:
    if seq.leader is not None:
        return "follower"
    if seq.state is State.WAITING:
        return "preempted" if seq.num_preempted else "queued"
    if seq.prefilling:
        return "prefill for others" if seq.followers else "prefill"
    return "token in flight" if seq.num_pending else "decode"
