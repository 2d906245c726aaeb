"""A step that fails is replayed from what the host has read; nobody notices but the log."""

import logging

import pytest
import serving

from jaxserve.engine import bank_writer, programs
from jaxserve.sampling import SamplingParams

pytestmark = pytest.mark.quick_compiles

REQUESTS = [
    (serving.prompt(70), serving.greedy(25), "large"),
    (serving.prompt(5), SamplingParams(max_tokens=30, temperature=0.9, top_p=0.9, seed=4, logprobs=2, n=3), None),
    (serving.prompt(33), serving.greedy(28, repetition_penalty=1.3, frequency_penalty=0.2), "small"),
    (serving.prompt(20), serving.greedy(18, logit_bias={5: 1.5}, min_tokens=3, prompt_logprobs=2), None),
]


class Broken(RuntimeError):
    """A failure on the device."""


class Bomb:
    """An array of a step that failed while it ran."""

    def copy_to_host_async(self):
        pass

    def block_until_ready(self):
        raise Broken("reading")


def break_step(monkeypatch, when, how):
    """Breaks the calls of the step whose numbers are in ``when``; returns the list of broken ones."""
    real, calls, broken = programs.step, [], []

    def step(*args, spec):
        calls.append(spec.layout.bucket)
        number = len(calls) - 1
        if number not in when:
            return real(*args, spec=spec)
        broken.append(number)
        if how == "before it runs":
            raise Broken(how)
        state, output = real(*args, spec=spec)  # the old state is donated and gone
        if how == "while it runs":
            raise Broken(how)
        return state, output.replace(finite_B=Bomb())

    monkeypatch.setattr(programs, "step", step)
    return broken


def fresh(**options):
    path = serving.model_dir()
    engine = serving.engine(path, **options)
    engine.load_adapter("small", serving.adapter_dir(path, seed=1, rank=4))
    engine.load_adapter("large", serving.adapter_dir(path, seed=2, rank=40))
    return engine


def run(engine):
    prompts, params, adapters = zip(*REQUESTS, strict=True)
    return [serving.bits(output) for output in engine.generate(list(prompts), list(params), adapter=list(adapters))]


@pytest.fixture(scope="module")
def undisturbed():
    return run(fresh())


@pytest.mark.parametrize("how", ["before it runs", "while it runs", "when it is read"])
@pytest.mark.parametrize("when", [{0}, {1}, {2}, {9}, {5, 6}, {4, 12, 20}])
def test_a_failed_step_is_replayed_bit_by_bit(monkeypatch, caplog, undisturbed, when, how):
    engine = fresh()
    broken = break_step(monkeypatch, when, how)
    with caplog.at_level(logging.CRITICAL):
        assert run(engine) == undisturbed
    assert len(broken) == len(when)
    assert engine.stats()["recompiles"] == 0
    serving.check_idle(engine)


def test_replay_does_not_emit_a_token_twice(monkeypatch):
    engine = fresh()
    break_step(monkeypatch, {3, 7}, "when it is read")
    name = engine.add_request(serving.prompt(20), serving.greedy(15))
    events = serving.drain(engine)
    tokens = [token for event in events for token in event.token_ids]
    (output,) = engine.generate([serving.prompt(20)], serving.greedy(15))
    assert tokens == output.token_ids
    assert {event.request_id for event in events} == {name}


@pytest.mark.parametrize("how", ["before it runs", "when it is read"])
def test_three_failures_in_a_row_end_the_requests_and_the_engine_serves_on(monkeypatch, undisturbed, how):
    engine = fresh()
    with monkeypatch.context() as patch:
        break_step(patch, range(4, 10_000), how)
        for prompt, params, adapter in REQUESTS:
            engine.add_request(prompt, params, adapter=adapter)
        last = [event for event in serving.drain(engine) if event.finish_reason]
    assert sorted({event.request_id for event in last}) == [f"request-{i}" for i in range(len(REQUESTS))]
    assert len(last) == sum(params.n for _, params, _ in REQUESTS)
    assert {event.finish_reason for event in last} == {"error"}
    assert all("step failed" in event.error for event in last)
    serving.check_idle(engine)
    assert run(engine) == undisturbed


def test_requests_outside_the_step_that_fails_outlive_it(monkeypatch):
    engine = fresh()
    ids = [engine.add_request(serving.prompt(8, seed=i), serving.greedy(10)) for i in range(10)]  # four to a step
    break_step(monkeypatch, {3, 4, 5}, "before it runs")
    reasons = {event.request_id: event.finish_reason for event in serving.drain(engine) if event.finish_reason}
    assert [reasons[i] for i in ids] == ["error"] * 4 + ["length"] * 6
    serving.check_idle(engine)


def test_a_failed_upload_of_an_adapter_is_replayed_as_well(monkeypatch, undisturbed):
    engine = fresh()
    real, calls = bank_writer.write_page, []

    def write_page(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Broken("upload")
        return real(*args)

    monkeypatch.setattr(bank_writer, "write_page", write_page)
    assert run(engine) == undisturbed
    serving.check_idle(engine)
