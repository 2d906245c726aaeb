"""The public engine on the host's side: what it refuses, counts and hands out."""

import dataclasses
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import serving
import tiny_adapters

import jaxserve
from jaxserve.adapters.peft_io import load_peft, save_peft
from jaxserve.errors import AdapterError, AdapterNotFound, ConfigError, InvalidRequest, ModelError
from jaxserve.interrupts import deferred_interrupts
from jaxserve.sampling import SamplingParams

pytestmark = pytest.mark.quick_compiles


@pytest.fixture(scope="module")
def engine():
    return serving.engine(serving.model_dir(), max_queue=6)


ONE = SamplingParams(max_tokens=1, temperature=0.0)


def test_ctrl_c_waits_for_the_end_of_a_step(engine, monkeypatch):
    expected = engine.generate([[1, 2, 3]], ONE)[0].token_ids
    step, done = engine.core.step, []

    def interrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(step())
        return done[-1]

    def twice():
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one waits as well")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine.core, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate([[1, 2, 3]], ONE)
        assert len(done) == 1
        with pytest.raises(KeyboardInterrupt):
            twice()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert engine.generate([[1, 2, 3]], ONE)[0].token_ids == expected
    serving.check_idle(engine)


# prompts


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([-1], "token id -1; ids go from 0 to 299"),
        ([1, 300], "token id 300"),
        ([2**40], f"token id {2**40}"),
        ([2**70], "must be a list of token ids"),
        ([1.5], "must be a list of token ids"),
        ([[1, 2], [3]], "must be a list of token ids"),
        ([[1, 2]], "must be a list of token ids"),
        ([None], "must be a list of token ids"),
        ([1, "a"], "must be a list of token ids"),
        ([True], "must be a list of token ids"),
        ([1, True], "must be a list of token ids"),
        (7, "must be a list of token ids"),
        (range(160), "exceeds the context length of 160 tokens"),
        (range(161), "exceeds the context length"),
    ],
)
def test_a_bad_prompt_is_refused_by_what_is_wrong_with_it(engine, prompt, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        engine.add_request(prompt, ONE)
    assert caught.value.param in ("prompt", "max_tokens")
    serving.check_idle(engine)


@pytest.mark.parametrize(
    ("option", "value"),
    [("priority", None), ("priority", float("nan")), ("tenant", None), ("salt", 3), ("request_id", 7)],
)
def test_an_option_of_another_kind_is_refused_by_name(engine, option, value):
    with pytest.raises(InvalidRequest, match=f"{option} is .*; it must be an? (integer|string)") as caught:
        engine.add_request([1], ONE, **{option: value})
    assert caught.value.param == option
    serving.check_idle(engine)


@pytest.mark.parametrize("value", [3, None, ["a"], {}])
def test_an_argument_of_another_kind_is_refused_by_name(engine, value):
    for call, error, message in [
        (engine.abort, InvalidRequest, "request_id is"),
        (engine.chat, InvalidRequest, "messages"),
        (engine.unload_adapter, AdapterNotFound, "is not loaded"),
        (engine.close_adapter, InvalidRequest, "is not open for training"),
        (lambda params: engine.sample([1], params or "x"), InvalidRequest, "params is"),
    ]:
        with pytest.raises(error, match=message):
            call(value)
    serving.check_idle(engine)


def test_a_priority_may_be_any_integer(engine):
    engine.abort(engine.add_request([1], ONE, priority=np.int64(3)))
    serving.drain(engine)
    serving.check_idle(engine)


@pytest.mark.parametrize("prompts", [None, 7, b"ab", {}, {"a": 1}, {1, 2}, [None], [{"a": 1}], [{1}]], ids=str)
def test_prompts_of_another_kind_are_refused_by_name(engine, prompts):
    with pytest.raises(InvalidRequest, match=r"prompts? is .*; it must be") as caught:
        engine.generate(prompts, ONE)
    assert caught.value.param in ("prompt", "prompts")
    serving.check_idle(engine)


@pytest.mark.parametrize(
    ("option", "value"),
    [("params", {"max_tokens": 1}), ("params", [{}]), ("params", "a"), ("params", 3), ("adapter", 3), ("adapter", {})],
)
def test_options_of_another_kind_are_refused_by_name(engine, option, value):
    options = {"params": ONE, option: value}
    with pytest.raises(InvalidRequest, match=f"{option} is .*; it must be a") as caught:
        engine.generate([[1]], **options)
    assert caught.value.param == option
    with pytest.raises(InvalidRequest, match=f"{option} is .*; it must be a") as caught:
        engine.add_request([1], **options)
    assert caught.value.param == option
    serving.check_idle(engine)


def test_prompts_may_come_from_a_generator(engine):
    outputs = engine.generate(([i, i + 1] for i in range(3)), ONE)
    assert [output.prompt_token_ids for output in outputs] == [[0, 1], [1, 2], [2, 3]]
    assert engine.generate(iter([4, 5]), ONE)[0].prompt_token_ids == [4, 5]


@pytest.mark.parametrize("kind", [list, tuple, np.array, np.uint8, np.int64])
def test_token_ids_come_in_any_sequence(engine, kind):
    """Lists, tuples, numpy arrays of any integer type."""
    (output,) = engine.generate([kind([5, 6, 7])], ONE)
    assert output.prompt_token_ids == [5, 6, 7]
    (single,) = engine.generate(kind([5, 6, 7]), ONE)
    assert single.token_ids == output.token_ids


def test_a_request_without_params_is_drawn_as_the_model_recommends(engine, monkeypatch):
    greedy = SamplingParams(temperature=0.0)
    monkeypatch.setattr(engine, "default_params", greedy)
    (with_params,), (without,) = engine.generate([[1, 2, 3]], greedy), engine.generate([[1, 2, 3]])
    assert without.token_ids == with_params.token_ids


def test_text_without_a_tokenizer_is_refused():
    engine = serving.engine(serving.model_dir(tokenizer=False), enable_lora=False)
    with pytest.raises(InvalidRequest, match="no tokenizer; give token ids"):
        engine.generate("hello")
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        engine.chat([{"role": "user", "content": "hello"}])


def test_a_request_that_can_never_fit_is_refused_with_the_limit(engine):
    with pytest.raises(InvalidRequest, match=r"n is 9; it must be at most max_num_seqs 8"):
        engine.add_request([1], SamplingParams(n=9))
    with pytest.raises(InvalidRequest, match=r"context length of 160 tokens \(max_model_len\)") as caught:
        engine.add_request([1] * 100, SamplingParams(max_tokens=61))
    assert caught.value.param == "max_tokens"
    with pytest.raises(InvalidRequest, match="between 0 and 5"):
        engine.add_request([1], SamplingParams(logprobs=6))
    serving.check_idle(engine)


def test_more_stop_tokens_than_a_slot_can_hold_back_are_refused_and_the_engine_lives_on(engine):
    bias = dict.fromkeys(range(300), 1.0)
    params = SamplingParams(min_tokens=1, stop_token_ids=list(range(85)), logit_bias=bias)
    with pytest.raises(InvalidRequest, match="stop_token_ids and the model's own make 86"):
        engine.add_request([1, 2], params)
    assert engine.generate([[1, 2]], ONE)[0].finish_reason == "length"
    serving.check_idle(engine)


# ids, queue and threads


def test_an_id_in_use_is_refused_until_its_last_event_is_out(engine):
    engine.add_request([1, 2], ONE, request_id="mine")
    with pytest.raises(InvalidRequest, match="request id 'mine' is in use"):
        engine.add_request([3], ONE, request_id="mine")
    engine.core.step()
    news = engine.core.step()  # the scheduler is done with it; the engine has not said so yet
    assert news[0].outcome.finish_reason == "length"
    with pytest.raises(InvalidRequest, match="request id 'mine' is in use"):
        engine.add_request([3], ONE, request_id="mine")
    engine._take_in(news[0])
    assert engine.add_request([3], ONE, request_id="mine") == "mine"
    serving.drain(engine)
    serving.check_idle(engine)


def test_an_id_of_the_engines_own_is_never_one_that_a_caller_has(engine):
    number = int(engine.generate([[1]], ONE)[0].request_id.removeprefix("request-"))
    taken = [engine.add_request([7], ONE, request_id=f"request-{number + 1 + i}") for i in range(2)]
    (output,) = engine.generate([[1]], ONE)
    assert output.request_id not in taken
    assert {event.request_id for event in serving.drain(engine)} == set(taken)


def test_a_full_queue_refuses_and_generate_waits_for_room(engine):
    ids = [engine.add_request([i], ONE) for i in range(6)]
    with pytest.raises(InvalidRequest, match="queue is full: 6 choices wait") as caught:
        engine.add_request([7], ONE)
    assert caught.value.param == "max_queue"
    assert {event.request_id for event in serving.drain(engine)} == set(ids)
    params = SamplingParams(max_tokens=3, n=4, seed=1)
    outputs = engine.generate([[i] for i in range(20)], params)  # 80 choices through a queue of 6
    assert [len(output.outputs) for output in outputs] == [4] * 20
    with pytest.raises(InvalidRequest, match="queue is full"):
        engine.generate([[1]], SamplingParams(n=7))
    serving.check_idle(engine)


def test_generate_waits_for_room_that_another_thread_took(engine, monkeypatch):
    add, others = engine.add_request, []

    def later(*args, **options):
        if not others:
            others.extend(add([i], ONE) for i in range(6))
        return add(*args, **options)

    monkeypatch.setattr(engine, "add_request", later)
    assert [output.prompt_token_ids for output in engine.generate([[7], [8]], ONE)] == [[7], [8]]
    assert {event.request_id for event in serving.drain(engine)} == set(others)
    serving.check_idle(engine)


def test_requests_may_come_from_other_threads(engine):
    failures, added = [], []

    def client(i):
        for k in range(5):
            while not failures:
                try:
                    added.append(engine.add_request([i, k], SamplingParams(max_tokens=4, seed=i)))
                    break
                except InvalidRequest as error:
                    if error.param != "max_queue":
                        failures.append(error)

    clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in clients:
        thread.start()
    over = 0
    while over < 20 and not failures:
        for event in engine.step():
            over += event.finish_reason is not None
    for thread in clients:
        thread.join()
    assert not failures
    serving.check_idle(engine)


def test_steps_are_made_by_one_thread_at_a_time(engine):
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    prompts = [[i, i + 1] for i in range(8)]
    alone = [output.token_ids for output in engine.generate(prompts, params)]
    streamed = engine.add_request(prompts[0], params)
    found: dict[int, list] = {}
    callers = [
        threading.Thread(target=lambda i=i: found.update({i: engine.generate(prompts[i], params)})) for i in range(8)
    ]
    for thread in callers:
        thread.start()
    events = serving.drain(engine, 100_000)
    for thread in callers:
        thread.join()
    events += serving.drain(engine)
    assert [found[i][0].token_ids for i in range(8)] == alone
    assert {event.request_id for event in events} == {streamed}
    assert [token for event in events for token in event.token_ids] == alone[0]
    serving.check_idle(engine)


# generate


def test_generate_spreads_one_value_or_takes_one_each(engine):
    params = [SamplingParams(max_tokens=i, temperature=0.0) for i in (1, 2, 3)]
    outputs = engine.generate([[1], [2], [3]], params)
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3]
    assert [output.prompt_token_ids for output in outputs] == [[1], [2], [3]]
    with pytest.raises(InvalidRequest, match="params has 2 entries for 3 prompts"):
        engine.generate([[1], [2], [3]], params[:2])
    with pytest.raises(InvalidRequest, match="adapter has 1 entries for 2 prompts"):
        engine.generate([[1], [2]], ONE, adapter=[None])
    assert engine.generate([], ONE) == []


def test_a_bad_prompt_among_others_leaves_nothing_running(engine):
    with pytest.raises(InvalidRequest, match="token id 999"):
        engine.generate([[1], [2], [999], [3]], SamplingParams(max_tokens=50))
    with pytest.raises(AdapterNotFound, match="'nobody' is not loaded"):
        engine.generate([[1], [2]], ONE, adapter=[None, "nobody"])
    serving.check_idle(engine)


def test_generate_beside_streamed_requests_takes_only_its_own(engine):
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    (alone,) = engine.generate([[4, 5]], params)
    streamed, aborted = (engine.add_request([4, 5], params) for _ in range(2))
    (output,) = engine.generate([[1]], dataclasses.replace(params, max_tokens=10))
    assert output.request_id not in (streamed, aborted)
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        engine.generate([[2], []], ONE)
    engine.abort(aborted)
    events = serving.drain(engine)
    assert [token for event in events if event.request_id == streamed for token in event.token_ids] == alone.token_ids
    assert [event.finish_reason for event in events if event.request_id == aborted][-1] == "abort"
    assert {event.request_id for event in events} == {streamed, aborted}
    assert engine._finished == {}


def test_cached_tokens_are_reported(engine):
    engine.core.pool.drop_cache()
    prompt = serving.prompt(50)
    counts = [engine.generate([prompt], ONE)[0].num_cached_tokens for _ in range(2)]
    assert counts == [0, 48]


@pytest.mark.parametrize("other", [{"salt": "x"}, {"tenant": "y"}])
def test_tenants_and_salts_do_not_share_prefixes(engine, other):
    prompt = serving.prompt(50, seed=len(str(other)))

    def cached(**options):
        request_id = engine.add_request(prompt, ONE, **options)
        live = engine._live[request_id]
        serving.drain(engine)
        return live.output.num_cached_tokens

    assert [cached(), cached(**other), cached(), cached(**other)] == [0, 0, 48, 48]


def test_under_the_priority_policy_small_numbers_go_first():
    engine = serving.engine(serving.model_dir(), scheduling_policy="priority")
    for i in range(12):
        engine.add_request(serving.prompt(60, seed=i), ONE, request_id=str(i), priority=-i)
    order = [event.request_id for event in serving.drain(engine)]
    assert order == [str(i) for i in reversed(range(12))]


def test_stats_count_what_was_done():
    engine = serving.engine(serving.model_dir())
    engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True))
    stats = engine.stats()
    assert (stats["requests"], stats["prompt_tokens"], stats["generation_tokens"]) == (2, 5, 14)
    assert (stats["running"], stats["waiting"], stats["kv_usage"], stats["recompiles"]) == (0, 0, 0, 0)
    assert stats["kv_pages"] == stats["kv_pages_free"] == 64


# adapters


def test_an_adapter_without_a_name_one_can_use_is_refused(engine):
    directory = serving.adapter_dir(serving.model_dir())
    for name in ("", "a/b", "../x", "tiny", "-x", "x" * 65, 3):
        with pytest.raises(InvalidRequest):
            engine.load_adapter(name, directory)
    assert engine.list_adapters() == []


@pytest.mark.parametrize("path", [None, 3, b"dir", ["a"]], ids=str)
def test_a_path_of_another_kind_is_refused_by_name(engine, path):
    with pytest.raises(AdapterError, match=r"adapter 'it': path is .*; it must be") as caught:
        engine.load_adapter("it", path)
    assert caught.value.field == "path"


def test_a_method_that_is_not_served_is_refused_and_the_version_before_stays(engine, tmp_path):
    config = tiny_adapters.ia3_config()
    tensors = tiny_adapters.random_tensors(config, engine.model)
    path = tiny_adapters.write_files(tmp_path / "vera", config | {"peft_type": "VERA"}, tensors)
    version = engine.load_adapter("it", serving.adapter_dir(serving.model_dir())).version
    with pytest.raises(AdapterError, match="VERA") as caught:
        engine.load_adapter("it", path)
    assert caught.value.field == "peft_type"
    assert [(info.name, info.version) for info in engine.list_adapters()] == [("it", version)]
    engine.unload_adapter("it")


def test_an_id_that_is_used_again_gets_nothing_of_the_request_that_was_aborted(engine):
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    (expected,) = engine.generate([[1, 2, 3]], params)
    engine.add_request(list(range(2, 30)), params, request_id="again")
    engine.step()  # which is still under way
    engine.abort("again")
    engine.add_request([1, 2, 3], params, request_id="again")
    engine._live["again"].collect = True
    serving.drain(engine)
    assert engine._finished.pop("again").prompt_logprobs == expected.prompt_logprobs


def test_a_rank_beyond_the_engines_is_refused(engine):
    directory = serving.adapter_dir(serving.model_dir(), rank=65)
    with pytest.raises(AdapterError, match="rank 65 exceeds max_lora_rank 64"):
        engine.load_adapter("it", directory)
    with pytest.raises(AdapterError, match="rank 65 exceeds max_lora_rank 64"):
        engine.put_adapter("it", load_peft(directory, engine.model))
    assert engine.list_adapters() == []


@pytest.mark.parametrize("weights", [3, None, {}])
def test_weights_of_another_kind_are_refused(engine, weights):
    with pytest.raises(InvalidRequest, match=r"weights is .*; it must be those of an adapter"):
        engine.put_adapter("it", weights)


def test_weights_of_another_base_are_refused_and_those_of_an_unknown_one_are_not(engine):
    weights = load_peft(serving.adapter_dir(serving.model_dir()), engine.model)
    with pytest.raises(AdapterError, match="adapter was trained on base model 6f74686572"):
        engine.put_adapter("it", dataclasses.replace(weights, base_digest=b"other"))
    assert engine.put_adapter("it", weights).rank == 4
    engine.unload_adapter("it")


def test_weights_of_another_shape_are_refused(engine):
    weights = load_peft(serving.adapter_dir(serving.model_dir()), engine.model)
    key, pair = next(iter(weights.pairs.items()))
    wider = dataclasses.replace(pair, b=np.zeros((pair.b.shape[0] + 1, pair.rank), np.float32))
    with pytest.raises(AdapterError, match=r"layers\.0\..* is adapted for \d+ outputs; the model's has \d+"):
        engine.put_adapter("it", dataclasses.replace(weights, pairs=weights.pairs | {key: wider}))
    beyond = (engine.model.num_layers, key[1])
    with pytest.raises(AdapterError, match=rf"the model has {engine.model.num_layers} layers"):
        engine.put_adapter(
            "it", dataclasses.replace(weights, pairs={beyond: pair}, scaling={beyond: 1.0}, base_digest=None)
        )
    unknown = (0, "qkv_proj")
    with pytest.raises(AdapterError, match="'qkv_proj' is adapted; the model has q_proj, k_proj"):
        engine.put_adapter("it", dataclasses.replace(weights, pairs={unknown: pair}, scaling={unknown: 1.0}))
    assert engine.list_adapters() == []


def test_a_refused_request_leaves_its_adapter_unpinned(engine):
    engine.load_adapter("it", serving.adapter_dir(serving.model_dir()))
    with pytest.raises(InvalidRequest):
        engine.add_request([], ONE, adapter="it")
    assert engine.adapters.num_pins == 0
    engine.unload_adapter("it")


# start-up


@pytest.mark.parametrize("path", [3, None, b"model", ["model"]])
def test_places_of_another_kind_are_refused_before_anything_is_read(path):
    with pytest.raises(ModelError, match="model path is"):
        jaxserve.Engine.from_pretrained(path)
    with pytest.raises(AdapterError, match="adapters is"):
        jaxserve.Engine.from_pretrained("nowhere", adapters=path or "a")


def test_adapters_that_cannot_be_loaded_are_refused_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxserve.llm.load_params", lambda *args: pytest.fail("the model was loaded"))
    path, adapter = serving.model_dir(), serving.adapter_dir(serving.model_dir(), rank=65)
    cases = [
        ({"it": tmp_path / "nowhere"}, {}, AdapterError, "adapter 'it': .*does not exist"),
        ({"it": adapter}, {"max_lora_rank": 64}, AdapterError, "adapter 'it': rank 65 exceeds max_lora_rank 64"),
        ({"it": adapter}, {"enable_lora": False}, AdapterError, "enable_lora off"),
        ({"a/b": adapter}, {}, InvalidRequest, "adapter name 'a/b' must be"),
    ]
    for adapters, options, error, says in cases:
        with pytest.raises(error, match=says):
            jaxserve.Engine.from_pretrained(path, adapters=adapters, **options)


def test_jobs_to_come_must_be_settings():
    with pytest.raises(InvalidRequest, match=r"jobs is '5'; it must be a list of FinetuneConfig"):
        jaxserve.Engine.from_pretrained("nowhere", jobs=5)
    with pytest.raises(InvalidRequest, match=r"jobs has 1 settings; max_finetune_jobs is 0, must be at least 1"):
        jaxserve.Engine.from_pretrained("nowhere", jobs=[jaxserve.FinetuneConfig()])
    with pytest.raises(InvalidRequest, match=r"jobs has \{'dropout': 0.1\}; each must be a FinetuneConfig"):
        jaxserve.Engine.from_pretrained("nowhere", jobs=[{"dropout": 0.1}])


def test_an_adapter_of_another_base_is_refused_before_a_step_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxserve.llm.load_params", lambda *args: {})
    weights = load_peft(serving.adapter_dir(serving.model_dir()), serving.model_config(serving.model_dir()))
    save_peft(dataclasses.replace(weights, base_digest=b"other"), tmp_path / "other")
    with pytest.raises(AdapterError, match="adapter 'it': adapter was trained on base model 6f74686572"):
        jaxserve.Engine.from_pretrained(serving.model_dir(), adapters={"it": tmp_path / "other"})


def test_options_are_checked_together_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError) as caught:
        jaxserve.Engine.from_pretrained(tmp_path / "nowhere", max_num_seqs=0, speed=9)
    assert "max_num_seqs" in str(caught.value)
    assert "speed" in str(caught.value)


def test_a_missing_directory_and_too_many_devices_are_refused(tmp_path):
    with pytest.raises(ModelError):
        jaxserve.Engine.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="tensor_parallel 64 must be between 1 and the 8 devices present"):
        jaxserve.Engine.from_pretrained(
            serving.model_dir(num_attention_heads=64, num_key_value_heads=1, head_dim=2, intermediate_size=128),
            tensor_parallel=64,
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tensor_parallel": 3}, ModelError, "tensor_parallel 3 does not divide num_attention_heads 4"),
        ({"tensor_parallel": 10**11}, ModelError, "tensor_parallel 100000000000 does not divide num_attention_heads 4"),
        ({"tensor_parallel": 4, "max_finetune_jobs": 1}, InvalidRequest, "at most num_key_value_heads 2; it is 4"),
    ],
)
def test_sizes_that_cannot_split_the_model_are_refused_before_they_split_the_cpu(monkeypatch, options, error, message):
    monkeypatch.setattr("jaxserve.llm.make_mesh", lambda size: pytest.fail("the CPU was split"))
    with pytest.raises(error, match=message):
        jaxserve.Engine.from_pretrained(serving.model_dir(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 513}, "max_model_len 513 exceeds max_position_embeddings 512"),
        ({"num_kv_pages": 9}, "max_model_len 160 needs more than 9 KV pages of 16 tokens"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        serving.engine(serving.model_dir(), **options)


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ends"),
    [
        ({"eos_token_id": [5, 6]}, (7,), 8, (5, 6)),
        ({"eos_token_id": 0}, (7,), 8, (0,)),
        ({"eos_token_id": None}, (7,), 8, (7,)),
        ({}, (7, 9), 8, (7, 9)),
        ({}, (), 8, (8,)),
        ({}, (), None, ()),
        ({"eos_token_id": [5, 300]}, (), 8, (5,)),
    ],
)
def test_what_ends_a_text_is_said_by_the_first_file_that_says_it(generation, config, tokenizer, ends):
    engine = SimpleNamespace(
        generation_config=generation,
        model=SimpleNamespace(eos_token_ids=config, vocab_size=300),
        tokenizer=SimpleNamespace(eos_token_id=tokenizer),
    )
    assert jaxserve.Engine._eos_token_ids(engine) == ends
