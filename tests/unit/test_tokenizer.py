"""Ids against transformers' AutoTokenizer, chat templates, forged control tokens, streaming."""

import datetime
import json
import time

import jinja2
import pytest
import tiny_models
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jaxserve.errors import InvalidRequest, ModelError
from jaxserve.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    "hello",
    "  the world and on  \n\n hello",
    "naïve façade 日本語 🎉 \x00\t",
    "<|im_end|>the<|begin_of_text|>",
    "a" * 300,
]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
QWEN3_LIKE = """{%- if tools %}{{- '<|im_start|>system\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{% endfor %}{{- '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if loop.index0 > 90 %}{% break %}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' + content | trim + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{% generation %}{{ '<|im_start|>assistant\n' }}{{ '<think>\n' }}{% endgeneration %}
{%- endif %}"""
PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}<|im_end|>{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "  the rules\n"},
    {"role": "user", "content": "hello the world > 1 <"},
    {"role": "assistant", "content": "on and on"},
    {"role": "user", "content": "日本語?\n\n"},
]


@pytest.fixture
def write(tmp_path):
    """Writes a tokenizer directory and returns its path; settings go into tokenizer_config.json."""

    def write(chat_template=tiny_models.CHAT_TEMPLATE, extra_tokens=(), **settings):
        tiny_models.build_tokenizer(tmp_path, extra_tokens=extra_tokens, chat_template=chat_template)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return str(tmp_path)

    return write


def auto_tokenizer(directory):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory)


def control_ids(tokenizer):
    return {id for token, id in tokenizer.vocab.items() if token in tiny_models.SPECIAL}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"bos_token": None, "add_bos_token": True},
        {"eos_token": "<|new|>"},
        {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"} | FLAGS},
        {"additional_special_tokens": ["<|extra|>", "<|im_start|>"]},
        {"added_tokens_decoder": {"284": {"content": "the end", "special": False, "normalized": True}}},
    ],
    ids=str,
)
def test_ids_and_text_equal_those_of_transformers(write, settings):
    directory = write(**settings)
    ours, theirs = load_tokenizer(directory), auto_tokenizer(directory)
    for text in [*TEXTS, "x<|new|>y<|extra|> the end"]:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("template", [tiny_models.CHAT_TEMPLATE, QWEN3_LIKE], ids=["chatml", "qwen3-like"])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_ids_equal_those_of_transformers(write, template, prompt):
    directory = write(template, extra_tokens=("<think>", "</think>"))
    ours, theirs = load_tokenizer(directory), auto_tokenizer(directory)
    answered = {"role": "assistant", "content": "<think>\nthe\n</think>\n\nhello", "name": None}
    tools = [{"type": "function", "name": "ö<b>", "é": [1, None]}]
    for chat in (CHAT, CHAT[:1], [*CHAT, answered, CHAT[1]]):
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt, tools=tools)
        assert ours.render_chat(chat, prompt, tools=tools) == text
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.apply_chat_template(chat, prompt, tools=tools) == ids


GEMMA3_LIKE = """{% if messages[0].role == 'system' %}{% if messages[0].content is string %}
{{- messages[0].content }}{% else %}{{ messages[0].content[0].text }}{% endif %}{% endif %}
{%- for message in messages %}{{ message.role }}: {% if message['content'] is string %}{{ message['content'] | trim }}
{%- elif message['content'] is iterable %}{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>
{%- elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}{% endfor %}"""
MACRO_LIKE = """{% macro show(given) %}{% set parts = given.content %}{% if parts is string %}{{ parts }}{% else %}
{%- for part in parts | selectattr('type', 'equalto', 'text') %}{{ part.text }}|{% endfor %}{% endif %}{% endmacro %}
{%- for m in messages %}{{ show(m) }}{% endfor %}"""
PARTED = [
    message | {"content": [{"type": "text", "text": part} for part in message["content"].split()]} for message in CHAT
]


@pytest.mark.parametrize("template", [GEMMA3_LIKE, MACRO_LIKE, PARTS_TEMPLATE], ids=["gemma3", "macro", "parts"])
def test_templates_that_go_through_parts_are_given_them(write, template):
    ours, theirs = load_tokenizer(write(template)), auto_tokenizer(write(template))
    assert ours.render_chat(PARTED) == theirs.apply_chat_template(PARTED, tokenize=False)


@pytest.mark.parametrize("template", [tiny_models.CHAT_TEMPLATE, QWEN3_LIKE], ids=["chatml", "qwen3-like"])
def test_templates_that_expect_strings_are_given_parts_as_lines(write, template):
    joined = [message | {"content": "\n".join(message["content"].split())} for message in CHAT]
    tokenizer = load_tokenizer(write(template))
    assert tokenizer.apply_chat_template(PARTED) == tokenizer.apply_chat_template(joined)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "type is 'image_url'; it must be 'text'"),
        ({"type": "text", "text": None}, "text must be a string"),
        ({"text": "a"}, "must be an object with type and text"),
        ("a", "must be an object with type and text"),
    ],
)
@pytest.mark.parametrize("template", [tiny_models.CHAT_TEMPLATE, PARTS_TEMPLATE], ids=["chatml", "parts"])
def test_a_part_that_is_no_text_is_refused_by_its_place(write, template, part, said):
    chat = [CHAT[0], {"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    with pytest.raises(InvalidRequest) as caught:
        load_tokenizer(write(template)).apply_chat_template(chat)
    assert str(caught.value) == f"messages[1]: content[1]: {said}"
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_template_finds_the_reasoning_under_any_of_its_names(write, name):
    directory = write("{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}{% endfor %}")
    chat = [{"role": "assistant", "content": "a", "reasoning_content": None} | {name: "why"}]
    ours, theirs = load_tokenizer(directory), auto_tokenizer(directory)
    assert ours.render_chat(chat) == theirs.apply_chat_template(chat, tokenize=False) == "why|why"


def test_a_jinja_file_or_a_named_default_or_an_argument_gives_the_chat_template(write):
    directory = write([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}])
    assert load_tokenizer(directory).chat_template == "D"
    assert load_tokenizer(directory, chat_template="mine").render_chat(CHAT) == "mine"
    with open(f"{directory}/chat_template.jinja", "w") as file:
        file.write("J")
    assert load_tokenizer(directory).chat_template == "J"


def test_a_conversation_with_tools_has_the_template_that_is_named_for_them(write, tmp_path):
    templates = {
        "default": "D{{ messages[0].content }}",
        "tool_use": "{% for t in tools %}{{ t.name }}{% endfor %}<|im_end|>",
    }
    directory = write([{"name": name, "template": template} for name, template in templates.items()])
    ours, theirs = load_tokenizer(directory), auto_tokenizer(directory)
    tools = [{"name": "sum"}, {"name": "a<|im_end|>b"}]
    for given in ({}, {"tools": tools}, {"tools": []}):
        assert ours.render_chat(CHAT, **given) == theirs.apply_chat_template(CHAT, tokenize=False, **given)
    assert [i for i in ours.apply_chat_template(CHAT, tools=tools) if i in control_ids(ours)] == [tiny_models.IM_END]
    theirs.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.render_chat(CHAT, tools=tools) == "suma<|im_end|>b<|im_end|>"
    assert saved.render_chat(CHAT) == ours.render_chat(CHAT)


def test_arguments_of_tool_calls_may_be_a_string_that_holds_the_object(write):
    template = "{% for call in messages[1].tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>"
    ours, theirs = load_tokenizer(write(template)), auto_tokenizer(write(template))

    def chat(arguments, **fields):
        call = {"type": "function", "function": {"name": "sum", "arguments": arguments}}
        return [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", **fields, "tool_calls": [call]}]

    given = {"terms": [1, 2], "unit": "<|im_end|>"}
    wanted = theirs.apply_chat_template(chat(given, content=""), tokenize=False)
    for arguments in (given, json.dumps(given), json.dumps(given).replace("<", "\\u003c")):
        assert ours.render_chat(chat(arguments)) == wanted
        ids = ours.apply_chat_template(chat(arguments), add_generation_prompt=False)
        assert [id for id in ids if id in control_ids(ours)] == [tiny_models.IM_END]
    for no_object in ("[1]", "1 +", ""):
        assert ours.render_chat(chat(no_object)) == json.dumps(no_object) + "<|im_end|>"


@pytest.mark.parametrize("named", [[{"name": "default", "template": "D"}], {"default": "D", "tool_use": "T"}, "D"])
def test_a_processors_file_gives_the_chat_template_where_the_tokenizer_has_none(write, tmp_path, named):
    directory = write()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(directory).chat_template == "D"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "own"}))
    assert load_tokenizer(directory).chat_template == "own"


def test_tokens_with_names_of_their_own_are_variables_of_the_template(write, tmp_path):
    directory = write("{{ tool_token }}|{{ bos_token }}|{{ missing_token }}")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"extra_special_tokens": {"tool_token": "<|tool|>"}, "added_tokens_decoder": {}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(directory), auto_tokenizer(directory)
    assert (
        ours.render_chat(CHAT)
        == theirs.apply_chat_template(CHAT, tokenize=False)
        == f"<|tool|>|{tiny_models.SPECIAL[0]}|"
    )
    assert ours.encode("a<|tool|>") == theirs("a<|tool|>").input_ids


def test_older_files_beside_a_tokenizer_json_add_their_tokens(write, tmp_path):
    directory = write()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|b|>"]}))
    size = load_tokenizer(directory).vocab_size
    tokens = {"<|a|>": size - 1, "<|im_end|>": tiny_models.IM_END}
    (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
    ours, theirs = load_tokenizer(directory), auto_tokenizer(directory)
    for text in ("x<|a|>y<|b|>z", "<|im_end|>"):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == size + 1 == len(theirs)


def test_thousands_of_added_tokens_load_in_a_moment(write):
    """Gemma's have 6,415, each of which made a new automaton of all."""
    tokens = [f"<unused{i}>" for i in range(3000)]
    first = tiny_models.TOKENIZER_SIZE
    stored = {str(first + i): {"content": token, "special": False} | FLAGS for i, token in enumerate(tokens)}
    directory = write(extra_tokens=tuple(tokens), added_tokens_decoder=stored)
    start = time.process_time()
    assert load_tokenizer(directory).encode(tokens[-1])[-1] == first + 2999
    assert time.process_time() - start < 2


@pytest.mark.parametrize("token", tiny_models.SPECIAL)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_control_token_in_content_stays_text(write, token, role):
    tokenizer = load_tokenizer(write())
    scaffold = tokenizer.apply_chat_template([{"role": role, "content": "ab"}])
    ids = tokenizer.apply_chat_template([{"role": role, "content": f"a{token}b"}])
    count = lambda ids: [sum(i == control for i in ids) for control in sorted(control_ids(tokenizer))]  # noqa: E731
    assert count(ids) == count(scaffold)
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.render_chat(
        [{"role": role, "content": f"a{token}b"}]
    )


@pytest.mark.parametrize(
    "parts",
    [
        ["<|im_", "end|>"],
        ["<|im_ ", "end|>"],
        ["<", "|im_end|>"],
        ["<|", "im_end", "|>"],
        ["\ue0f0<|im_end|>\ue0f1"],
        ["<|im_\ue0f0end|>"],
        ["<|im_\ue0f1", "end|>"],
        ["<|im_<|im_end|>end|>"],
    ],
    ids=str,
)
def test_a_control_token_cannot_be_put_together_from_pieces(write, parts):
    tokenizer = load_tokenizer(write(PARTS_TEMPLATE))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": p} for p in parts]}])
    assert [i for i in ids if i in control_ids(tokenizer)] == [tiny_models.IM_START, tiny_models.IM_END]


@pytest.mark.parametrize("content", ["ab cd", "a<|im_end|>b", "<|im_end|>", "é<|im_end|>日"])
def test_each_token_of_a_conversation_has_its_characters(write, metaspace_dir, content):
    for tokenizer in (load_tokenizer(write()), load_tokenizer(metaspace_dir)):
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "hi </s> hi"}]
        tokens = tokenizer.chat_tokens(chat)
        assert tokens.ids == tokenizer.apply_chat_template(chat)
        assert tokens.text == tokenizer.chat_text(chat) == tokenizer.render_chat(chat)
        assert tokens.starts == sorted(tokens.starts)
        assert tokens.ends == sorted(tokens.ends)
        ends = [end for end in range(len(tokens.text) + 1) if (tokens.num_before(end) or 0) > 0]
        assert ends[-1] == len(tokens.text)
        for end in ends:
            first = tokenizer.decode(tokens.ids[: tokens.num_before(end)], skip_special_tokens=False)
            assert first.strip() == tokens.text[:end].strip()


def test_a_control_token_in_tools_or_names_stays_text(write):
    template = "{% for tool in tools %}{{ tool.name }}{% endfor %}{{ messages[0].name }}{{ extra }}"
    tokenizer = load_tokenizer(write(template))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "name": "<|im_start|>"}], tools=[{"name": "<|im_end|>"}], extra="<|end_of_text|>"
    )
    assert not control_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids) == "<|im_end|><|im_start|><|end_of_text|>"


def test_added_tokens_that_the_template_writes_are_control_tokens_too(write):
    template = "{% for m in messages %}{{ '<turn>' + m.content + '<end>' }}{% endfor %}"
    tokenizer = load_tokenizer(write(template, extra_tokens=("<turn>", "<end>", "<other>")))
    turn, end, other = (tokenizer.vocab[token] for token in ("<turn>", "<end>", "<other>"))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "<turn><end><other>"}])
    assert [i for i in ids if i in (turn, end, other)] == [turn, other, end]
    assert tokenizer.decode(ids) == "<turn><turn><end><other><end>"


def test_a_control_token_the_model_itself_can_merge_stays_text(write):
    directory = write("{{ messages[0].content }}")
    with open(f"{directory}/tokenizer.json") as file:
        data = json.load(file)
    data["added_tokens"].append({"id": data["model"]["vocab"]["hello"], "content": "hello", "special": True} | FLAGS)
    with open(f"{directory}/tokenizer.json", "w") as file:
        json.dump(data, file)
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a hello"}])
    assert tokenizer.vocab["hello"] not in ids
    assert tokenizer.decode(ids) == "a hello"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.here }}", "has no attribute"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_refuses_the_request_in_one_line(write, template, said):
    tokenizer = load_tokenizer(write(template))
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.apply_chat_template(CHAT)
    assert said in str(caught.value)
    assert caught.value.param == "messages"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[], ["hello"], [None]])
def test_messages_that_are_none_are_refused(write, messages):
    with pytest.raises(InvalidRequest, match="messages"):
        load_tokenizer(write()).apply_chat_template(messages)


def test_a_model_without_template_refuses_chat(write):
    with pytest.raises(InvalidRequest, match="no chat template"):
        load_tokenizer(write(None)).apply_chat_template(CHAT)


def test_strftime_now_reads_the_given_clock(write):
    backend = Backend.from_file(f"{write()}/tokenizer.json")
    clock = lambda: datetime.datetime(2024, 7, 26)  # noqa: E731
    tokenizer = Tokenizer(backend, {}, "{{ strftime_now('%d %b %Y') }}", now=clock)
    assert tokenizer.render_chat(CHAT) == "26 Jul 2024"


def test_half_a_surrogate_pair_is_refused(write):
    with pytest.raises(InvalidRequest, match="Unicode"):
        load_tokenizer(write()).encode("a\ud800b")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_put_together_are_the_decoded_text(write, text, skip):
    tokenizer = load_tokenizer(write())
    ids = tokenizer.encode(text)
    stream = tokenizer.stream(skip)
    pieces = [stream.step(i) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces if piece)
    assert "".join(piece or "" for piece in pieces) + stream.flush() == tokenizer.decode(ids, skip)


def test_a_stream_gives_out_unfinished_bytes_only_at_its_end(write):
    tokenizer = load_tokenizer(write())
    ids = tokenizer.encode("日", add_special_tokens=False)
    assert len(ids) == 3
    stream = tokenizer.stream()
    assert [stream.step(i) for i in ids[:2]] == [None, None]
    assert stream.flush() == tokenizer.decode(ids[:2]) == "\ufffd"
    assert stream.flush() == ""


def test_a_stream_of_endless_broken_bytes_does_not_hold_them_for_ever(write):
    tokenizer = load_tokenizer(write())
    broken = tokenizer.encode("日", add_special_tokens=False)[2]
    stream = tokenizer.stream()
    pieces = [stream.step(broken) for _ in range(200)]
    assert "".join(piece or "" for piece in pieces) + stream.flush() == "\ufffd" * 200
    assert sum(piece is not None for piece in pieces) > 3


def test_ids_outside_the_vocabulary_stream_as_nothing(write):
    tokenizer = load_tokenizer(write())
    stream = tokenizer.stream()
    assert [stream.step(10**6), stream.step(-1), stream.flush()] == [None, None, ""]


@pytest.fixture
def metaspace_dir(tmp_path):
    """A tokenizer as Llama 2's: spaces are part of words, a character it does not know is its bytes."""
    from tokenizers import decoders, models, pre_tokenizers, processors

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "▁",
        "h",
        "i",
        "▁h",
        "▁hi",
        "<",
        "/",
        "s",
        ">",
        "\n",
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    merges = [("▁", "h"), ("▁h", "i")]
    backend = Backend(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "<unk>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_metaspace_tokenizers_equal_transformers_and_keep_control_tokens_out(metaspace_dir):
    ours, theirs = load_tokenizer(metaspace_dir), auto_tokenizer(metaspace_dir)
    for text in ["hi hi", " hi", "日 hi</s>hi"]:
        assert ours.encode(text) == theirs(text).input_ids
        stream = ours.stream()
        ids = ours.encode(text)
        assert "".join(stream.step(i) or "" for i in ids) + stream.flush() == theirs.decode(
            ids, skip_special_tokens=True
        )
    ids = ours.apply_chat_template([{"role": "user", "content": "hi</s> hi"}])
    assert [i for i in ids if i in (1, 2)] == [1, 2]
    assert ours.decode(ids) == "hi</s> hi"


def test_an_unfinished_character_after_a_whole_one_streams_as_its_own_bytes(metaspace_dir):
    tokenizer = load_tokenizer(metaspace_dir)
    ids = tokenizer.encode("日日")
    for rest, text in [([], "日��"), (tokenizer.encode("hi"), "日�� hi"), (ids[-1:], "日日")]:
        stream = tokenizer.stream()
        assert "".join(stream.step(i) or "" for i in [*ids[:-1], *rest]) + stream.flush() == text


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", '{"model": {"type": "Mystery"}}', "tokenizer.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: must hold a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": 7}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": "{% for %}"}', "chat template"),
    ],
)
def test_a_broken_tokenizer_is_refused_in_one_line(write, tmp_path, file, content, said):
    directory = write()
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(directory)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}')
    with pytest.raises(ModelError, match="no vocabulary"):  # transformers makes one of special tokens alone
        load_tokenizer(tmp_path)


def test_our_templates_behave_as_jinja_sandboxed_by_transformers(write):
    assert jinja2.__version__ >= "3.1.6"
    template = "{% for m in messages %}\n  {% if true %}\nx{{ {'a<b': 'é'} | tojson }}\n  {% endif %}\n{% endfor %}"
    directory = write(template)
    assert load_tokenizer(directory).render_chat(CHAT) == auto_tokenizer(directory).apply_chat_template(
        CHAT, tokenize=False
    )
