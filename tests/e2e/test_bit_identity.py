"""A request's tokens and log-probabilities do not depend, in any bit, on what it shares the engine with."""

import numpy as np
import pytest
import serving

from jaxserve.sampling import SamplingParams

NUM_REQUESTS = 40
BUCKETS = {"max_num_seqs": 16}  # 8 and 16 decode rows beside 0 and 64 chunk rows


def random_requests(seed, vocab_size=300):
    """(prompt, params, adapter) triples; four in ten share the beginning of their prompt."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, vocab_size, 40).tolist()
    return [random_request(rng, shared, vocab_size) for _ in range(NUM_REQUESTS)]


def random_request(rng, shared, vocab_size):
    start = shared if rng.random() < 0.4 else []
    prompt = start + rng.integers(0, vocab_size, int(rng.integers(1, 70))).tolist()
    params = SamplingParams(
        max_tokens=int(rng.integers(1, 40)),
        temperature=0.0 if rng.random() < 0.4 else float(rng.uniform(0.3, 1.5)),
        top_k=int(rng.choice([0, 5, 50])),
        top_p=float(rng.choice([1, 0.9, 0.5])),
        min_p=float(rng.choice([0, 0.05])),
        repetition_penalty=float(rng.choice([1, 1.2])),
        presence_penalty=float(rng.choice([0, 0.5])),
        frequency_penalty=float(rng.choice([0, 0, -0.3])),
        seed=int(rng.integers(2**40)),
        logprobs=3,
        prompt_logprobs=2 if rng.random() < 0.2 else None,
        logit_bias={5: 2.0, 7: -100.0} if rng.random() < 0.2 else None,
        min_tokens=int(rng.choice([0, 1])),
        n=int(rng.choice([1, 1, 3])),
    )
    return prompt, params, rng.choice([None, "small", "middle", "large", "again"])


def make_engine(**options):
    path = serving.model_dir()
    engine = serving.engine(path, **(BUCKETS | options))
    for seed, (name, rank) in enumerate({"small": 4, "middle": 16, "large": 40, "again": 4}.items()):
        engine.load_adapter(name, serving.adapter_dir(path, seed=seed, rank=rank))
    return engine


def run(engine, requests):
    prompts, params, adapters = zip(*requests, strict=True)
    outputs = engine.generate(list(prompts), list(params), adapter=list(adapters))
    serving.check_idle(engine)
    return [serving.bits(output) for output in outputs]


@pytest.fixture(scope="module")
def requests():
    return random_requests(seed=0)


@pytest.fixture(scope="module")
def alone(requests):
    """Each request by itself, on an engine that remembers nothing of the ones before."""
    engine, results = make_engine(), []
    for request in requests:
        results += run(engine, [request])
        engine.core.pool.drop_cache()
    return results


def check(engine, requests, alone, seed=0):
    """Random order, so other neighbours and other slots; the second time, other cached prefixes as well."""
    for turn in range(2):
        order = np.random.default_rng([seed, turn]).permutation(len(requests))
        together = run(engine, [requests[i] for i in order])
        different = [i for i, bits in zip(order, together, strict=True) if bits != alone[i]]
        assert not different, [(requests[i], alone[i]) for i in different[:1]]


def test_alone_is_as_in_random_company(requests, alone):
    engine = make_engine()
    used, planner = set(), engine.core.planner
    plan = planner.plan

    def noted(now):
        planned = plan(now)
        if planned is not None:
            used.add(planned.load.bucket)
        return planned

    planner.plan = noted
    check(engine, requests, alone)
    assert engine.stats()["prefix_hits"] > 0
    assert len(used) == 4, used


def test_without_a_prefix_cache_nothing_changes(requests, alone):
    engine = make_engine(enable_prefix_caching=False)
    check(engine, requests, alone)
    assert engine.stats()["prefix_hits"] == 0


@pytest.mark.parametrize("budget", [16, 48])
def test_chunks_of_other_sizes_change_nothing(requests, alone, budget):
    engine = serving.limit(make_engine(), budget=budget)
    check(engine, requests, alone, seed=budget)


@pytest.mark.parametrize("pages", [12, 20])
def test_preemption_changes_nothing(requests, alone, pages):
    engine = serving.limit(make_engine(), pages=pages)
    check(engine, requests, alone, seed=pages)
    assert engine.stats()["preemptions"] > 0


def test_fewer_adapter_slots_than_adapters_change_nothing(requests, alone):
    engine = make_engine()
    engine.core.residency._free = engine.core.residency._free[-4:]  # room for "large" and one small one
    engine.core.residency.num_pages = 5
    check(engine, requests, alone)
    assert engine.stats()["resident_adapters"] < 4


@pytest.mark.slow
def test_an_engine_of_other_sizes_changes_nothing(requests, alone):
    """128 chunk rows as well, and other numbers of adapters and slots."""
    check(make_engine(**serving.LARGE), requests, alone)


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_it_holds_for_windows_soft_caps_and_normed_heads(family):
    path = serving.model_dir(family)
    rng = np.random.default_rng(1)
    requests = [random_request(rng, [1] * 40, 300)[:2] for _ in range(12)]
    engine = serving.engine(path, enable_lora=False)
    alone = [bits for prompt, params in requests for bits in run(engine, [(prompt, params, None)])]
    together = run(serving.limit(engine, pages=14, budget=32), [(*request, None) for request in requests])
    assert together == alone


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_other_random_requests_are_as_in_random_company(seed):
    requests = random_requests(seed)
    engine = make_engine()
    alone = []
    for request in requests:
        alone += run(engine, [request])
        engine.core.pool.drop_cache()
    check(serving.limit(engine, pages=16 + seed, budget=48), requests, alone, seed)


@pytest.mark.slow
def test_contexts_of_several_key_spans_change_nothing():
    """Beyond 256 keys attention loops over spans, and how often depends on the company."""
    path = serving.model_dir(max_position_embeddings=1024)
    engine = serving.engine(path, max_model_len=900, num_kv_pages=200, max_num_batched_tokens=128)
    rng = np.random.default_rng(2)
    requests = [
        (rng.integers(0, 300, int(length)).tolist(), serving.greedy(40), None)
        for length in rng.permutation([3, 200, 250, 256, 257, 300, 500, 520, 850])
    ]
    alone = [bits for request in requests for bits in run(engine, [request])]
    engine.core.pool.drop_cache()
    assert run(engine, requests) == alone
