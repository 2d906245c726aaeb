"""Adapters loaded, replaced and unloaded while requests run: each request keeps the version it started with."""

import threading

import pytest
import serving

from jaxserve.errors import AdapterError, AdapterNotFound

pytestmark = pytest.mark.quick_compiles

PROMPT = serving.prompt(50)
PARAMS = serving.greedy(20)


def directory(seed, rank=4):
    return serving.adapter_dir(serving.model_dir(), seed=seed, rank=rank)


@pytest.fixture
def engine():
    return serving.engine(serving.model_dir())


@pytest.fixture(scope="module")
def alone():
    """Bits by adapter seed, each on an engine that knows nothing else."""
    results = {}
    for seed in (1, 2, 3):
        engine = serving.engine(serving.model_dir())
        engine.load_adapter("it", directory(seed))
        results[seed] = serving.bits(engine.generate([PROMPT], PARAMS, adapter="it")[0])
    assert len({str(bits) for bits in results.values()}) == 3
    return results


def submit(engine, name="it", prompt=PROMPT):
    request_id = engine.add_request(prompt, PARAMS, adapter=name)
    engine._live[request_id].collect = True
    return request_id


def finish(engine, *ids):
    serving.drain(engine)
    outputs = [engine._finished.pop(i) for i in ids]
    serving.check_idle(engine)
    return outputs


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 15])
def test_a_new_version_serves_new_requests_and_the_old_one_those_in_flight(engine, alone, steps):
    assert engine.load_adapter("it", directory(1)).version == 1
    old = submit(engine)
    for _ in range(steps):
        engine.step()
    assert engine.load_adapter("it", directory(2)).version == 2
    new = submit(engine)
    outputs = finish(engine, old, new)
    assert [serving.bits(output) for output in outputs] == [alone[1], alone[2]]
    assert [output.adapter_version for output in outputs] == [1, 2]
    assert [output.num_cached_tokens for output in outputs] == [0, 0]


def test_the_same_content_again_is_the_same_version(engine):
    first = engine.load_adapter("it", directory(1))
    assert engine.load_adapter("it", directory(1)) == first
    assert engine.load_adapter("it", directory(2)).version == 2


def test_the_prefix_cache_knows_content_and_not_names(engine, alone):
    runs = []
    for name, seed in [("it", 1), ("it", 2), ("other", 1), ("it", 1), ("it", 3), ("it", 2)]:
        engine.load_adapter(name, directory(seed))
        (output,) = engine.generate([PROMPT], PARAMS, adapter=name)
        assert serving.bits(output) == alone[seed]
        runs.append(output.num_cached_tokens)
    assert runs == [0, 0, 48, 48, 0, 48]
    base = engine.generate([PROMPT], PARAMS)[0]
    assert base.num_cached_tokens == 0
    assert serving.bits(base) not in alone.values()


@pytest.mark.parametrize("steps", [0, 3])
def test_an_unloaded_adapter_finishes_its_requests_and_takes_no_more(engine, alone, steps):
    engine.load_adapter("it", directory(1))
    running = [submit(engine) for _ in range(12)]  # 8 slots: four of them wait
    for _ in range(steps):
        engine.step()
    engine.unload_adapter("it")
    with pytest.raises(AdapterNotFound):
        submit(engine)
    with pytest.raises(AdapterNotFound):
        engine.unload_adapter("it")
    assert [serving.bits(output) for output in finish(engine, *running)] == [alone[1]] * 12
    assert engine.list_adapters() == []
    assert engine.load_adapter("it", directory(2)).version == 2  # never the same number twice


def test_more_adapters_than_slots_take_turns(engine):
    names = [f"a{i}" for i in range(9)]
    for i, name in enumerate(names):
        engine.load_adapter(name, directory(10 + i, rank=60))  # 4 of 64 ranks fit the device
    alone = [serving.bits(engine.generate([PROMPT], PARAMS, adapter=name)[0]) for name in names]
    engine.core.pool.drop_cache()
    outputs = finish(engine, *[submit(engine, name) for name in names * 2])
    assert [serving.bits(output) for output in outputs] == alone * 2
    assert engine.stats()["resident_adapters"] <= 4


def test_adapters_come_and_go_from_another_thread_while_one_steps(engine, alone):
    engine.load_adapter("it", directory(1))
    stop, failures, loads = threading.Event(), [], []

    def load():
        try:
            while not stop.is_set():
                loads.append(engine.load_adapter("busy", directory(20 + len(loads) % 3)))
                engine.unload_adapter("busy")
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        outputs = finish(engine, *[submit(engine) for _ in range(10)])
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert loads
    assert [serving.bits(output) for output in outputs] == [alone[1]] * 10


def test_a_refused_version_leaves_the_one_before_in_service(engine, alone):
    engine.load_adapter("it", directory(1))
    with pytest.raises(AdapterError, match="rank 65"):
        engine.load_adapter("it", directory(2, rank=65))
    (output,) = engine.generate([PROMPT], PARAMS, adapter="it")
    assert serving.bits(output) == alone[1]
    assert output.adapter_version == 1


def test_versions_that_are_gone_leave_nothing_in_the_engines_memory(engine):
    for seed in range(1, 10):
        engine.load_adapter("it", directory(seed, rank=60))
        engine.generate([PROMPT], serving.greedy(1), adapter="it")
    assert len(engine.core.writer._cut) == 4  # as many as the device holds


def test_adapters_on_disk_only_come_back_when_asked_for(alone):
    engine = serving.engine(serving.model_dir(), max_cpu_loras=4)
    engine.load_adapter("it", directory(1))
    for i in range(6):
        engine.load_adapter(f"a{i}", directory(10 + i))
    assert [info.loaded for info in engine.list_adapters()].count(True) == 4
    assert len(engine.core.writer._cut) == 4
    (output,) = engine.generate([PROMPT], PARAMS, adapter="it")
    assert serving.bits(output) == alone[1]
    assert len(engine.core.writer._cut) == 4


def test_an_engine_without_adapters_refuses_them_and_serves_the_base():
    engine = serving.engine(serving.model_dir(), enable_lora=False)
    with pytest.raises(AdapterError, match="enable_lora"):
        engine.load_adapter("it", directory(1))
    assert engine.list_adapters() == []
    assert engine.generate([PROMPT], PARAMS)[0].finish_reason == "length"
