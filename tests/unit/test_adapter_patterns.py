"""Patterns from untrusted files: the same answers as ``re``, and never more time than allowed."""

import contextlib
import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_adapters import TinyShape

from jaxserve.adapters.patterns import MAX_VISITS, Budget, Pattern, PatternError, first_keys, matching
from jaxserve.adapters.weights import module_names

NAMES = list(module_names(TinyShape(num_layers=32)))

PIECES = ["a", "b", ".", "_", "(", "(?:", ")", "|", "*", "+", "?", "{", "1", "2", ",", "}", "[", "]", "^", "$", "-"]
PIECES += [
    r"\b",
    r"\B",
    r"\d",
    r"\w",
    r"\W",
    r"\.",
    r"\-",
    "{1,2}",
    "{,2}",
    "{2}",
    "[^a]",
    "[a-b]",
    "(?P<n>",
    "*?",
    "\\",
]


def compiled(text):
    try:
        return Pattern(text, Budget()), ""
    except PatternError as error:
        return None, str(error)


@settings(max_examples=1500, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=9).map("".join),
    st.lists(st.text("ab._1{}-", min_size=1, max_size=6), min_size=1, max_size=5),
)
def test_patterns_answer_as_re_does_or_are_refused(text, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            known = re.compile(text)
        except re.error:
            known = None
    pattern, reason = compiled(text)
    if pattern is None:
        assert known is None or "not supported" in reason
        return
    assert known is not None
    for name in names:
        assert pattern.fullmatch(name) == (known.fullmatch(name) is not None)


@pytest.mark.parametrize(
    "text",
    [
        r"[+-\.]",
        r"[\.-9]",
        r"[\n-\r]",
        r"[\d-]",
        r"[^\W-]",
        r"[]a]",
        r"[^]a-]",
        r"[\b\D]",
        r"[9-\.]",
        r"[\d-z]",
        r"[+-\d]",
    ],
)
def test_sets_hold_the_characters_that_they_hold_in_re_or_are_refused_as_there(text):
    pattern, _ = compiled(text)
    try:
        known = re.compile(text)
    except re.error:
        known = None
    assert (pattern is None) == (known is None)
    for character in map(chr, range(128)):
        assert known is None or pattern.fullmatch(character) == (known.fullmatch(character) is not None)


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(q_proj|v_proj)$",
        r"model\.layers\.([0-9]|1[0-5])\..*_proj",
        r"^model\.layers\.\d+\.(?:self_attn|mlp)\.(?:[qv]|gate)_proj",
        r".*(?:language|text|layers).*?(?:self_attn|attn|mlp|ffn).*?(?:q_proj|down_proj).*?",
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|up_proj)))",
        r"model\.layers\.1\d?\.mlp\.[^d].*",
    ],
)
def test_patterns_people_write_select_the_modules_that_re_selects(text):
    assert matching(text, NAMES, Budget()) == {name for name in NAMES if re.fullmatch(text, name)} != set()


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+$",
        "(.*)*(.*)*(.*)*x",
        "(.*.*.*.*.*.*.*.*.*.*.*)*[^j]",
        "((){9999}){9999}",
        "(a{0,900}){0,900}",
        ".?" * 250,
        "(" * 250 + ")" * 250,
        "(x+x+)+y",
        "[" * 500,
        "(" * 500,
        "a" * 513,
        "(.?){0,900}",
        "((a|a)|(a|a))*" * 30,
    ],
)
def test_no_pattern_takes_long(text):
    start = time.process_time()
    budget = Budget()
    with contextlib.suppress(PatternError):
        matching(text, NAMES, budget)
    assert time.process_time() - start < 0.25  # 30 ms alone; machines are shared
    assert budget.left > -MAX_VISITS / 10


@pytest.mark.parametrize("text", ["(?=a)b", "(?!a)b", "(?<=a)b", "(?<!a)b", r"(a)\1", "(?i)a", "(?>a)", "a++", r"\x41"])
def test_constructs_without_an_automaton_are_refused_by_name(text):
    with pytest.raises(PatternError, match="not supported"):
        Pattern(text, Budget())


KEYS = ["q_proj", "layers.1.self_attn.q_proj", r"^model\.layers\.0\.mlp\.up_proj", "up.proj", r".*\.1[0-9]?\.mlp\..*"]
KEYS += [
    "v.....",
    "layers.2.self_attn.v.proj",
    "proj.",
    "model.layers.3.mlp.down_proj",
    "proj",
    "1.mlp.gate_proj",
    "k_proj|v_proj",
    "",
    r"layers\.(4|5).*",
    "mlp",
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(KEYS), unique=True, max_size=6))
def test_the_first_key_that_matches_is_the_one_peft_takes(keys):
    expected = {}
    for name in NAMES:
        for key in keys:
            if re.match(rf"(.*\.)?({key})$", name):  # peft.utils.other.get_pattern_key
                expected[name] = key
                break
    assert first_keys(keys, NAMES, Budget()) == expected


def test_a_key_cannot_leave_the_group_around_it():
    with pytest.raises(PatternError, match="unbalanced"):
        first_keys(["q_proj)|(v_proj"], NAMES, Budget())


def test_a_table_with_every_module_of_a_large_model_is_affordable():
    names = list(module_names(TinyShape(num_layers=120)))
    budget = Budget()
    assert first_keys(names, names, budget) == {name: name for name in names}
    assert budget.left > MAX_VISITS / 4
