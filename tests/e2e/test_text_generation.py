"""Text in, text out, through the public API and a tiny tokenizer."""

import dataclasses

import pytest
import serving
import tiny_models

import jaxserve
from jaxserve import SamplingParams
from jaxserve.errors import InvalidRequest

pytestmark = pytest.mark.quick_compiles


@pytest.fixture(scope="module")
def path():
    return serving.model_dir()


@pytest.fixture(scope="module")
def engine(path):
    made = jaxserve.Engine.from_pretrained(path, **serving.SIZES)
    made.load_adapter("math", serving.adapter_dir(path, seed=1))
    return made


GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def text_of(engine, token_ids, skip_special_tokens=True):
    return engine.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def test_prompts_of_text_get_the_tokens_of_transformers_and_their_text(engine, path):
    prompts = ["hello world", "the other and the rest of it", ""]
    outputs = engine.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt == prompt
        assert output.prompt_token_ids[0] == tiny_models.BOS
        assert output.token_ids == tiny_models.reference_greedy(path, output.prompt_token_ids, 24)
        assert output.text == text_of(engine, output.token_ids)
        assert (output.finish_reason, output.adapter, output.adapter_version) == ("length", None, None)


def test_text_and_its_token_ids_are_the_same_request(engine):
    (text,) = engine.generate("hello world", GREEDY)
    (ids,) = engine.generate(text.prompt_token_ids, GREEDY)
    assert ids.prompt is None
    assert serving.bits(ids) == serving.bits(text)
    assert ids.text == text.text


def test_an_adapter_changes_the_text_and_is_named_in_the_output(engine):
    base, math, by_base_name = engine.generate(["hello world"] * 3, GREEDY, adapter=[None, "math", engine.name])
    assert (math.adapter, math.adapter_version) == ("math", 1)
    assert base.adapter is None
    assert math.token_ids != base.token_ids == by_base_name.token_ids


def test_streamed_pieces_are_the_text(engine):
    ids = [engine.add_request(prompt, GREEDY) for prompt in ("hello", "world and")]
    pieces = dict.fromkeys(ids, "")
    for event in serving.drain(engine):
        pieces[event.request_id] += event.text
    outputs = engine.generate(["hello", "world and"], GREEDY)
    assert list(pieces.values()) == [output.text for output in outputs]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_cuts_the_text_where_it_begins(engine, include):
    (free,) = engine.generate("hello world", GREEDY)
    cut = False
    for begin in range(1, len(free.text) - 3):
        stop = free.text[begin : begin + 3]
        params = SamplingParams(
            max_tokens=24,
            temperature=0.0,
            ignore_eos=True,
            stop=["never said", stop],
            include_stop_str_in_output=include,
        )
        (output,) = engine.generate("hello world", params)
        at = free.text.index(stop)
        assert output.text == free.text[: at + 3 * include]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert free.token_ids[: len(output.token_ids)] == output.token_ids
        cut |= len(output.token_ids) < 20
    assert cut
    serving.check_idle(engine)


def test_no_piece_of_a_stop_string_is_ever_streamed(engine):
    (free,) = engine.generate("hello world", GREEDY)
    stop = free.text[6:12]
    engine.add_request("hello world", SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, stop=stop))
    seen = ""
    for event in serving.drain(engine):
        seen += event.text
        assert free.text[: free.text.index(stop)].startswith(seen)
    assert seen == free.text[: free.text.index(stop)]


def test_a_stop_string_before_min_tokens_is_ordinary_text(engine):
    (free,) = engine.generate("hello world", GREEDY)
    stop = free.text[1:3]
    for min_tokens in (0, 10, 24):
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, stop=stop, min_tokens=min_tokens)
        (output,) = engine.generate("hello world", params)
        assert len(output.token_ids) >= min_tokens
        if min_tokens:
            assert output.text.startswith(free.text[:3])


def test_the_models_own_end_is_no_part_of_the_text(engine):
    bias = {tiny_models.EOS: 100.0}
    params = SamplingParams(max_tokens=24, temperature=0.0, min_tokens=4, logit_bias=bias)
    (output,) = engine.generate("hello", params)
    assert output.token_ids[4:] == [tiny_models.EOS]
    assert (output.finish_reason, output.stop_reason) == ("stop", tiny_models.EOS)
    assert output.text == text_of(engine, output.token_ids[:4])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_part_of_the_text_where_stops_are_included(engine, include):
    (free,) = engine.generate("hello world", GREEDY)
    stop = free.token_ids[9]
    end = free.token_ids.index(stop)
    params = dataclasses.replace(GREEDY, stop_token_ids=[stop], include_stop_str_in_output=include)
    (output,) = engine.generate("hello world", params)
    assert output.token_ids == free.token_ids[: end + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == text_of(engine, output.token_ids[: end + include])


def test_special_tokens_show_when_asked_for(engine):
    bias = {tiny_models.PAD: 100.0}
    for skip in (True, False):
        params = SamplingParams(max_tokens=3, temperature=0.0, logit_bias=bias, skip_special_tokens=skip)
        (output,) = engine.generate("hello", params)
        assert output.text == ("" if skip else "<|pad|>" * 3)


def test_a_chat_is_rendered_by_the_models_template(engine):
    messages = [{"role": "user", "content": "hello"}]
    output = engine.chat(messages, GREEDY)
    assert output.prompt_token_ids == engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert len(output.token_ids) == 24


def test_a_chats_template_is_given_tools_and_further_names(engine, monkeypatch):
    template = "{{ tools[0].name }} {{ mood }}: {{ messages[0].content }}"
    tokenizer = engine.tokenizer.with_template(template)
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    messages, tools = [{"role": "user", "content": "hello"}], [{"name": "sum"}]
    output = engine.chat(messages, GREEDY, tools=tools, chat_template_kwargs={"mood": "calm"})
    assert tokenizer.decode(output.prompt_token_ids) == "sum calm: hello"
    for bad in ({"messages": []}, {"tools": []}, {"add_generation_prompt": False}, [1]):
        with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
            engine.chat(messages, GREEDY, chat_template_kwargs=bad)


def test_every_choice_has_its_own_text(engine):
    params = SamplingParams(max_tokens=10, temperature=1.5, seed=1, n=3, ignore_eos=True)
    (output,) = engine.generate("hello", params)
    assert [choice.text for choice in output.outputs] == [text_of(engine, c.token_ids) for c in output.outputs]
    assert output.text == output.outputs[0].text
    assert len({choice.text for choice in output.outputs}) == 3
