"""Requests aborted in every phase give everything back, and the ones that stay notice nothing."""

from collections import Counter

import numpy as np
import pytest
import serving

from jaxserve.sampling import SamplingParams

pytestmark = pytest.mark.quick_compiles

ADAPTERS = (None, "small", "middle", "large")


def with_adapters(engine):
    for seed, (name, rank) in enumerate(zip(ADAPTERS[1:], (4, 16, 40), strict=True)):
        engine.load_adapter(name, serving.adapter_dir(serving.model_dir(), seed=seed, rank=rank))
    return engine


def menu():
    """Twelve requests to choose from; half of them begin alike."""
    for i in range(12):
        prompt = serving.prompt(32) * (i % 2) + serving.prompt(1 + 4 * i, seed=i)
        params = SamplingParams(
            max_tokens=30 + 3 * i,
            temperature=i % 3 * 0.7,
            top_k=20,
            seed=i,
            n=1 + 2 * (i % 4 == 3),
            repetition_penalty=1.1,
        )
        yield prompt, params, ADAPTERS[i % 4]


def phase(live):
    """What the request is doing, for the count of phases."""
    first = live.choices[0]
    if first.state.name == "WAITING":
        return "preempted" if first.num_preempted else "waiting"
    if first.prefilling:
        return "between chunks"
    if first.num_outputs == 0:
        return "before its first token"
    return "in flight" if first.num_pending else "decoding"


def soak(num_aborts, seed):
    engine = serving.limit(with_adapters(serving.engine(serving.model_dir())), pages=14, budget=32)
    requests, rng = list(menu()), np.random.default_rng(seed)
    alone = [serving.bits(engine.generate([p], s, adapter=a)[0])[0] for p, s, a in requests]
    alone = [[tokens for tokens, _, _ in choices] for choices in alone]
    running, phases, finished = {}, Counter(), 0
    tokens: dict[tuple[str, int], list[int]] = {}
    while phases.total() < num_aborts:
        while len(running) < 12:
            i = int(rng.integers(len(requests)))
            prompt, params, adapter = requests[i]
            running[engine.add_request(prompt, params, adapter=adapter)] = i
        for event in engine.step():
            tokens.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        for name in [name for name in running if name not in engine._live]:
            i = running.pop(name)
            finished += 1
            assert [tokens.pop((name, k)) for k in range(requests[i][1].n)] == alone[i]
        while running and rng.random() < 0.35:
            victim = str(rng.choice(list(running)))
            if victim in engine._live and (phase(engine._live[victim]) != "waiting" or rng.random() < 0.1):
                phases[phase(engine._live[victim])] += 1
                assert engine.abort(victim)
                assert not engine.abort(victim)
                del running[victim]
        if rng.random() < 0.02:
            engine.core.scheduler.check()
            engine.core.residency.check()
    for victim in list(running):
        engine.abort(victim)
    serving.drain(engine)
    serving.check_idle(engine)
    assert engine.stats()["recompiles"] == 0
    return phases, finished


def test_after_random_aborts_in_all_phases_everything_was_given_back():
    phases, finished = soak(num_aborts=500, seed=0)
    wanted = {"waiting", "preempted", "between chunks", "before its first token", "in flight"}
    assert wanted <= set(phases), phases
    assert min(phases[name] for name in wanted) >= 5, phases
    assert finished >= 20


@pytest.mark.slow
def test_after_10000_random_aborts_everything_was_given_back():
    phases, finished = soak(num_aborts=10_000, seed=1)
    assert len(phases) >= 5
    assert finished >= 300


def test_an_abort_tells_each_open_choice_once():
    engine = with_adapters(serving.engine(serving.model_dir()))
    params = SamplingParams(n=3, max_tokens=20, seed=1)
    name = engine.add_request(serving.prompt(20), params, adapter="small")
    for _ in range(6):
        engine.step()
    assert engine.abort(name)
    events = serving.drain(engine)
    assert [(event.index, event.finish_reason) for event in events] == [(i, "abort") for i in range(3)]
    assert not engine.abort(name)
    assert not engine.abort("nobody")
    serving.check_idle(engine)


def test_neighbours_of_an_aborted_request_keep_their_bits():
    engine = with_adapters(serving.engine(serving.model_dir()))
    params = serving.greedy(24)
    (before,) = engine.generate([serving.prompt(50)], params, adapter="small")
    for steps in range(8):
        engine.core.pool.drop_cache()
        victims = [engine.add_request(serving.prompt(60, seed=i), params, adapter="large") for i in range(3)]
        stays = engine.add_request(serving.prompt(50), params, adapter="small")
        engine._live[stays].collect = True
        for _ in range(steps):
            engine.step()
        for victim in victims:
            assert engine.abort(victim)
        serving.drain(engine)
        assert serving.bits(engine._finished.pop(stays)) == serving.bits(before)
    serving.check_idle(engine)
