"""Windowed gradients are the whole sequence's, for any windows, packing, lanes and remat policy."""

import jax
import numpy as np
import pytest
from training import Trainer, oracle, random_adapter, relative

LENGTHS = [(70, 0, 16), (20, 1, 32), (9, 0, 32), (100, 1, 24), (33, 0, 32)]  # (tokens, lane, window)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield "float64"


def train(family: str, dtype: str, remat: str, seed: int = 1):
    """Five sequences on two adapters in random legal order; returns what it takes to judge the gradients."""
    rng = np.random.default_rng(seed)
    trainer = Trainer(family, dtype, remat)
    config = trainer.config
    adapters = [
        (random_adapter(config, 5, 1.5, rng), 5),
        (random_adapter(config, 20, 0.7, rng, ["q_proj", "v_proj", "down_proj"]), 20),
    ]
    lanes = [trainer.lane(i, *adapter) for i, adapter in enumerate(adapters)]
    sequences, expected = [], [None, None]
    for slot, (length, lane, window) in enumerate(LENGTHS):
        ids = rng.integers(0, config.vocab_size, length)
        weights = (rng.random(length) * (rng.random(length) < 0.7)).astype(np.float32)
        sequences.append(trainer.sequence(lanes[lane], ids, weights, window, slot))
        loss, logprob, gradient = oracle(config, trainer.params, adapters[lane][0], ids, weights)
        sequences[-1].expected = loss, logprob
        known = expected[lane]
        expected[lane] = gradient if known is None else jax.tree.map(np.add, known, gradient)
    trainer.train_on(sequences, rng)
    return trainer, lanes, adapters, sequences, expected


@pytest.mark.parametrize(
    ("family", "remat"),
    [
        ("llama", "full"),
        ("gemma2", "none"),
        pytest.param("qwen2", "attention", marks=pytest.mark.slow),
        pytest.param("gemma3", "full", marks=pytest.mark.slow),
        pytest.param("qwen3", "attention", marks=pytest.mark.slow),
        pytest.param("mistral", "none", marks=pytest.mark.slow),
    ],
)
def test_windows_in_any_order_give_the_whole_sequences_gradient(double, family, remat):
    trainer, lanes, adapters, sequences, expected = train(family, double, remat)
    for lane, adapter, gradient in zip(lanes, adapters, expected, strict=True):
        assert relative(trainer.gradients(lane, *adapter), gradient) < 1e-10
    for sequence in sequences:
        loss, logprob = sequence.expected
        assert np.isclose(sequence.losses.sum(), loss, rtol=1e-6)  # they come back as float32
        assert np.allclose(sequence.logprobs[1:], logprob, rtol=1e-5)


def test_single_precision_is_as_close_to_the_exact_gradient_as_the_whole_sequence_is():
    trainer, lanes, adapters, sequences, whole = train("llama", "float32", "attention")
    exact = [None, None]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x, np.float64)), trainer.params)
        for sequence in sequences:
            lane = sequence.lane.index
            stored = {
                key: (np.float64(np.float32(a)), np.float64(np.float32(b)), scaling)
                for key, (a, b, scaling) in adapters[lane][0].items()
            }
            _, _, gradient = oracle(trainer.config, params, stored, sequence.token_ids, sequence.targets.weights)
            exact[lane] = gradient if exact[lane] is None else jax.tree.map(np.add, exact[lane], gradient)
    for lane, adapter, single, double_ in zip(lanes, adapters, whole, exact, strict=True):
        error = relative(trainer.gradients(lane, *adapter), double_)
        assert error < max(1e-5, 1.5 * relative(single, double_))


def test_accumulators_of_finished_sequences_are_zero_again():
    trainer, *_ = train("llama", "float32", "attention", seed=2)
    assert all(not np.asarray(pool).any() for layer in trainer.state.train.acc for pool in layer)


def test_tokens_without_weight_contribute_exactly_nothing():
    rng = np.random.default_rng(3)
    trainer = Trainer("llama", "float32", "attention")
    pairs = random_adapter(trainer.config, 5, 1.0, rng)
    lane = trainer.lane(0, pairs, 5)
    ids = rng.integers(0, trainer.config.vocab_size, 50)
    trainer.train_on([trainer.sequence(lane, ids, np.zeros(50), 32, 0)], rng)
    assert all(not gradient.any() for pair in trainer.gradients(lane, pairs, 5).values() for gradient in pair)


def test_an_adapter_that_is_not_training_gets_exactly_no_gradient():
    rng = np.random.default_rng(4)
    trainer = Trainer("llama", "float32", "attention")
    pairs = [random_adapter(trainer.config, 5, 1.0, rng) for _ in range(2)]
    lanes = [trainer.lane(i, p, 5) for i, p in enumerate(pairs)]
    ids = rng.integers(0, trainer.config.vocab_size, 50)
    trainer.train_on([trainer.sequence(lanes[0], ids, np.ones(50), 32, 0)], rng)
    assert any(gradient.any() for pair in trainer.gradients(lanes[0], pairs[0], 5).values() for gradient in pair)
    assert all(not gradient.any() for pair in trainer.gradients(lanes[1], pairs[1], 5).values() for gradient in pair)
