"""Jobs inside a serving engine: isolation both ways, versions, cancelling, refusals."""

import threading

import numpy as np
import pytest
import tiny_adapters
import tiny_models

import jaxserve
from jaxserve.finetune.errors import CheckpointError

SIZES = {
    "dtype": "float32", "max_model_len": 96, "max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size": 16,
    "max_loras": 8, "max_lora_rank": 16, "finetune_window": 32, "max_finetune_jobs": 4,
}  # fmt: skip
JOB = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, "batch_size": 3, "max_steps": 5, "deterministic": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.build(tmp_path_factory.mktemp("model") / "m", "llama")


@pytest.fixture
def engine(model):
    return jaxserve.Engine.from_pretrained(model, **SIZES)


def examples(seed: int, count: int = 7):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 80, count)
    return [(rng.integers(0, tiny_models.VOCAB_SIZE, n).tolist(), None) for n in lengths]


def requests(seed: int, count: int = 12):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, tiny_models.VOCAB_SIZE, int(n)).tolist() for n in rng.integers(3, 40, count)]


def masters(engine, name: str) -> bytes:
    """The adapter's float32 factors, as bytes."""
    pairs = engine.adapters.get(name).weights.pairs
    return b"".join(pairs[key].a.tobytes() + pairs[key].b.tobytes() for key in sorted(pairs))


def settled(engine) -> None:
    """Nothing is held by anybody."""
    engine.run()
    engine.core.pool.check([])
    engine.core.residency.check()
    shape = engine.core.trainer.shape
    engine.core.trainer.queue.check(shape.num_slots, shape.acc_pages, shape.stash_blocks)
    assert engine.core.residency.counts().num_refs == 0
    assert all(not np.asarray(pool).any() for layer in engine.core.trainer.sums.state.acc for pool in layer)


def test_requests_and_jobs_do_not_change_each_others_bits(engine):
    assert_apart(engine)


@pytest.mark.slow
def test_nor_do_those_of_a_model_with_normed_heads(tmp_path):
    path = tiny_models.build(tmp_path / "m", "qwen3", num_attention_heads=2, head_dim=16, intermediate_size=136)
    assert_apart(jaxserve.Engine.from_pretrained(path, **SIZES | {"max_num_batched_tokens": 64}))


def assert_apart(engine):
    """Fifty requests and four jobs, alone and together."""
    params, seeds = jaxserve.SamplingParams(max_tokens=12, temperature=0.0, logprobs=2), range(1, 5)
    alone = engine.generate(requests(1, 50), params)

    single = [engine.finetune(examples(seed), adapter=f"alone-{seed}", seed=seed, **JOB).wait() for seed in seeds]
    trained = [masters(engine, f"alone-{seed}") for seed in seeds]

    jobs = [engine.finetune(examples(seed), adapter=f"beside-{seed}", seed=seed, **JOB) for seed in seeds]
    beside = engine.generate(requests(1, 50), params)
    for job in jobs:
        job.wait()
    assert [(o.token_ids, o.logprobs) for o in beside] == [(o.token_ids, o.logprobs) for o in alone]
    assert [masters(engine, f"beside-{seed}") for seed in seeds] == trained
    assert [job.losses for job in jobs] == [job.losses for job in single]
    settled(engine)


def test_a_job_learns_and_its_versions_answer_at_once(engine):
    data = [{"prompt": "hello", "completion": " and the other thing"}] * 6
    job = engine.finetune(data, adapter="a", **{**JOB, "max_steps": 12})
    assert "digest" in vars(job._job.start)  # hashed by the caller: for the loop it would be a gap
    assert job.wait().losses[-1] < 0.5 * job.losses[0]
    prompt = jaxserve.SamplingParams(max_tokens=4, temperature=0.0)
    tuned, base = engine.generate(["hello"] * 2, prompt, adapter=["a", None])
    assert tuned.adapter_version == 13  # the start and one per step
    assert tuned.token_ids != base.token_ids
    kinds = [event.data["loss"] for event in job.events() if event.kind == "metrics"]
    assert kinds == job.losses
    settled(engine)


def test_a_saved_adapter_serves_as_the_live_one_does(engine, tmp_path):
    job = engine.finetune(examples(3), adapter="a", **JOB).wait()
    engine.load_adapter("b", job.save(tmp_path / "a"))
    params = jaxserve.SamplingParams(max_tokens=12, temperature=0.0, logprobs=1)
    live, saved = engine.generate([requests(4)[0]] * 2, params, adapter=["a", "b"])
    assert (live.token_ids, live.logprobs) == (saved.token_ids, saved.logprobs)
    for place in (3, None, "", "a\0"):
        with pytest.raises(jaxserve.InvalidRequest, match=r"directory is .*; it must be the path of a directory"):
            job.save(place)
    with pytest.raises(CheckpointError, match=r"adapter 'a' was not written: .*Not a directory"):
        job.save(tmp_path / "a" / "adapter_config.json" / "b")
    assert [event.number for event in job.events(-9)] == [event.number for event in job.events()]
    assert [event.number for event in job.events(np.int64(1))] == [event.number for event in job.events()][2:]
    for after in ("x", None, 1.5):
        with pytest.raises(jaxserve.InvalidRequest, match=r"after is .*; it must be the number of an event"):
            job.events(after)


def test_a_job_saves_what_it_has_learnt_whatever_else_has_its_name(engine, tmp_path):
    other = engine.finetune(examples(5), adapter="other", seed=5, **JOB).wait().save(tmp_path / "other")
    job = engine.finetune(examples(3), adapter="a", **JOB)
    engine.load_adapter("a", other)
    engine.load_adapter("start", job.save(tmp_path / "start"))
    engine.load_adapter("b", job.wait().save(tmp_path / "b"))
    starts = [pair.b for pair in engine.adapters.get("start").weights.pairs.values()]
    assert not any(b.any() for b in starts)
    assert masters(engine, "b") == masters(engine, "a") != masters(engine, "other")

    engine.load_adapter("a", other)
    with pytest.raises(jaxserve.AdapterNotFound, match="not one of this job"):
        job.save(tmp_path / "again")
    engine.unload_adapter("a")
    with pytest.raises(jaxserve.AdapterNotFound, match="not loaded"):
        job.save(tmp_path / "again")


def test_a_cancelled_job_leaves_nothing_behind(engine):
    job = engine.finetune(examples(5), adapter="a", **{**JOB, "max_steps": 1000})
    while job.step < 2 or not any(seq.backward_begun for seq in engine.core.trainer.queue.active):
        engine.step()
    job.cancel()
    assert job.status == "cancelled"
    job.cancel()
    assert engine.core.compiles.after_ready == 0  # what this needs was compiled with the job's programs
    settled(engine)
    again = engine.finetune(examples(1), adapter="b", seed=1, **JOB).wait()
    assert again.status == "succeeded"


def test_more_jobs_than_lanes_wait_for_their_turn(engine):
    jobs = [engine.finetune(examples(i), adapter=f"a{i}", **JOB) for i in range(6)]
    for job in jobs:
        job.wait()
    assert [job.status for job in jobs] == ["succeeded"] * 6
    settled(engine)


def test_requests_take_pages_from_sequences_that_have_not_begun_their_backward(engine):
    params = jaxserve.SamplingParams(max_tokens=24, temperature=0.0)
    alone = [o.token_ids for o in engine.generate(requests(6), params)]
    pool = engine.core.pool
    held = pool.alloc(pool.num_available - 12)
    job = engine.finetune(examples(7), adapter="a", **JOB)
    assert [o.token_ids for o in engine.generate(requests(6), params)] == alone
    assert job.wait().status == "succeeded"
    pool.free(held)
    settled(engine)


def test_what_cannot_be_trained_is_refused_before_anything_happens(engine, tmp_path):
    with pytest.raises(jaxserve.ConfigError, match=r"dropout 0\.1 with method ia3"):
        engine.finetune(examples(1), adapter="a", method="ia3", dropout=0.1)
    with pytest.raises(jaxserve.AdapterError, match="no adapter of that name"):
        engine.finetune(examples(1), adapter="a", start="nowhere")
    with pytest.raises(jaxserve.InvalidRequest, match="rank is 32; max_lora_rank is 16"):
        engine.finetune(examples(1), adapter="a", rank=32)
    with pytest.raises(ValueError, match="examples"):
        engine.finetune([], adapter="a")
    config = tiny_adapters.ia3_config()
    start = tiny_adapters.write_files(tmp_path, config, tiny_adapters.random_tensors(config, engine.model))
    with pytest.raises(jaxserve.ConfigError, match=r"dropout 0\.1 with start .*, an ia3 adapter, which has none"):
        engine.finetune(examples(1), adapter="a", start=str(start), dropout=0.1)
    for begin in (lambda *args, **fields: engine.finetune(examples(1), *args, **fields), engine.open_adapter):
        for tenant in ([1], 3, None):  # the fair policy would fail on it in the middle of a step
            with pytest.raises(jaxserve.InvalidRequest, match=r"tenant is .*; it must be a string"):
                begin("a", tenant=tenant)
        for config in ({}, {"rank": 4}, 4, "lora"):
            with pytest.raises(jaxserve.InvalidRequest, match=r"config is .*; it must be a FinetuneConfig"):
                begin("a", config)
        with pytest.raises(jaxserve.ConfigError, match="rank and config exclude each other"):
            begin("a", jaxserve.FinetuneConfig(), rank=4)
    assert engine.list_adapters() == []


def test_of_two_threads_with_jobs_of_one_adapter_the_later_is_refused(engine, monkeypatch):
    together, prepare, found = threading.Barrier(2), engine.core.trainer.prepare, []

    def prepare_together(*args):
        training = prepare(*args)
        together.wait()
        return training

    def begin():
        try:
            found.append(engine.finetune(examples(1), adapter="a", **JOB).wait().status)
        except jaxserve.InvalidRequest as error:
            found.append(str(error))

    monkeypatch.setattr(engine.core.trainer, "prepare", prepare_together)
    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["adapter 'a' is being trained by another job", "succeeded"]
    assert len(engine.jobs()) == 1
    settled(engine)


def test_training_compiles_no_step_once_the_engine_is_ready(engine):
    assert {bucket for bucket, _ in engine.core.specs} == set(engine.core.planner.buckets)  # nor one that never runs
    engine.finetune(examples(1), adapter="a", **JOB).wait()
    before = engine.stats()["recompiles"]
    job = engine.finetune(examples(8), adapter="b", **JOB)
    engine.generate(requests(8), jaxserve.SamplingParams(max_tokens=8, temperature=1.0, top_k=5))
    job.wait()
    assert engine.stats()["recompiles"] == before
