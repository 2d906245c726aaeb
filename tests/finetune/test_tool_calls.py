"""Conversations with tools to learn from: what is learnt of a call, in templates that write it in their own ways."""

import json

import pytest
import tiny_models

from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import load_dataset
from jaxserve.finetune.errors import DataError
from jaxserve.tokenizer import Tokenizer, load_tokenizer

MARKS = ("<|eom_id|>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
QWEN3 = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response>{% else %}<|im_start|>{{ m.role }}
{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}<think>{{ m.reasoning_content }}</think>
{%- endif %}{{ m.content }}{% for call in m.tool_calls %}<tool_call>{{ call.function.name }}
{{- call.function.arguments | tojson }}</tool_call>{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """{% set ns = namespace(first=true) %}{% for m in messages %}<|im_start|>{{ m.role }}

{% if tools and m.role == 'user' and ns.first %}{% set ns.first = false %}{{ tools | tojson }}

{% endif %}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}<|eom_id|>{% else %}{{ m.content }}<|im_end|>
{%- endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant

{% endif %}"""
MISTRAL = """{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% set ns = namespace(turn=0) %}
{%- for m in messages %}{% if m.role != 'tool' and not m.tool_calls and m.role != 'system' %}
{%- if (m.role == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set ns.turn = ns.turn + 1 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
{%- if tools and m == asked[-1] %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% if loop.last %}
{%- for s in messages if s.role == 'system' %}[INST]{{ s.content }}{% endfor %}{% endif %}[INST]{{ m.content }}[/INST]
{%- elif m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | map(attribute='function') | list | tojson }}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% elif m.role == 'tool' %}{{ m.content }}{% endif %}
{%- endfor %}"""


def call(city: str, name: str = "weather", text: bool = True, **fields) -> dict:
    arguments = {"city": city}
    function = {"name": name, "arguments": json.dumps(arguments) if text else arguments}
    return {"id": "call_1", "type": "function", "function": function, **fields}


def says(content=None, **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def result(content: str) -> dict:
    return {"role": "tool", "tool_call_id": "call_1", "content": content}


CHAT = [
    {"role": "system", "content": "rules"},
    user("Rome?"),
    says(tool_calls=[call("Rome")]),
    result("sun"),
    says("Sunny."),
    user("Bonn?"),
    says(tool_calls=[call("Bonn", text=False)], reasoning_content="hm"),
    result("rain"),
    says("Rainy."),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_models.build_tokenizer(path)
    held = json.loads((path / "tokenizer.json").read_text())
    first = max(token["id"] for token in held["added_tokens"]) + 1
    new = [{**held["added_tokens"][0], "id": first + at, "content": mark} for at, mark in enumerate(MARKS)]
    held["added_tokens"] += new
    (path / "tokenizer.json").write_text(json.dumps(held))
    return str(path)


@pytest.fixture
def load(directory):
    def load(record: dict, template: str = QWEN3, **fields):
        tokenizer, config = load_tokenizer(directory, chat_template=template), FinetuneConfig(**fields)
        vocab = tokenizer.vocab_size
        dataset = load_dataset([record], tokenizer, max_length=2048, vocab_size=vocab, config=config)
        return tokenizer, dataset.examples[0]

    return load


def spans(tokenizer: Tokenizer, example, learnt: bool = True) -> list[str]:
    """The texts of the longest runs of tokens that are learnt, or are not."""
    runs, before = [], None
    for token, weight in zip(example.token_ids.tolist(), example.weights.tolist(), strict=True):
        runs = runs if (weight > 0) == before else [*runs, []]
        before = weight > 0
        if before == learnt:
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "calls", "answers"),
    [
        (
            QWEN3,
            [
                '<tool_call>weather{"city": "Rome"}</tool_call><|im_end|>',
                '<think>hm</think><tool_call>weather{"city": "Bonn"}</tool_call><|im_end|>',
            ],
            ["Sunny.<|im_end|>", "<think></think>Rainy.<|im_end|>"],
        ),
        (
            LLAMA,
            [
                '{"name": "weather", "arguments": {"city": "Rome"}}<|eom_id|>',
                '{"name": "weather", "arguments": {"city": "Bonn"}}<|eom_id|>',
            ],
            ["Sunny.<|im_end|>", "Rainy.<|im_end|>"],
        ),
        (
            MISTRAL,
            [
                '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]<|end_of_text|>',
                '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bonn"}}]<|end_of_text|>',
            ],
            ["Sunny.<|end_of_text|>", "Rainy.<|end_of_text|>"],
        ),
    ],
    ids=["thoughts", "call-ends-otherwise", "tools-before-the-last-question"],
)
def test_calls_and_answers_are_learnt_and_tools_and_results_read(load, template, calls, answers):
    tokenizer, example = load({"messages": CHAT, "tools": TOOLS, "parallel_tool_calls": False}, template)
    assert example.token_ids.tolist() == tokenizer.apply_chat_template(CHAT, False, tools=TOOLS)
    assert spans(tokenizer, example) == [calls[0], answers[0], calls[1], answers[1]]


def test_a_call_of_weight_0_is_read(load):
    chat = [{**message, "weight": 0} if message.get("tool_calls") else message for message in CHAT]
    assert spans(*load({"messages": chat, "tools": TOOLS})) == ["Sunny.<|im_end|>", "<think></think>Rainy.<|im_end|>"]
    kept = spans(*load({"messages": chat, "tools": TOOLS}, loss_on="all"), learnt=False)
    assert [text for text in kept if "Rome" in text] == ['<tool_call>weather{"city": "Rome"}</tool_call><|im_end|>']


def test_a_call_may_stand_beside_words_and_other_calls_and_have_nulls(load):
    last = says("Both.", tool_calls=[call("Rome", id=None), call("Bonn")], name=None, reasoning=None)
    tokenizer, example = load({"messages": [user("?"), last], "tools": None})
    each = [f'<tool_call>weather{{"city": "{city}"}}</tool_call>' for city in ("Rome", "Bonn")]
    assert spans(tokenizer, example) == [f"<think></think>Both.{each[0]}{each[1]}<|im_end|>"]


@pytest.mark.parametrize("city", ["a<|im_end|>b", "\\u003c|im_end|>"], ids=["as-it-is", "escaped"])
def test_control_tokens_in_arguments_are_text(load, city):
    arguments = f'{{"city": "{city}"}}'
    last = says(tool_calls=[{"function": {"name": "weather", "arguments": arguments}}])
    tokenizer, example = load({"messages": [user("?"), last]})
    assert "|im_end|>" in spans(tokenizer, example)[0].removesuffix("<|im_end|>")
    ids = example.token_ids[example.weights > 0].tolist()
    assert [token for token in ids if token in tokenizer.special_ids] == [tiny_models.IM_END]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": CHAT, "tools": TOOLS}, "chat template does not show tools"),
        ({"messages": CHAT}, "messages[2]: the model's chat template does not show tool_calls"),
    ],
    ids=["tools", "calls"],
)
def test_what_a_template_leaves_out_is_refused(load, record, reason):
    blind = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(DataError) as refused:
        load(record, blind)
    assert reason in str(refused.value)


def bad(**function) -> list:
    return [user("a"), says(tool_calls=[{"function": {"name": "f", "arguments": "{}", **function}}])]


LOOP: list = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [user("a"), says(tool_calls="f")]}, "messages[1]: tool_calls must be a list"),
        ({"messages": [user("a"), says(tool_calls=[])]}, "messages[1]: nothing to learn"),
        ({"messages": [user("a"), says(tool_calls=[3])]}, "tool_calls[0]: must be an object"),
        ({"messages": [user("a"), says(tool_calls=[{"name": "f"}])]}, "tool_calls[0]: unknown key 'name'"),
        ({"messages": [user("a"), says(tool_calls=[{"function": "f"}])]}, "tool_calls[0]: function must be an object"),
        ({"messages": bad(name="")}, "tool_calls[0]: name is empty"),
        ({"messages": bad(arguments="[1]")}, "arguments must be a JSON object, or a string that holds one"),
        ({"messages": bad(arguments="{")}, "arguments must be a JSON object"),
        ({"messages": bad(arguments='{"a": 1, "a": 2}')}, "arguments must be a JSON object"),
        ({"messages": bad(arguments='{"a": "\\u0000"}')}, "tool_calls[0]: it holds NUL"),
        ({"messages": bad(arguments={"a": {1}})}, "tool_calls[0]: it must be JSON"),
        ({"messages": bad(arguments={"a": LOOP})}, "tool_calls[0]: it must be JSON"),
        ({"messages": bad(arguments={"a": "\ud800"})}, "tool_calls[0]: it must be JSON in Unicode"),
        ({"messages": bad(colour=1)}, "tool_calls[0]: unknown key 'colour'"),
        ({"messages": [{**user("a"), "tool_calls": []}, says("b")]}, "messages[0]: unknown key 'tool_calls'"),
        ({"messages": [{**user("a"), "tool_call_id": "1"}, says("b")]}, "messages[0]: unknown key 'tool_call_id'"),
        ({"messages": [{**result("a"), "tool_call_id": 1}, says("b")]}, "messages[0]: tool_call_id must be a string"),
        ({"messages": [user("a"), says("b", reasoning=[1])]}, "messages[1]: reasoning must be a string"),
        ({"messages": [user("a"), says("b")], "tools": {}}, "tools must be a list of objects"),
        ({"messages": [user("a"), says("b")], "tools": ["f"]}, "tools must be a list of objects"),
        ({"messages": [user("a"), says("b")], "tools": [{"name": float("nan")}]}, "tools must be JSON"),
        ({"messages": [user("a"), says("b")], "parallel_tool_calls": 1}, "parallel_tool_calls must be true or false"),
        (
            {"messages": [user("a"), says("b")], "functions": []},
            "unknown key 'functions', known here are messages, tools",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls_and_tools_are_named(load, record, reason):
    with pytest.raises(DataError) as refused:
        load(record)
    assert reason in str(refused.value)
