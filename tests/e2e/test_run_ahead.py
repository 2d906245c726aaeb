"""The loop runs a step ahead of what the host has read; ends that come as a surprise cost a row and nothing else."""

import pytest
import serving

from jaxserve.sampling import SamplingParams

pytestmark = pytest.mark.quick_compiles


@pytest.fixture(scope="module")
def engine():
    return serving.engine(serving.model_dir(), enable_lora=False)


@pytest.fixture(scope="module")
def free(engine):
    return [engine.generate([serving.prompt(20, seed=i)], serving.greedy(30))[0].token_ids for i in range(12)]


def ends(free):
    """(params, expected tokens): each request stops at another of its tokens."""
    for i, tokens in enumerate(free):
        stop = tokens[2 * i + 1]
        yield serving.greedy(30, stop_token_ids=[stop]), tokens[: tokens.index(stop) + 1]


def test_two_steps_are_in_flight_while_there_is_work(engine):
    engine.add_request(serving.prompt(20), serving.greedy(10))
    engine.step()
    depths = []
    while engine.has_work():
        engine.step()
        depths.append(len(engine.core.in_flight))
    assert max(depths) == 1  # after each call one step is with the device, unread
    assert depths[-1] == 0


def test_a_request_that_ends_while_its_next_row_is_in_flight_gets_no_further_token(engine, free):
    params, expected = zip(*ends(free), strict=True)
    outputs = engine.generate([serving.prompt(20, seed=i) for i in range(12)], list(params))
    assert [output.token_ids for output in outputs] == list(expected)
    assert {output.finish_reason for output in outputs} == {"stop"}
    serving.check_idle(engine)


def test_who_takes_over_its_slot_and_pages_is_not_disturbed_by_that_row(free):
    """Twelve requests in one slot after the other, in a pool that has pages for one of them."""
    engine = serving.engine(serving.model_dir(), enable_lora=False, enable_prefix_caching=False)
    serving.limit(engine, pages=4)
    params, expected = zip(*ends(free), strict=True)
    outputs = engine.generate([serving.prompt(20, seed=i) for i in range(12)], list(params))
    assert [output.token_ids for output in outputs] == list(expected)
    serving.check_idle(engine)


def test_events_carry_each_token_once_and_in_order(engine, free):
    ids = [engine.add_request(serving.prompt(20, seed=i), params) for i, (params, _) in enumerate(ends(free))]
    tokens, over = {i: [] for i in ids}, []
    for event in serving.drain(engine):
        assert event.request_id not in over
        tokens[event.request_id] += event.token_ids
        over += [event.request_id] * (event.finish_reason is not None)
    assert list(tokens.values()) == [expected for _, expected in ends(free)]
    assert sorted(over) == sorted(ids)


def test_a_request_of_one_token_needs_no_decode_step(engine):
    before = engine.stats()["steps"]
    (output,) = engine.generate([serving.prompt(20)], SamplingParams(max_tokens=1, temperature=0.0))
    assert len(output.token_ids) == 1
    assert engine.stats()["steps"] == before + 1


def test_a_request_may_fill_the_context_to_its_last_token(engine):
    (output,) = engine.generate([serving.prompt(150)], serving.greedy(None))
    assert (len(output.token_ids), output.finish_reason) == (10, "length")
    (output,) = engine.generate([serving.prompt(159)], serving.greedy(None))
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_a_request_that_comes_between_two_looks_does_not_make_the_engine_think_it_is_stuck(engine):
    """The last step is read while nothing can be planned; then a request arrives, before the engine looks again."""
    engine.generate([serving.prompt(5)], serving.greedy(2))
    serving.drain(engine)
    assert engine.core.step() == []
    engine.add_request(serving.prompt(6), serving.greedy(2))
    assert not engine.core.stuck()
    serving.drain(engine)
