"""Numbers that are not finite end the requests they belong to, and change no bit of any other."""

import numpy as np
import pytest
import serving

from jaxserve.adapters.peft_io import load_peft

pytestmark = pytest.mark.quick_compiles


def weights(seed=1, rank=4):
    path = serving.model_dir()
    return load_peft(serving.adapter_dir(path, seed=seed, rank=rank), serving.model_config(path))


@pytest.fixture
def engine():
    made = serving.engine(serving.model_dir())
    made.put_adapter("good", weights())
    return made


HEALTHY = [(serving.prompt(20, seed=i), (None, "good")[i % 2]) for i in range(5)]


def run(engine, requests, **options):
    params = serving.greedy(20, prompt_logprobs=1, **options)
    prompts, adapters = zip(*requests, strict=True)
    return engine.generate(list(prompts), params, adapter=list(adapters))


def healthy_bits(engine):
    return [serving.bits(output) for output in run(engine, HEALTHY)]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_adapter_that_is_not_finite_ends_only_its_own_requests(engine, value, layer):
    before = healthy_bits(engine)
    engine.core.pool.drop_cache()
    engine.put_adapter("sick", serving.poison(weights(), value, layer))
    ill = [(serving.prompt(length, seed=9), "sick") for length in (1, 17, 70)]
    outputs = run(engine, [ill[0], *HEALTHY[:2], ill[1], *HEALTHY[2:], ill[2]])
    sick = [outputs[0], outputs[3], outputs[-1]]
    assert [(o.finish_reason, o.token_ids, o.error is None) for o in sick] == [("error", [], False)] * 3
    assert [serving.bits(o) for o in outputs if o not in sick] == before
    serving.check_idle(engine)


def test_every_choice_of_such_a_request_ends(engine):
    engine.put_adapter("sick", serving.poison(weights()))
    (output,) = engine.generate([serving.prompt(30)], serving.greedy(5, n=3), adapter="sick")
    assert [choice.finish_reason for choice in output.outputs] == ["error"] * 3
    serving.check_idle(engine)


def test_pages_it_leaves_behind_serve_others_without_a_trace(engine):
    before = healthy_bits(engine)
    serving.limit(engine, pages=12)
    engine.put_adapter("sick", serving.poison(weights()))
    for turn in range(3):  # every page of the pool has held its numbers before others get it
        outputs = run(engine, [(serving.prompt(100, seed=turn), "sick"), (serving.prompt(64, seed=turn), "sick")])
        assert [output.finish_reason for output in outputs] == ["error"] * 2
        assert engine.core.pool.num_cached == 0
        assert healthy_bits(engine) == before
        engine.core.pool.drop_cache()
    assert engine.core.pool.num_free == 12


def test_its_pages_never_enter_the_prefix_cache(engine):
    engine.put_adapter("sick", serving.poison(weights()))
    prompt = serving.prompt(100)
    for _ in range(2):
        (output,) = run(engine, [(prompt, "sick")])
        assert (output.finish_reason, output.num_cached_tokens) == ("error", 0)
    engine.put_adapter("sick", weights())  # mended under the same name
    (mended,) = run(engine, [(prompt, "sick")])
    (twin,) = run(engine, [(prompt, "good")])
    assert serving.bits(mended) == serving.bits(twin)


BAD_TOKEN = 77


@pytest.fixture
def with_sick_token(engine):
    """The embedding of one token is not finite: the loader would not have let it pass."""
    params = engine.core.params
    engine.core.params = params | {"embed": params["embed"].at[BAD_TOKEN, 3].set(np.inf)}
    return engine


def test_a_request_that_turns_bad_in_mid_flight_keeps_what_it_has(with_sick_token):
    engine = with_sick_token
    prompt = next(p for p in (serving.prompt(40, seed=i) for i in range(99)) if BAD_TOKEN not in p)
    fine = serving.greedy(20, logit_bias={BAD_TOKEN: -100.0})
    fatal = serving.greedy(20, logit_bias={BAD_TOKEN: 100.0})
    (before,) = engine.generate([prompt], fine)
    outputs = engine.generate([prompt, prompt, prompt], [fine, fatal, fine])
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[1].token_ids == [BAD_TOKEN]  # drawn from finite numbers; the row after it is not finite
    assert serving.bits(outputs[0]) == serving.bits(outputs[2]) == serving.bits(before)
    serving.check_idle(engine)


def test_a_prompt_of_bad_numbers_fails_whatever_its_last_row_says(with_sick_token):
    """The bad token lies many rows before the sampled one, in another chunk."""
    engine = with_sick_token
    prompt = [BAD_TOKEN, *serving.prompt(100)]
    (output,) = engine.generate([prompt], serving.greedy(5))
    assert (output.finish_reason, output.token_ids) == ("error", [])
    assert engine.core.pool.num_cached == 0
