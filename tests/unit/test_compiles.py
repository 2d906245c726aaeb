"""What is compiled, when, and what the compiled step does not do: copy its state, or its weights."""

import math
import re
from functools import cache

import jax
import numpy as np
import pytest
import serving

from jaxserve.engine.compiles import CompileCounter, watched
from jaxserve.engine.draw import Asks, draw, head_of, slots_of
from jaxserve.engine.state import copy_pages, write_slot
from jaxserve.engine.step import step
from jaxserve.sampling import SamplingParams

pytestmark = pytest.mark.quick_compiles

ADAPTERS = (None, "rank-4", "rank-16", "rank-40", "rank-64", "rank-1")
NUM_REQUESTS = 500


@pytest.fixture(scope="module")
def told():
    """What a watcher of the engine's start-up was told."""
    return []


@pytest.fixture(scope="module")
def engine(told):
    with watched(lambda done, total: told.append((done, total))):
        made = serving.engine(serving.model_dir())
    for name in ADAPTERS[1:]:
        rank = int(name.split("-")[1])
        made.load_adapter(name, serving.adapter_dir(serving.model_dir(), seed=rank, rank=rank))
    return made


def random_params(rng):
    tokens = rng.integers(0, 300, 6).tolist()
    return SamplingParams(
        max_tokens=int(rng.integers(1, 30)),
        temperature=float(rng.choice([0, 1e-9, 0.5, 1.0, 2.0])),
        top_k=int(rng.choice([-1, 0, 1, 40, 10**6])),
        top_p=float(rng.choice([1.0, 0.9, 1e-6])),
        min_p=float(rng.choice([0.0, 0.1, 1.0])),
        repetition_penalty=float(rng.choice([1.0, 1.3, 0.9])),
        presence_penalty=float(rng.choice([0.0, 1.0])),
        frequency_penalty=float(rng.choice([0.0, -1.0])),
        logit_bias=dict(zip(tokens, rng.uniform(-9, 9, 6).tolist(), strict=True)) if rng.random() < 0.3 else None,
        seed=int(rng.integers(2**62)) if rng.random() < 0.5 else None,
        n=int(rng.choice([1, 1, 1, 2, 5])),
        stop_token_ids=tokens if rng.random() < 0.3 else None,
        min_tokens=int(rng.choice([0, 0, 1])),
        ignore_eos=bool(rng.random() < 0.5),
        logprobs=[None, 0, 3, 5][rng.integers(4)],
        prompt_logprobs=[None, None, 0, 4][rng.integers(4)],
    )


def test_after_warm_up_500_random_requests_compile_nothing(engine):
    rng = np.random.default_rng(0)
    live, added, aborted = set(), 0, 0
    while added < NUM_REQUESTS or engine.has_work():
        while added < NUM_REQUESTS and len(live) < 14:
            prompt = rng.integers(0, 300, int(rng.integers(1, 131))).tolist()
            live.add(engine.add_request(prompt, random_params(rng), adapter=ADAPTERS[rng.integers(len(ADAPTERS))]))
            added += 1
        engine.step()
        live &= set(engine._live)
        if live and rng.random() < 0.05:
            aborted += engine.abort(str(rng.choice(sorted(live))))
        if rng.random() < 0.01:
            seed = int(rng.integers(5))
            engine.load_adapter("rank-1", serving.adapter_dir(serving.model_dir(), seed=50 + seed, rank=1))
    assert aborted > 10
    assert engine.stats()["requests"] == NUM_REQUESTS
    assert engine.stats()["recompiles"] == 0
    serving.check_idle(engine)


def test_a_watcher_is_told_of_each_program(engine, told):
    programs = engine.core.programs
    chunks = {bucket.chunk_rows for bucket, _ in programs.specs if bucket.chunk_rows}
    total = len(programs.specs) + len(programs.draws) + len(chunks)
    assert sorted(told) == [(done, total) for done in range(1, total + 1)]


def test_the_counter_counts_a_compilation(engine):
    counter = CompileCounter()
    jax.jit(lambda x: x * 3 + 1)(np.arange(7, dtype=np.float32))
    assert (counter.before_ready > 0, counter.after_ready) == (True, 0)
    counter.mark_ready()
    before = counter.after_ready
    jax.jit(lambda x: x * 5 + 1)(np.arange(9, dtype=np.float32))
    assert counter.after_ready > before


def test_engines_of_one_shape_share_their_programs(engine):
    counter = CompileCounter()
    counter.mark_ready()
    for bucket, spec in serving.engine(serving.model_dir()).core.specs.items():
        assert spec == engine.core.specs[bucket]
        assert hash(spec) == hash(engine.core.specs[bucket])
    sizes = step._cache_size()
    serving.engine(serving.model_dir())
    assert step._cache_size() == sizes


# the compiled step

BUCKETS = ("0+8", "64+8")


@cache
def compiled(name):
    """The step of one bucket, and the engine it belongs to."""
    engine = serving.engine(serving.model_dir())
    spec = next(spec for (b, _), spec in engine.core.specs.items() if f"{b.chunk_rows}+{b.decode_rows}" == name)
    ints, _, floats, _ = spec.layout.empty()
    return step.lower(engine.core.params, engine.core.state, ints, floats, spec=spec).compile(), engine


def shapes_of(tree):
    """Shapes of arrays as the HLO text writes them; only the large ones."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size >= 1024]
    return {f"{_HLO_TYPES[leaf.dtype.name]}[{','.join(map(str, leaf.shape))}]" for leaf in leaves}


_HLO_TYPES = {"float32": "f32", "int32": "s32", "int16": "s16"}


def copies(text, shapes):
    """Lines of the HLO text that copy, or lay out anew, an array of one of these shapes."""
    pattern = re.compile(r"= (\w+\[[\d,]*\])\S* (copy|copy-start|transpose|convert|reshape)\(")
    return [line.strip() for line in text.splitlines() if (hit := pattern.search(line)) and hit[1] in shapes]


def test_the_engine_has_no_other_buckets():
    _, engine = compiled(BUCKETS[0])
    assert sorted(f"{b.chunk_rows}+{b.decode_rows}" for b, _ in engine.core.specs) == sorted(BUCKETS)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_step_copies_neither_the_kv_pool_nor_the_adapters_nor_a_weight(bucket):
    program, engine = compiled(bucket)
    core = engine.core
    for tree in (core.state.kv, core.state.bank, core.params):
        assert shapes_of(tree)
        assert not copies(program.as_text(), shapes_of(tree))


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_step_has_no_branch_that_the_host_would_wait_for(bucket):
    program, _ = compiled(bucket)
    assert " conditional(" not in program.as_text()


@pytest.mark.parametrize("asks", [Asks.GREEDY, Asks.RANDOM, Asks.FILTERED])
def test_nor_have_the_common_draws(asks):
    _, engine = compiled(BUCKETS[0])
    core = engine.core
    spec = next(spec for (_, kind), spec in core.programs.draws.items() if kind is asks)
    layout = spec.layout
    hidden = np.zeros((layout.num_samples, engine.model.hidden_size), core.config.dtype)
    buffers = np.zeros(layout.num_ints, np.int32), np.zeros(layout.num_floats, np.float32)
    arguments = head_of(core.params, engine.model), *slots_of(core.state), hidden, *buffers
    assert " conditional(" not in draw.lower(*arguments, spec=spec).compile().as_text()


@pytest.mark.parametrize("bucket", BUCKETS)
def test_every_byte_of_the_state_is_updated_in_place(bucket):
    program, engine = compiled(bucket)
    assert program.memory_analysis().alias_size_in_bytes == serving.leaves_nbytes(engine.core.state)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_temporaries_are_bounded_by_rows_and_not_by_the_pool(bucket):
    """At most what attention gathers for the rows, the logits, and the adapters' blocks, a few times over."""
    program, engine = compiled(bucket)
    core, (chunk_rows, decode_rows) = engine.core, map(int, bucket.split("+"))
    model, sizes = engine.model, core.config
    blocks = chunk_rows // sizes.row_block + decode_rows
    gathered = blocks * sizes.pages_per_seq * sizes.page_size * model.num_kv_heads * model.head_dim
    scores = (chunk_rows + 2 * decode_rows) * model.num_heads * sizes.pages_per_seq * sizes.page_size
    logits = (64 * (chunk_rows > 0) + sizes.max_num_seqs) * 304
    rows = (chunk_rows + decode_rows) * (model.intermediate_size + model.hidden_size) * 4
    items = 16 * 64 * max(model.intermediate_size, model.hidden_size)  # adapter pages of one loop turn
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4 * (gathered + scores + logits + rows + items)


def test_a_pool_eight_times_as_large_needs_no_more_temporaries():
    program, engine = compiled("0+8")
    spec = next(spec for (bucket, _), spec in engine.core.specs.items() if bucket.chunk_rows == 0)
    grown = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8 * x.shape[0], *x.shape[1:]), x.dtype), engine.core.state.kv)
    state = engine.core.state.replace(kv=grown)
    ints, _, floats, _ = spec.layout.empty()
    larger = step.lower(engine.core.params, state, ints, floats, spec=spec).compile()
    sizes = [p.memory_analysis().temp_size_in_bytes for p in (program, larger)]
    assert sizes[1] <= sizes[0] + 1024
    assert not copies(larger.as_text(), shapes_of(grown))


def test_the_copy_detector_sees_a_copy():
    """A state that is not donated has to be copied before it is written."""
    _, engine = compiled("0+8")
    pool = engine.core.state.kv[0][0]
    kept = jax.jit(lambda pool: pool.at[0].set(1.0)).lower(pool).compile()
    assert copies(kept.as_text(), shapes_of(pool))
    donated = jax.jit(lambda pool: pool.at[0].set(1.0), donate_argnums=0).lower(pool).compile()
    assert not copies(donated.as_text(), shapes_of(pool))


def test_slots_and_pages_are_written_in_place():
    _, engine = compiled("0+8")
    core = engine.core
    pages = np.zeros(16, np.int32)
    tokens = np.zeros(core.config.max_model_len, np.int32)
    edits = [np.zeros(core.state.edit_token_BZ.shape[1], dtype) for dtype in (np.int32, np.float32, np.int32)]
    for program in (
        copy_pages.lower(core.state, pages, pages).compile(),
        write_slot.lower(core.state, np.int32(0), tokens, tokens, *edits).compile(),
    ):
        assert not copies(program.as_text(), shapes_of(core.state.kv) | shapes_of(core.state.bank))
        assert program.memory_analysis().alias_size_in_bytes == serving.leaves_nbytes(core.state)


def test_the_state_is_donated():
    engine = serving.engine(serving.model_dir())
    before = engine.core.state.kv[0][0]
    engine.generate([serving.prompt(5)], serving.greedy(2))
    assert before.is_deleted()
    assert math.isfinite(float(engine.core.state.kv[0][0].sum()))
