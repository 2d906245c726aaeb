"""Filters, penalties and draws against numpy and transformers.

Shapes: R rows, V vocabulary.
"""

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.token_sampling import (
    PROMPT_BIT,
    VocabShard,
    filter_mask,
    log_normaliser,
    penalise,
    pick,
    sample,
    top_tokens,
)
from pallas_kernels.token_sampling.cases import BENCH_CASES, CASES, SamplingCase
from pallas_kernels.token_sampling.reference import kept_tokens, penalised

WHOLE = VocabShard()
CHI_SQUARE_15 = 44.3  # a chi-square variable of 15 degrees of freedom is above it once in 10,000 times
run_filter = jax.jit(lambda logits, rows: filter_mask(logits, rows, WHOLE))
run_sample = jax.jit(lambda logits, rows, random, filters: sample(logits, rows, random, filters, WHOLE))

run_filtered = jax.jit(lambda logits, rows: sample(logits, rows, True, True, WHOLE))  # the whole draw in one fusion


def draw(logits_RV, rows, filters=True):
    return np.asarray(run_sample(logits_RV, rows, True, filters))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_filters_keep_what_sorting_keeps(case):
    for seed in range(4):
        logits_RV, rows = case.make(seed)
        scaled_RV = logits_RV / case.temperature
        kept_RV = np.asarray(run_filter(scaled_RV, rows))
        for kept_V, logits_V in zip(kept_RV, np.asarray(scaled_RV), strict=True):
            expected_V = kept_tokens(logits_V, case.top_k, case.top_p, case.min_p)
            np.testing.assert_array_equal(kept_V, expected_V)
            assert kept_V.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_drawn_token_is_one_that_the_filters_keep(case):
    logits_RV, rows = case.make()
    kept_RV = np.asarray(run_filter(logits_RV / case.temperature, rows))
    for position in range(0, 4000, 1000):
        moved = dataclasses.replace(rows, position_R=rows.position_R + position)
        token_R = draw(logits_RV, moved, case.filters)
        assert kept_RV[np.arange(case.num_rows), token_R].all()


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
def test_the_strictest_min_p_draws_the_likeliest_at_any_temperature(temperature):
    case = SamplingCase(name="min-p-1", num_rows=8, vocab_size=64, min_p=1.0, temperature=temperature)
    for seed in range(4):
        logits_RV, rows = case.make(seed)
        np.testing.assert_array_equal(run_filtered(logits_RV, rows), np.asarray(logits_RV).argmax(axis=1))


def test_rows_of_one_call_keep_their_own_parameters():
    cases = [dataclasses.replace(case, vocab_size=300) for case in CASES]
    made = [case.make(i) for i, case in enumerate(cases)]
    logits_RV = jnp.concatenate([logits[:1] / case.temperature for case, (logits, _) in zip(cases, made, strict=True)])
    rows = jax.tree.map(lambda *xs: jnp.concatenate([x[:1] for x in xs]), *(rows for _, rows in made))
    kept_RV = np.asarray(run_filter(logits_RV, rows))
    for case, kept_V, logits_V in zip(cases, kept_RV, np.asarray(logits_RV), strict=True):
        np.testing.assert_array_equal(kept_V, kept_tokens(logits_V, case.top_k, case.top_p, case.min_p), str(case))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_leaves_the_others_alone(bad):
    logits_RV, rows = SamplingCase(name="all", top_k=40, top_p=0.9, min_p=0.01).make()
    sick_RV = logits_RV.at[3, 5].set(bad)
    others = np.arange(32) != 3
    np.testing.assert_array_equal(run_filter(sick_RV, rows)[others], run_filter(logits_RV, rows)[others])
    np.testing.assert_array_equal(draw(sick_RV, rows)[others], draw(logits_RV, rows)[others])


def test_temperature_zero_takes_the_first_of_the_likeliest():
    logits_RV = jnp.asarray([[0.0, 3.0, 3.0, -jnp.inf], [-jnp.inf, -5.0, -jnp.inf, -5.0]], jnp.float32)
    _, rows = SamplingCase(name="greedy", num_rows=2, vocab_size=4, temperature=0.0).make()
    assert draw(logits_RV, rows).tolist() == [1, 1]
    assert np.asarray(run_sample(logits_RV, rows, False, False)).tolist() == [1, 1]


def test_the_smallest_temperature_draws_the_likeliest_token():
    logits_RV, rows = SamplingCase(name="cold", temperature=1e-5, num_rows=64).make()
    np.testing.assert_array_equal(draw(logits_RV, rows), np.asarray(logits_RV).argmax(1))


def chi_square(token_N, probability_V):
    """Pearson's statistic, over tokens gathered into 16 groups of like probability."""
    order = np.argsort(-probability_V)
    bounds = np.searchsorted(np.cumsum(probability_V[order]), np.linspace(0, 1, 17)[1:-1])
    groups = [order[a:b] for a, b in pairwise([0, *bounds, len(order)]) if b > a]
    counts_V = np.bincount(token_N, minlength=len(probability_V))
    statistic = 0.0
    for group in groups:
        expected = probability_V[group].sum() * len(token_N)
        assert expected > 0 or counts_V[group].sum() == 0
        statistic += (counts_V[group].sum() - expected) ** 2 / expected if expected else 0.0
    return statistic


NUM_DRAWS = 100_000


@pytest.mark.parametrize("varying", ["seed", "choice", "position"])
@pytest.mark.parametrize(
    "case",
    [
        SamplingCase(name="plain", vocab_size=64, spread=1.0),
        SamplingCase(name="filtered", vocab_size=64, spread=1.0, temperature=0.7, top_k=30, top_p=0.9, min_p=0.01),
        SamplingCase(name="hot", vocab_size=51, spread=2.0, temperature=1.7),
    ],
    ids=str,
)
def test_100000_draws_follow_the_distribution(case, varying):
    logits_RV, rows = dataclasses.replace(case, num_rows=1).make()
    index_R = np.arange(NUM_DRAWS)
    logits_RV, rows = jax.tree.map(lambda x: jnp.repeat(x, NUM_DRAWS, axis=0), (logits_RV, rows))
    if varying == "seed":
        rows = dataclasses.replace(rows, seed_R2=jnp.asarray(np.stack([index_R, index_R * 0], 1), jnp.uint32))
    else:
        rows = dataclasses.replace(rows, **{f"{varying}_R": jnp.asarray(index_R, jnp.int32)})
    token_R = draw(logits_RV, rows, case.filters)
    scaled_V = np.asarray(logits_RV[0], np.float64) / case.temperature
    kept_V = kept_tokens(scaled_V, case.top_k, case.top_p, case.min_p)
    weight_V = np.where(kept_V, np.exp(scaled_V - scaled_V.max()), 0)
    assert chi_square(token_R, weight_V / weight_V.sum()) < CHI_SQUARE_15


def test_a_wrong_distribution_fails_the_chi_square():
    rng = np.random.default_rng(0)
    probability_V = rng.dirichlet(np.ones(64))
    off_V = probability_V * np.where(np.arange(64) % 2, 1.03, 0.97)
    token_N = rng.choice(64, NUM_DRAWS, p=off_V / off_V.sum())
    assert chi_square(token_N, probability_V) > CHI_SQUARE_15


def test_neighbouring_draws_are_independent():
    """Pairs over (position, position + 1) and (choice, choice + 1) fill the square evenly."""
    _, rows = SamplingCase(name="flat", num_rows=1, vocab_size=4).make()
    rows = jax.tree.map(lambda x: jnp.repeat(x, NUM_DRAWS, axis=0), rows)
    logits_RV = jnp.zeros((NUM_DRAWS, 4), jnp.float32)
    index_R = np.arange(NUM_DRAWS)
    for pair in (
        {"position_R": index_R // 2 * 7 + index_R % 2},
        {"position_R": index_R // 2, "choice_R": index_R % 2},
    ):
        token_R = draw(logits_RV, dataclasses.replace(rows, **{k: jnp.asarray(v, jnp.int32) for k, v in pair.items()}))
        both = token_R[::2] * 4 + token_R[1::2]
        assert chi_square(both, np.full(16, 1 / 16)) < CHI_SQUARE_15


def test_a_draw_depends_on_seed_choice_and_position_alone():
    logits_RV, rows = SamplingCase(name="plain", num_rows=16).make()
    logits_RV = jnp.repeat(logits_RV[:1], 16, axis=0)
    token_R = draw(logits_RV, rows)
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(draw(logits_RV, jax.tree.map(lambda x: x[order], rows)), token_R[order])
    for one in range(16):
        np.testing.assert_array_equal(
            draw(logits_RV[:1], jax.tree.map(lambda x, i=one: x[i : i + 1], rows)), token_R[one]
        )
    assert len(set(token_R.tolist())) > 8


def test_penalties_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    for repetition, presence, frequency in [(1.3, 0, 0), (0.7, 0, 0), (1, 1.5, 0), (1, 0, 0.4), (1.2, -0.5, -0.3)]:
        logits_RV = rng.standard_normal((8, 50)).astype(np.float32) * 3
        prompts = [rng.integers(0, 50, rng.integers(1, 20)).tolist() for _ in range(8)]
        outputs = [rng.integers(0, 50, rng.integers(0, 30)).tolist() for _ in range(8)]
        ours_RV = run_penalties(logits_RV, prompts, outputs, repetition, presence, frequency)
        for ours_V, logits_V, prompt, output in zip(ours_RV, logits_RV, prompts, outputs, strict=True):
            expected_V = penalised(logits_V, prompt, output, repetition, presence, frequency)
            np.testing.assert_allclose(ours_V, expected_V, rtol=1e-6, atol=1e-6)


def test_the_repetition_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(1)
    logits_RV = rng.standard_normal((4, 50)).astype(np.float32) * 3
    tokens = rng.integers(0, 50, (4, 20))
    theirs = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor(tokens), torch.tensor(logits_RV)).numpy()
    split = [(row[:12].tolist(), row[12:].tolist()) for row in tokens]
    ours = run_penalties(logits_RV, [p for p, _ in split], [o for _, o in split], 1.4, 0.0, 0.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def run_penalties(logits_RV, prompts, outputs, repetition, presence, frequency):
    count_RV = np.zeros(logits_RV.shape, np.int32)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        np.add.at(count_RV[row], output, 1)
        count_RV[row, prompt] |= PROMPT_BIT
    _, rows = SamplingCase(name="penalties", num_rows=len(prompts)).make()
    penalties = {"repetition_R": repetition, "presence_R": presence, "frequency_R": frequency}
    rows = rows.replace(**{name: jnp.full(len(prompts), value, jnp.float32) for name, value in penalties.items()})
    return np.asarray(jax.jit(penalise)(jnp.asarray(logits_RV), jnp.asarray(count_RV), rows))


def test_without_penalties_no_bit_of_the_logits_changes():
    logits_RV, rows = SamplingCase(name="masked", masked=0.3).make()
    count_RV = jnp.full(logits_RV.shape, PROMPT_BIT + 3, jnp.int32)
    np.testing.assert_array_equal(jax.jit(penalise)(logits_RV, count_RV, rows), logits_RV)


@pytest.mark.parametrize("num_rows", [1, 8, 33])
def test_log_probabilities_are_normalised_with_the_same_bits_in_any_company(num_rows):
    logits_RV, _ = SamplingCase(name="masked", num_rows=33, masked=0.3).make()
    normalise = jax.jit(lambda x: log_normaliser(x, WHOLE))
    ours_R = np.asarray(normalise(logits_RV[:num_rows]))
    wide_RV = np.asarray(logits_RV, np.float64)
    np.testing.assert_allclose(ours_R, np.log(np.exp(wide_RV).sum(1))[:num_rows], rtol=1e-6)
    np.testing.assert_array_equal(ours_R, np.asarray(normalise(logits_RV))[:num_rows])


def test_top_tokens_are_the_likeliest_first_and_picked_values_their_own():
    logits_RV, _ = SamplingCase(name="plain").make()
    value_RN, token_RN = jax.jit(lambda x: top_tokens(x, 5, WHOLE))(logits_RV)
    np.testing.assert_array_equal(token_RN, np.argsort(-np.asarray(logits_RV), axis=1)[:, :5])
    for n in range(5):
        np.testing.assert_array_equal(pick(logits_RV, token_RN[:, n], WHOLE), value_RN[:, n])


def test_names_of_cases_are_unique():
    names = [case.name for case in CASES + BENCH_CASES]
    assert len(set(names)) == len(names)
