"""What a request may ask for, and how it is refused."""

import math
from fractions import Fraction

import numpy as np
import pytest

from jaxserve.errors import InvalidRequest, ModelError
from jaxserve.sampling import SamplingParams, default_params

V = 100
REFUSED = {
    "max_tokens": [0, -1, 1.5, "5", True, 2**31, 2**63],
    "min_tokens": [-1, 1.0, None, 17],
    "n": [0, -1, 17, 10**9, 1.0, True],
    "temperature": [-0.1, 2.1, math.nan, math.inf, "hot", None, True, 10**400, Fraction(10**400), np.float32(3)],
    "top_p": [0, 0.0, -1, 1.1, math.nan, "1"],
    "top_k": [-2, 2**40, 1.0, None, True],
    "min_p": [-0.1, 2, math.nan],
    "repetition_penalty": [0, -1, 10.5, math.inf],
    "presence_penalty": [-2.1, 3, math.nan],
    "frequency_penalty": [-2.1, 3, math.nan],
    "seed": [1.5, "7", True, 2**64, -(2**63) - 1, np.float64(1), np.bool_(True), np.arange(2)],
    "logprobs": [-1, 21, True, 1.0],
    "prompt_logprobs": [-1, 21, True],
    "stop": [[""], "", "x" * 257, ["a"] * 17, [3], 3, b"x", {"a": 1}],
    "stop_token_ids": [[-1], [V], [1.5], [True], ["1"], 3, "3", {3: 1}],
    "logit_bias": [{-1: 1.0}, {V: 1.0}, {"1": 1.0}, {1: 101.0}, {1: -101}, {1: math.nan}, {1: "1"}, [1], "x"],
    "ignore_eos": [1, "yes", None],
    "include_stop_str_in_output": [0, "no"],
    "skip_special_tokens": [None, "true"],
}
ACCEPTED = {
    "max_tokens": [1, None, 2**31 - 1],
    "min_tokens": [0, 16],
    "n": [1, 16],
    "temperature": [0, 0.0, 1e-30, 5e-324, 2, 2.0],
    "top_p": [1, 1.0, 1e-9],
    "top_k": [-1, 0, 1, V, 2**31 - 1],
    "min_p": [0, 1.0],
    "repetition_penalty": [1e-3, 10],
    "presence_penalty": [-2, 2.0],
    "frequency_penalty": [-2, 2.0],
    "seed": [None, 0, -1, 2**63, 2**64 - 1, -(2**63)],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "stop": [None, [], "x", ["a"] * 16, "é\n"],
    "stop_token_ids": [None, [], [0, V - 1], {5, 6}, range(3)],
    "logit_bias": [None, {}, {0: -100, V - 1: 100.0}, dict.fromkeys(range(V), -100.0)],
    "ignore_eos": [True, False],
    "include_stop_str_in_output": [True, False],
    "skip_special_tokens": [True, False],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in REFUSED for value in REFUSED[field]])
def test_a_bad_value_is_refused_with_its_field_and_limit(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value}).validate(V)
    assert caught.value.param == field
    assert field in str(caught.value)
    assert "must be" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in ACCEPTED for value in ACCEPTED[field]])
def test_a_value_at_the_limit_is_accepted(field, value):
    SamplingParams(**{field: value}).validate(V)


def test_numbers_of_numpy_are_pythons():
    params = SamplingParams(
        max_tokens=np.int32(4),
        temperature=np.float32(0.5),
        seed=np.uint64(2**64 - 1),
        stop_token_ids=[np.int64(3)],
        logit_bias={np.int16(5): np.float16(-1)},
    )
    params.validate(V)
    same = SamplingParams(max_tokens=4, temperature=0.5, seed=2**64 - 1, stop_token_ids=[3], logit_bias={5: -1.0})
    assert repr(params) == repr(same)


def test_every_field_is_tested():
    assert set(SamplingParams.__dataclass_fields__) == set(REFUSED) == set(ACCEPTED)


def test_too_many_biases_are_refused():
    bias = dict.fromkeys(range(301), 1.0)
    with pytest.raises(InvalidRequest, match="301 entries"):
        SamplingParams(logit_bias=bias).validate(1000)


def test_more_min_tokens_than_max_tokens_are_refused():
    with pytest.raises(InvalidRequest, match="min_tokens is '6'; it must be at most max_tokens 5"):
        SamplingParams(min_tokens=6, max_tokens=5).validate(V)
    SamplingParams(min_tokens=6, max_tokens=None).validate(V)


def test_limits_of_the_engine_replace_the_defaults():
    SamplingParams(logprobs=30).validate(V, max_logprobs=30)
    with pytest.raises(InvalidRequest, match="between 0 and 5"):
        SamplingParams(logprobs=6).validate(V, max_logprobs=5)


def test_one_stop_string_is_a_tuple_of_one():
    assert SamplingParams(stop="x").stops == ("x",)
    assert SamplingParams(stop=["x", "y"]).stops == ("x", "y")
    assert SamplingParams().stops == ()


@pytest.mark.parametrize(
    ("field", "value"), [("repetition_penalty", 1.1), ("presence_penalty", -0.1), ("frequency_penalty", 0.1)]
)
def test_penalties_off_their_neutral_value_are_in_use(field, value):
    assert SamplingParams(**{field: value}).uses_penalties
    assert not SamplingParams().uses_penalties


def test_a_model_recommends_how_to_draw():
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "max_length": 4096, "do_sample": True}
    assert default_params(generation) == SamplingParams(temperature=0.6, top_p=0.9)
    assert default_params({"temperature": 0.6, "do_sample": False}) == SamplingParams(temperature=0.0)
    assert default_params({}) == SamplingParams()
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p is '2'; it must be above 0.0"):
        default_params({"top_p": 2})
