"""Sampling parameters through the whole engine, against transformers' logits and plain numpy.

Shapes: T tokens, V vocab.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving
import tiny_models

from jaxserve.engine.state import EngineState, write_slot
from jaxserve.sampling import SamplingParams
from pallas_kernels.token_sampling import COUNT_MASK, PROMPT_BIT
from pallas_kernels.token_sampling.reference import kept_tokens, penalised

pytestmark = pytest.mark.quick_compiles

PROMPT = serving.prompt(23, seed=5)


@pytest.fixture(scope="module")
def engine():
    return serving.engine(serving.model_dir())


def one(engine, prompt=PROMPT, **options):
    (output,) = engine.generate([prompt], SamplingParams(**options))
    serving.check_idle(engine)
    return output


def reference_tokens(num_tokens, edit):
    """Greedy on transformers' logits after ``edit(logits [V], outputs so far)``; logits must not be close."""
    outputs = []
    for _ in range(num_tokens):
        logits_V = tiny_models.reference_logits(serving.model_dir(), PROMPT + outputs)[-1].astype(np.float64)
        edited_V = edit(logits_V, outputs)
        outputs.append(int(edited_V.argmax()))
    return outputs


@pytest.mark.parametrize(
    ("repetition", "presence", "frequency"), [(1.5, 0, 0), (0.8, 0, 0), (1, 2, 0), (1, 0, 1.1), (1.2, -0.4, 0.3)]
)
def test_penalties_count_prompt_and_outputs(engine, repetition, presence, frequency):
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    penalties = dict(zip(names, map(float, (repetition, presence, frequency)), strict=True))
    output = one(engine, max_tokens=30, temperature=0.0, ignore_eos=True, **penalties)
    edit = lambda logits_V, outputs: penalised(logits_V, PROMPT, outputs, repetition, presence, frequency)  # noqa: E731
    assert output.token_ids == reference_tokens(30, edit)


def test_a_slot_forgets_the_counts_of_the_request_before(engine):
    params = {"max_tokens": 20, "temperature": 0.0, "repetition_penalty": 1.5, "ignore_eos": True}
    first = one(engine, **params)
    one(engine, serving.prompt(40, seed=8), **params)  # the only one: in the same slot
    assert one(engine, **params).token_ids == first.token_ids


def test_a_count_that_is_full_stays_so_and_is_no_prompt_s(engine):
    params = SamplingParams(
        max_tokens=8, temperature=0.0, ignore_eos=True, frequency_penalty=1e-3, logit_bias={5: 100.0}
    )
    engine.add_request([1, 2, 3], params)
    while engine.has_work():
        engine.step()
        core = engine.core
        count_BV = core.state.count_BV
        most_BV = jnp.where(count_BV & COUNT_MASK == 1, COUNT_MASK - 2, count_BV)  # the first token's
        core.state = replace(core.state, count_BV=jax.device_put(most_BV.astype(count_BV.dtype), count_BV.sharding))
    assert int(jnp.max(core.state.count_BV[:, 5])) == COUNT_MASK
    serving.check_idle(engine)


def test_a_sequence_that_comes_back_with_more_outputs_than_a_count_holds_has_a_full_one():
    whole = [jnp.zeros((2, 4), dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32)]
    state = EngineState([], None, jnp.zeros(2, jnp.int32), jnp.zeros((2, 8), jnp.int16), *whole, None)
    kind_S = jnp.full(3 * COUNT_MASK, 1, jnp.int32).at[:2].set(2)
    state = write_slot(state, jnp.int32(1), jnp.full_like(kind_S, 5).at[0].set(3), kind_S, *(x[0] for x in whole))
    wanted = [0, 0, 0, PROMPT_BIT, 0, PROMPT_BIT | COUNT_MASK, 0, 0]
    assert state.count_BV.tolist() == [[0] * 8, wanted]


def test_logit_bias_is_added_to_the_logits(engine):
    bias = {3: 4.0, 90: -100.0, 250: 2.5, 0: 3.0, 299: 3.5}

    def edit(logits_V, outputs):
        logits_V[list(bias)] += list(bias.values())
        return logits_V

    output = one(engine, max_tokens=20, temperature=0.0, ignore_eos=True, logit_bias=bias)
    assert output.token_ids == reference_tokens(20, edit)


def test_a_bias_against_all_tokens_leaves_a_finite_choice(engine):
    free = one(engine, max_tokens=5, temperature=0.0, ignore_eos=True)
    output = one(engine, max_tokens=5, temperature=0.0, ignore_eos=True, logit_bias=dict.fromkeys(range(300), -100.0))
    assert output.token_ids == free.token_ids
    assert output.finish_reason == "length"


def test_log_probabilities_are_the_models_own_whatever_is_done_to_the_logits(engine):
    plain = one(engine, max_tokens=1, temperature=0.0, logprobs=5)
    steered = one(engine, max_tokens=1, temperature=0.7, logit_bias={9: 100.0}, repetition_penalty=2.0, logprobs=5)
    assert steered.token_ids == [9]
    assert next(iter(steered.logprobs[0])) == 9
    assert {k: v for k, v in steered.logprobs[0].items() if k != 9} == plain.logprobs[0]


@pytest.mark.parametrize("num_stops", [1, 5])
def test_min_tokens_holds_every_stop_token_back(engine, num_stops):
    free = one(engine, max_tokens=20, temperature=0.0, ignore_eos=True).token_ids
    stops = list(dict.fromkeys(free))[:num_stops]

    def edit(logits_V, outputs):
        if len(outputs) < 6:
            logits_V[stops] = -np.inf
        return logits_V

    output = one(engine, max_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=stops, min_tokens=6)
    expected = reference_tokens(20, edit)
    end = next((i + 1 for i, token in enumerate(expected) if token in stops), 20)
    assert output.token_ids == expected[:end]
    assert output.finish_reason == ("stop" if end < 20 or expected[-1] in stops else "length")
    assert end > 6


def test_a_stop_token_ends_the_request_and_is_its_last_token(engine):
    free = one(engine, max_tokens=20, temperature=0.0, ignore_eos=True).token_ids
    for stop in dict.fromkeys(free):
        output = one(engine, max_tokens=20, temperature=0.0, stop_token_ids=[stop], ignore_eos=True)
        end = free.index(stop) + 1
        assert (output.token_ids, output.finish_reason, output.stop_reason) == (free[:end], "stop", stop)


def test_ignore_eos_ignores_the_models_ends_and_nothing_else():
    path = serving.model_dir()
    free = one(serving.engine(path), max_tokens=12, temperature=0.0, ignore_eos=True).token_ids
    engine = serving.engine(path, eos=[free[4], free[7]])
    end = min(free.index(free[4]), free.index(free[7])) + 1
    output = one(engine, max_tokens=12, temperature=0.0)
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (free[:end], "stop", free[end - 1])
    assert one(engine, max_tokens=12, temperature=0.0, ignore_eos=True).token_ids == free
    both = one(engine, max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=[free[9]])
    assert both.token_ids == free[: free.index(free[9]) + 1]


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 5e-324, 1e-6, 1e-5])
def test_a_tiny_temperature_is_greedy(engine, temperature):
    greedy = one(engine, max_tokens=10, temperature=0.0, ignore_eos=True)
    output = one(engine, max_tokens=10, temperature=temperature, seed=3, ignore_eos=True)
    assert output.token_ids == greedy.token_ids


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_filters_that_leave_one_token_are_greedy(engine, options):
    greedy = one(engine, max_tokens=10, temperature=0.0, ignore_eos=True)
    assert one(engine, max_tokens=10, temperature=2.0, seed=3, ignore_eos=True, **options).token_ids == greedy.token_ids


@pytest.mark.parametrize("options", [{"top_k": -1}, {"top_k": 0}, {"top_k": 300}, {"top_k": 2**31 - 1}])
def test_a_top_k_that_keeps_all_changes_nothing(engine, options):
    free = one(engine, max_tokens=10, temperature=1.3, seed=3, ignore_eos=True)
    assert one(engine, max_tokens=10, temperature=1.3, seed=3, ignore_eos=True, **options).token_ids == free.token_ids


def test_drawn_tokens_stay_within_the_filters(engine):
    params = [SamplingParams(max_tokens=6, temperature=1.5, top_k=9, top_p=0.8, min_p=0.05, seed=i) for i in range(16)]
    for output in engine.generate([PROMPT] * 16, params):
        logits_TV = tiny_models.reference_logits(serving.model_dir(), PROMPT + output.token_ids)
        for i, token in enumerate(output.token_ids):
            assert kept_tokens(logits_TV[len(PROMPT) - 1 + i] / 1.5, 9, 0.8, 0.05)[token]


def draws(output):
    return [choice.token_ids for choice in output.outputs]


def test_a_seed_fixes_the_tokens_and_another_changes_them(engine):
    params = {"max_tokens": 12, "temperature": 1.5, "ignore_eos": True}
    first = draws(one(engine, seed=11, **params))
    assert draws(one(engine, seed=11, **params)) == first
    others = [draws(one(engine, seed=seed, **params)) for seed in (0, 12, -11, 11 + 2**32, 2**63, 2**64 - 1, -(2**63))]
    distinct = {str(tokens) for tokens in [first, *others]}
    assert len(distinct) == 7  # 2**63 and -(2**63) are the same 64 bits


def test_requests_without_a_seed_differ_and_engines_of_one_seed_agree(engine):
    params = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
    outputs = engine.generate([PROMPT] * 6, params)
    assert len({str(output.token_ids) for output in outputs}) == 6
    twins = [serving.engine(serving.model_dir(), seed=seed) for seed in (5, 5, 6)]
    tokens = [[output.token_ids for output in twin.generate([PROMPT] * 3, params)] for twin in twins]
    assert tokens[0] == tokens[1] != tokens[2]


def test_choices_are_distinct_and_do_not_depend_on_how_many_there_are(engine):
    params = {"max_tokens": 12, "temperature": 1.5, "seed": 2, "ignore_eos": True, "logprobs": 1}
    eight = one(engine, n=8, **params)
    assert len({str(tokens) for tokens in draws(eight)}) == 8
    for n in (1, 3):
        assert draws(one(engine, n=n, **params)) == draws(eight)[:n]


def test_greedy_choices_are_equal(engine):
    output = one(engine, n=4, max_tokens=20, temperature=0.0, ignore_eos=True)
    assert draws(output) == [draws(output)[0]] * 4


@pytest.mark.parametrize("count", [None, 0, 1, 5])
def test_log_probabilities_have_the_drawn_token_first_and_the_top(engine, count):
    output = one(engine, max_tokens=6, temperature=1.5, seed=1, logprobs=count, prompt_logprobs=count, ignore_eos=True)
    if count is None:
        assert output.logprobs is None
        assert output.prompt_logprobs is None
        return
    assert len(output.logprobs) == 6
    assert len(output.prompt_logprobs) == len(PROMPT)
    assert output.prompt_logprobs[0] is None
    tokens = PROMPT[1:] + output.token_ids
    for token, entry in zip(tokens, output.prompt_logprobs[1:] + output.logprobs, strict=True):
        assert next(iter(entry)) == token
        assert count <= len(entry) <= count + 1
        assert all(value <= 0 for value in entry.values())
        top = [value for key, value in entry.items() if key != token]
        assert top == sorted(top, reverse=True)


def test_prompt_log_probabilities_are_computed_even_for_a_cached_prompt(engine):
    first = one(engine, serving.prompt(70), max_tokens=2, temperature=0.0, prompt_logprobs=3)
    assert one(engine, serving.prompt(70), max_tokens=2, temperature=0.0).num_cached_tokens == 64
    again = one(engine, serving.prompt(70), max_tokens=2, temperature=0.0, prompt_logprobs=3)
    assert again.prompt_logprobs == first.prompt_logprobs
    assert None not in again.prompt_logprobs[1:]


def test_a_prompt_of_one_token_has_no_prompt_log_probability(engine):
    assert one(engine, [7], max_tokens=1, prompt_logprobs=2).prompt_logprobs == [None]


@pytest.mark.slow
def test_an_engine_without_top_log_probabilities_still_gives_the_drawn_tokens():
    engine = serving.engine(serving.model_dir(), max_logprobs=0, enable_lora=False)
    output = one(engine, max_tokens=3, temperature=0.0, logprobs=0, prompt_logprobs=0)
    assert [len(entry) for entry in output.logprobs] == [1, 1, 1]
    assert len(output.prompt_logprobs) == len(PROMPT)
