"""Training data: what a file may hold and what is learnt of it; every kind of bad line by its number."""

import json
import os
import tracemalloc

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Dataset, check_file, load_dataset
from jaxserve.finetune.errors import DataError
from jaxserve.finetune.examples import Example
from jaxserve.finetune.job import Job
from jaxserve.finetune.records import MAX_LINE_BYTES, MAX_LINES
from jaxserve.tokenizer import Tokenizer, load_tokenizer

SECRET = "xyzzy"
CHAT = [
    {"role": "system", "content": "the rules"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello and the world"},
    {"role": "user", "content": "on\nand on"},
    {"role": "assistant", "content": "the end"},
]
CHATML = tiny_models.CHAT_TEMPLATE
QWEN3 = """{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
        {{- content + '<|im_end|>\n' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
R1 = QWEN3.replace("'<|im_start|>assistant\n' }}{%- endif %}", "'<|im_start|>assistant\n<think>\n' }}{%- endif %}")
LLAMA2 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}<<SYS>> {{ m.content }} <</SYS>>
{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}
{% endfor %}"""
STRICT = """{% for m in messages %}{% if loop.last and m.role == 'assistant' and messages | length < 5 %}
{{ raise_exception('the last message must be the user\\'s') }}{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PARTS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def backend_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny_models.build_tokenizer(directory, extra_tokens=("<think>", "</think>"))
    return str(directory)


@pytest.fixture(scope="module")
def tokenizer(backend_dir) -> Tokenizer:
    return load_tokenizer(backend_dir)


@pytest.fixture
def load(tmp_path, tokenizer):
    """Loads bytes, or values as lines, as a file."""

    def load(content, max_length=512, tokenizer=tokenizer, **fields) -> Dataset:
        if not isinstance(content, bytes):
            content = b"".join(json.dumps(value).encode() + b"\n" for value in content)
        path = tmp_path / "data.jsonl"
        path.write_bytes(content)
        config = FinetuneConfig(**fields)
        return load_dataset(path, tokenizer, max_length=max_length, vocab_size=tokenizer.vocab_size, config=config)

    return load


def learnt(tokenizer, example: Example) -> str:
    return tokenizer.decode(example.token_ids[example.weights > 0].tolist(), skip_special_tokens=False)


def whole(tokenizer, example: Example) -> str:
    return tokenizer.decode(example.token_ids.tolist(), skip_special_tokens=False)


def refusal(load, content, **fields) -> list[str]:
    with pytest.raises(DataError) as caught:
        load(content, **fields)
    assert SECRET not in str(caught.value)
    return caught.value.errors


# what is learnt


def test_the_assistant_s_words_and_the_token_that_ends_them_are_learnt(load, tokenizer):
    [example] = load([{"messages": CHAT}]).examples
    assert example.token_ids.tolist() == tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)
    assert learnt(tokenizer, example) == "hello and the world<|im_end|>the end<|im_end|>"
    assert example.token_ids.dtype == np.int32
    assert example.weights.dtype == np.float32


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, "hello and the world<|im_end|>the end<|im_end|>"),
        (QWEN3, "hello and the world<|im_end|><think>\n\n</think>\n\nthe end<|im_end|>"),
        (R1, "hello and the world<|im_end|>\n</think>\n\nthe end<|im_end|>"),
        (LLAMA2, " hello and the world <|end_of_text|> the end <|end_of_text|>"),
        (STRICT, "hello and the world<|im_end|>the end<|im_end|>"),
        (BARE, "assistant: hello and the world\nassistant: the end\n"),
    ],
    ids=["chatml", "qwen3", "deepseek-r1", "llama2", "strict", "bare"],
)
def test_a_turn_is_what_follows_the_generation_prompt_in_every_template(load, backend_dir, template, wanted):
    tokenizer = load_tokenizer(backend_dir, chat_template=template)
    [example] = load([{"messages": CHAT}], tokenizer=tokenizer).examples
    assert example.token_ids.tolist() == tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)
    assert learnt(tokenizer, example) == wanted


@pytest.mark.parametrize("template", [CHATML, PARTS], ids=["chatml", "parts"])
def test_contents_in_parts_are_learnt_as_the_template_shows_them(load, backend_dir, template):
    chat = [m | {"content": [{"type": "text", "text": part} for part in m["content"].split("\n")]} for m in CHAT]
    tokenizer = load_tokenizer(backend_dir, chat_template=template)
    [example] = load([{"messages": chat}], tokenizer=tokenizer).examples
    [plain] = load([{"messages": CHAT}]).examples
    assert example.token_ids.tolist() == tokenizer.apply_chat_template(chat, add_generation_prompt=False)
    assert learnt(tokenizer, example) == learnt(tokenizer, plain)


def test_the_thoughts_that_a_template_drops_from_earlier_turns_are_not_learnt(load, backend_dir):
    tokenizer = load_tokenizer(backend_dir, chat_template=QWEN3)
    chat = [*CHAT[:2], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello"}, *CHAT[3:]]
    [example] = load([{"messages": chat}], tokenizer=tokenizer).examples
    assert learnt(tokenizer, example) == "hello<|im_end|><think>\n\n</think>\n\nthe end<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, QWEN3], ids=["chatml", "qwen3"])
def test_a_conversation_is_encoded_once_however_many_turns_it_has(load, backend_dir, monkeypatch, template):
    tokenizer, encoded = load_tokenizer(backend_dir, chat_template=template), []
    encode = tokenizer._encoding
    monkeypatch.setattr(tokenizer, "_encoding", lambda text, *flag: encoded.append(text) or encode(text, *flag))
    [example] = load([{"messages": CHAT + CHAT[1:] * 4}], tokenizer=tokenizer).examples
    assert learnt(tokenizer, example).count("<|im_end|>") == 10
    assert len(encoded) == 1


def test_a_conversation_may_begin_with_the_assistant(load, tokenizer):
    [example] = load([{"messages": [CHAT[2], CHAT[3], CHAT[4]]}]).examples
    assert learnt(tokenizer, example) == "hello and the world<|im_end|>the end<|im_end|>"


@pytest.mark.parametrize("content", ["0", "A", "0A", "A0", "\n\nthe", "the\n\n", " ", "é"])
def test_contents_that_look_like_the_stand_ins_or_join_the_template_are_learnt_whole(load, backend_dir, content):
    chat = [*CHAT[:2], {"role": "assistant", "content": content}, *CHAT[3:]]
    for template in (CHATML, QWEN3, R1):
        tokenizer = load_tokenizer(backend_dir, chat_template=template)
        [example] = load([{"messages": chat}], tokenizer=tokenizer).examples
        text = learnt(tokenizer, example).split("<|im_end|>")[0]
        assert text == (content if template == CHATML else content.lstrip("\n"))


@settings(max_examples=60)
@given(
    turns=st.lists(
        st.tuples(st.text(st.sampled_from("ab 0A\né<|>"), min_size=1, max_size=6), st.integers(0, 1)),
        min_size=1,
        max_size=4,
    )
)
def test_of_any_conversation_exactly_the_weighted_turns_are_learnt(tokenizer, turns):
    turns[-1] = (turns[-1][0], 1)
    messages = []
    for content, weight in turns:
        messages.append({"role": "user", "content": content[::-1]})
        messages.append({"role": "assistant", "content": content, "weight": weight})
    dataset = load_dataset([{"messages": messages}], tokenizer, max_length=512, vocab_size=tokenizer.vocab_size)
    wanted = "".join(content + "<|im_end|>" for content, weight in turns if weight)
    assert learnt(tokenizer, dataset.examples[0]) == wanted


def test_loss_on_all_learns_everything_but_the_first_token_and_unwanted_turns(load, tokenizer):
    [example] = load([{"messages": CHAT}], loss_on="all").examples
    assert example.weights.tolist() == [0.0] + [1.0] * (example.num_tokens - 1)
    messages = [CHAT[1], {**CHAT[2], "weight": 0}, CHAT[3], CHAT[4]]
    [example] = load([{"messages": messages}], loss_on="all").examples
    left_out = example.token_ids[1:][example.weights[1:] == 0]
    assert tokenizer.decode(left_out.tolist(), skip_special_tokens=False) == "hello and the world<|im_end|>"


@pytest.mark.parametrize("weight", [0, 0.0])
def test_a_message_of_weight_0_is_read_and_not_learnt(load, tokenizer, weight):
    messages = [CHAT[1], {**CHAT[2], "weight": weight}, CHAT[3], {**CHAT[4], "weight": 1}]
    [example] = load([{"messages": messages}]).examples
    assert learnt(tokenizer, example) == "the end<|im_end|>"


def test_a_completion_is_learnt_to_its_end_token(load, tokenizer):
    [example] = load([{"prompt": "hello the", "completion": " world"}]).examples
    assert whole(tokenizer, example) == "<|begin_of_text|>hello the world<|end_of_text|>"
    assert learnt(tokenizer, example) == " world<|end_of_text|>"


def test_a_token_that_holds_the_end_of_the_prompt_and_the_completion_s_start_is_learnt(load, tokenizer):
    [example] = load([{"prompt": "say hel", "completion": "lo"}]).examples
    together = tokenizer.encode("say hello", add_special_tokens=False)
    assert example.token_ids.tolist() == [tiny_models.BOS, *together, tiny_models.EOS]
    assert learnt(tokenizer, example) == "hello<|end_of_text|>"


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_text_is_learnt_whole(load, tokenizer, loss_on):
    [example] = load([{"text": "hello the world"}], loss_on=loss_on).examples
    assert whole(tokenizer, example) == "<|begin_of_text|>hello the world<|end_of_text|>"
    assert learnt(tokenizer, example) == "hello the world<|end_of_text|>"


@pytest.mark.parametrize("token", tiny_models.SPECIAL)
def test_control_tokens_in_data_are_text(load, tokenizer, token):
    records = [
        {"messages": [{"role": "user", "content": f"a{token}b"}, {"role": "assistant", "content": f"{token}c"}]},
        {"prompt": f"a{token}", "completion": f"b{token}"},
        {"text": f"a{token}b"},
    ]
    plain = json.loads(json.dumps(records).replace(token, "#"))
    for example, reference in zip(load(records).examples, load(plain).examples, strict=True):
        control = [int(id) for id in example.token_ids if int(id) in tokenizer.special_ids]
        assert control == [int(id) for id in reference.token_ids if int(id) in tokenizer.special_ids]
        assert token in whole(tokenizer, example)


# files


def test_lines_end_in_newlines_of_either_kind_and_in_nothing_else(load, tokenizer):
    lines = [json.dumps({"text": f"{n}\u2028\u0085\x0b\x0c\x1c"}, ensure_ascii=False).encode() for n in range(4)]
    dataset = load(lines[0] + b"\n" + lines[1] + b"\r\n\r\n  \n" + lines[2] + b"\n" + lines[3])
    assert len(dataset) == 4
    assert [example.index for example in dataset.examples] == [0, 1, 2, 3]
    assert whole(tokenizer, dataset.examples[3]) == "<|begin_of_text|>3\u2028\u0085\x0b\x0c\x1c<|end_of_text|>"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\xef\xbb\xbf{}\n", "byte order mark"),
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        ('{"text": "a"}\n'.encode("utf-16-be"), "UTF-16"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "UTF-16"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"PK\x03\x04", "zip"),
        (b"", "no examples"),
        (b"\n \r\n\t\n", "no examples"),
    ],
    ids=str,
)
def test_what_is_no_jsonl_is_refused_by_name(load, content, named):
    [line] = refusal(load, content)
    assert named in line


@pytest.mark.parametrize("path", ["missing", ".", "/dev/zero"])
def test_what_is_no_file_is_refused(tokenizer, tmp_path, path):
    with pytest.raises(DataError, match="data file"):
        load_dataset(tmp_path / path, tokenizer, max_length=9, vocab_size=9)


GOOD = b'{"text": "hello"}'
BAD_LINES = [
    (b"not json " + SECRET.encode(), "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[1, 2]", "must be an object"),
    (b'"x"', "must be an object"),
    (b"{}", "needs messages"),
    (b"a,b,c", "not valid JSON"),
    (b'{"text": "\xff"}', "utf-8"),
    (b'{"text": "\\ud800"}', "surrogate"),
    (b'{"text": "a\\u0000"}', "NUL"),
    (b'{"text": "a\x00"}', "not valid JSON"),
    (b'{"text": "a", "text": "b"}', "duplicate key 'text'"),
    (b'{"text": NaN}', "NaN is not JSON"),
    (b'{"text": -Infinity}', "-Infinity is not JSON"),
    (b'{"text": 1e999}', "too large"),
    (b'{"text": ' + b"[" * 100 + b"]" * 100 + b"}", "nested"),
    (b'{"text": ' + b"[" * 9000 + b"]" * 9000 + b"}", "nested"),
    (b'{"text": 3}', "text must be a string"),
    (b'{"text": ""}', "nothing to learn"),
    (b'{"text": "a", "colour": 1}', "unknown key 'colour'"),
    (b'{"colour": 1}', "unknown key 'colour'"),
    (b'{"text": "a", "messages": []}', "unknown key 'text'"),
    (b'{"prompt": "a"}', "'completion' is missing"),
    (b'{"completion": "a"}', "'prompt' is missing"),
    (b'{"prompt": "a", "completion": ""}', "nothing to learn"),
    (b'{"prompt": null, "completion": "a"}', "prompt must be a string"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=lambda value: str(value)[:40])
def test_a_bad_line_is_named_by_its_number_and_reason(load, line, reason):
    [problem] = refusal(load, b"\n".join([GOOD] * 6 + [line] + [GOOD] * 3))
    assert problem.startswith("line 7: ")
    assert reason in problem
    assert "\n" not in problem


USER, ASSISTANT = {"role": "user", "content": SECRET}, {"role": "assistant", "content": "b"}
TEXT = {"type": "text", "text": "a"}
BAD_CHATS = [
    ([], "at least one"),
    ({"role": "user"}, "must be a list"),
    ([USER], "the last message must be the assistant's"),
    ([ASSISTANT, USER], "the last message must be the assistant's"),
    ([USER, {"role": "assistant", "content": ""}], "messages[1]: nothing to learn"),
    ([USER, {"role": "assistant", "content": None}], "messages[1]: key 'content' is missing"),
    ([USER, {"role": "assistant", "content": [TEXT | {"text": ""}]}], "messages[1]: nothing to learn"),
    ([USER, {"role": "assistant", "content": 3}], "messages[1]: content must be a string"),
    (
        [{"role": "user", "content": [TEXT, {"type": "image_url"}]}, ASSISTANT],
        "content[1]: type is 'image_url'; it must",
    ),
    ([{"role": "user", "content": [TEXT | {"weight": 1}]}, ASSISTANT], "content[0]: unknown key 'weight'"),
    ([{"role": "user", "content": [TEXT | {"text": "a\0"}]}, ASSISTANT], "messages[0]: content holds NUL"),
    ([USER, {"role": "assistant"}], "messages[1]: key 'content' is missing"),
    ([{"role": SECRET, "content": "a"}, ASSISTANT], "messages[0]: role must be one of"),
    ([{"role": ["user"], "content": "a"}, ASSISTANT], "messages[0]: role must be one of"),
    ([{"content": "a"}, ASSISTANT], "messages[0]: key 'role' is missing"),
    ([3, ASSISTANT], "messages[0]: must be an object"),
    ([USER, {**ASSISTANT, "weight": 0.5}], "weight must be 0 or 1"),
    ([USER, {**ASSISTANT, "weight": 2}], "weight must be 0 or 1"),
    ([USER, {**ASSISTANT, "weight": True}], "weight must be 0 or 1"),
    ([USER, {**ASSISTANT, "weight": "1"}], "weight must be 0 or 1"),
    ([USER, {**ASSISTANT, "weight": 0}], "nothing to learn: every assistant message has weight 0"),
    ([{**USER, "weight": 1}, ASSISTANT], "messages[0]: unknown key 'weight', known here are role, content, name"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_CHATS, ids=lambda value: str(value)[:60])
def test_a_bad_conversation_is_named_by_line_and_message(load, messages, reason):
    [problem] = refusal(load, [{"text": "a"}, {"messages": messages}])
    assert problem.startswith("line 2: ")
    assert reason in problem


def test_what_a_template_refuses_or_leaves_out_is_named_by_line(load, backend_dir):
    refusing = load_tokenizer(backend_dir, chat_template="{{ raise_exception('no ' + messages[0].role) }}")
    [problem] = refusal(load, [{"messages": CHAT}], tokenizer=refusing)
    assert problem == "line 1: messages: the model's chat template refuses them: no system"
    silent = load_tokenizer(backend_dir, chat_template="{{ messages[0].content }}")
    [problem] = refusal(load, [{"messages": CHAT}], tokenizer=silent)
    assert problem == "line 1: messages[2]: the model's chat template leaves nothing of it to learn"


def test_a_file_is_checked_by_its_first_line_where_that_takes_the_model(tmp_path, backend_dir):
    path, silent = tmp_path / "data.jsonl", load_tokenizer(backend_dir, chat_template="{{ messages[0].content }}")
    path.write_text(f"{json.dumps({'messages': CHAT})}\n" * 2)
    check_file(path, silent, FinetuneConfig(loss_on="all"))
    for tokenizer, reason in ((silent, "leaves nothing of it to learn"), (None, "text needs a tokenizer")):
        with pytest.raises(DataError, match=reason) as caught:
            check_file(path, tokenizer, FinetuneConfig())
        assert [problem.split(":")[0] for problem in caught.value.errors] == ["line 1"]


def test_the_first_ten_bad_lines_are_named(load):
    lines = [GOOD if number % 3 == 0 else b"{" for number in range(1, 100)]
    problems = refusal(load, b"\n".join(lines))
    numbers = [int(problem.split(":")[0].removeprefix("line ")) for problem in problems]
    assert numbers == [1, 2, 4, 5, 7, 8, 10, 11, 13, 14]


def test_a_line_may_hold_a_mebibyte_and_no_more(load):
    longest = b'{"text": 1' + b" " * (MAX_LINE_BYTES - 11) + b"}"
    assert len(longest) == MAX_LINE_BYTES
    lines = [longest + b"\r", longest, longest + b" ", longest[:-1] + b" }", longest + b" \r", b"{", longest + b" "]
    long, whole = f"longer than {MAX_LINE_BYTES} bytes", "text must be a string"
    problems = refusal(load, b"\n".join(lines))
    assert problems[:5] == [f"line {n}: {why}" for n, why in enumerate([whole, whole, long, long, long], start=1)]
    assert problems[5].startswith("line 6: not valid JSON")
    assert problems[6:] == [f"line 7: {long}"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [(os.mkfifo, "not a regular file"), (os.mkdir, "not a regular file"), (str, "No such file or directory")],
    ids=["fifo", "directory", "missing"],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make, reason):
    make(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match=f"data file: {reason}"):
        load_dataset(tmp_path / "data.jsonl", None, max_length=9, vocab_size=9999)


def test_a_giant_line_is_refused_without_reading_it_into_memory(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "')
        file.truncate(64 << 20)
        file.seek(64 << 20)
        file.write(b"\n" + GOOD + b"\n{\n")
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        load_dataset(path, tokenizer, max_length=9, vocab_size=9999)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [problem.split(":")[0] for problem in caught.value.errors] == ["line 1", "line 3"]
    assert peak < 8 << 20


def test_a_file_has_at_most_a_million_lines(load):
    [problem] = refusal(load, GOOD + b"\n" * (MAX_LINES + 1))
    assert problem == f"line {MAX_LINES + 1}: more than {MAX_LINES} lines"


@pytest.mark.parametrize("name", ["banking77", "gsm8k", "style_modern_to_kjv"])
def test_real_conversations_load(shared_data, load, tokenizer, name):
    files = list(shared_data.glob(f"{name}*_chat.jsonl"))
    if not files:
        pytest.skip(f"no {name} data")
    content = files[0].read_bytes()
    lines = content.split(b"\n")[:200]
    for line, example in zip(lines, load(b"\n".join(lines), max_length=4096).examples, strict=True):
        answers = [m["content"] for m in json.loads(line)["messages"] if m["role"] == "assistant"]
        assert learnt(tokenizer, example) == "".join(answer + "<|im_end|>" for answer in answers)


# token ids


def tokens(values, **settings):
    return load_dataset(values, None, **{"max_length": 512, "vocab_size": 100} | settings)


def test_token_ids_come_with_weights_or_all_count():
    dataset = tokens(
        iter(
            [
                ([1, 2, 3], [1, 0, 0.5]),
                {"input_ids": np.array([4, 5], np.int64), "weights": None},
                {"input_ids": (7, 8, 9), "weights": np.array([True, False, True])},
            ]
        )
    )
    assert [example.token_ids.tolist() for example in dataset.examples] == [[1, 2, 3], [4, 5], [7, 8, 9]]
    assert [example.weights.tolist() for example in dataset.examples] == [[0, 0, 0.5], [0, 1], [0, 0, 1]]
    assert all(not example.weights.flags.writeable for example in dataset.examples)


@pytest.mark.parametrize("source", [5, None])
def test_what_is_neither_a_file_nor_examples_is_refused(source):
    with pytest.raises(DataError, match="must be a file or an iterable"):
        tokens(source)


def test_given_arrays_are_copied():
    weights = np.ones(3, np.float32)
    dataset = tokens([([1, 2, 3], weights)])
    weights[:] = 7
    assert dataset.examples[0].weights.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (([], None), "at least one integer"),
        (([[1, 2]], None), "at least one integer"),
        (([1.0, 2.0], None), "at least one integer"),
        ((["1"], None), "at least one integer"),
        (([1, -1], None), "from 0 to 99"),
        (([1, 100], None), "from 0 to 99"),
        (([1, 2**40], None), "from 0 to 99"),
        (([1, 2**70], None), "at least one integer"),
        (([1, 2], [1]), "2 numbers"),
        (([1, 2], [1, "1"]), "2 numbers"),
        (([1, 2], [0, np.nan]), "finite"),
        (([1, 2], [0, 1e300]), "finite"),
        (([1, 2], [0, -1]), "not negative"),
        (([1, 2], [1, 0]), "nothing to learn"),
        (([1], None), "nothing to learn"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "unknown key 'labels'"),
        ({"text": "a"}, "needs a tokenizer"),
        ("ab", "must be (token ids, weights)"),
        (None, "must be (token ids, weights)"),
        ([1, 2, 3], "must be (token ids, weights)"),
        (([[1], [2, 3]], None), "at least one integer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_token_ids_are_named_by_place(value, reason):
    with pytest.raises(DataError) as caught:
        tokens([([1, 2], None), value])
    [problem] = caught.value.errors
    assert problem.startswith("example 1: ")
    assert reason in problem


def test_an_iterable_may_hold_records_as_a_file_does(tokenizer, load):
    records = [{"messages": CHAT}, {"text": "a"}]
    given = load_dataset(iter(records), tokenizer, max_length=512, vocab_size=tokenizer.vocab_size)
    assert given.digest == load(records).digest


# lengths


def test_a_longer_example_is_refused_with_its_length():
    with pytest.raises(DataError, match=r"example 1: 5 tokens, at most 4 \(.*max_length.*finetune_stash_tokens"):
        tokens([([1, 2, 3, 4], None), ([1, 2, 3, 4, 5], None)], max_length=4)


def test_a_longer_example_is_cut_and_counted_on_request():
    config = FinetuneConfig(on_long="truncate", max_length=3)
    dataset = tokens([([1, 2, 3, 4], None), ([1, 2, 3], None), ([1] * 9, None)], config=config)
    assert dataset.num_truncated == 2
    assert [example.num_tokens for example in dataset.examples] == [3, 3, 3]
    assert dataset.num_tokens == 9


def test_a_job_says_what_was_cut_and_that_its_validation_data_are_its_training_data():
    config = FinetuneConfig(on_long="truncate", max_length=4)
    cut = tokens([(range(9), None), ([1, 2], None)], config=config)
    job = Job("a", FinetuneConfig(), cut, start=None, validation=cut)  # pyright: ignore[reportArgumentType]
    job.announce()
    assert [event.kind for event in job.events()] == ["status", "warning", "warning", "warning"]
    assert [event.data.get("truncated") for event in job.events()[1:]] == [1, 1, None]
    training, validation = cut.split(0.5, seed=0)
    job = Job("a", FinetuneConfig(), training, start=None, validation=validation)  # pyright: ignore[reportArgumentType]
    job.announce()
    assert [event.kind for event in job.events()] == ["status", "warning"]


def test_the_engine_s_length_bounds_that_of_the_config():
    config = FinetuneConfig(max_length=100)
    with pytest.raises(DataError, match="at most 4 "):
        tokens([([1] * 5, None)], max_length=4, config=config)


def test_an_example_that_has_nothing_to_learn_once_cut_is_refused():
    config = FinetuneConfig(on_long="truncate")
    with pytest.raises(DataError, match="example 0: nothing to learn in the first 2 tokens"):
        tokens([([1, 2, 3], [0, 0, 1])], max_length=2, config=config)
