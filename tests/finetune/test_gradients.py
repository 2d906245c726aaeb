"""Windowed gradients are the whole sequence's, for any windows, packing, lanes, PEFT methods and remat policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import SITE_NAMES, Oracle, Trainer, random_adapter, relative

from jaxserve.engine.dropout import drop, keep_mask
from jaxserve.finetune.windows import example_key

LENGTHS = [(70, 0, 16), (20, 1, 32), (9, 0, 32), (100, 1, 24), (33, 0, 32)]  # (tokens, lane, longest window)
LORAS = ({"rank": 5}, {"rank": 20, "scaling": 0.75, "members": ["q_proj", "v_proj", "down_proj"]})
DORA_IA3 = (
    {"method": "dora", "rank": 20, "scaling": 0.75},
    {"method": "ia3", "members": ["k_proj", "v_proj", "down_proj"], "inputs": ["down_proj"]},
)
FUSED_LORA = (
    {"method": "ia3", "members": ["q_proj", "k_proj", "o_proj", "up_proj"], "inputs": ["k_proj", "o_proj", "up_proj"]},
    {"rank": 5},
)
DROPOUT = 0.25
STASH = "stash"  # in place of a remat policy: forward and backward in different steps
SINGLE = {"dtype": "float32", "remat": "attention", "num_hidden_layers": 1}  # compiled with all optimization
EXTRAS = SINGLE | {"scaled": True, "dropout": True}  # one program for all that need any


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield "float64"


def train(trainer: Trainer, adapters=LORAS, seed: int = 1, dropout: float = 0.0):
    """Five sequences on two adapters in random legal order; returns what it takes to judge the gradients."""
    rng = np.random.default_rng(seed)
    config = trainer.config
    adapters = [random_adapter(config, rng, **options) for options in adapters]
    lanes = [trainer.lane(i, adapter) for i, adapter in enumerate(adapters)]
    oracles = [Oracle(config, trainer.params, adapter, masked(dropout) if dropout else None) for adapter in adapters]
    sequences, expected = [], [None, None]
    for slot, (length, lane, window) in enumerate(LENGTHS):
        ids = rng.integers(0, config.vocab_size, length)
        weights = (rng.random(length) * (rng.random(length) < 0.7)).astype(np.float32)
        key = example_key(seed, 0, slot)
        sequences.append(trainer.sequence(lanes[lane], ids, weights, window, slot, dropout=dropout, drop_key=key))
        loss, logprob, gradient = oracles[lane](ids, weights, key)
        sequences[-1].expected = loss, logprob
        known = expected[lane]
        expected[lane] = gradient if known is None else jax.tree.map(np.add, known, gradient)
    trainer.train_on(sequences, rng)
    return lanes, adapters, sequences, expected


def masked(rate):
    """The dropout of an example over all of its positions."""

    def apply(layer, site, x, key):
        rows = x.shape[0]
        salt = layer * len(SITE_NAMES) + SITE_NAMES.index(site)
        position, rate_T = jnp.arange(rows, dtype=jnp.int32), jnp.full(rows, rate, x.dtype)
        keep = keep_mask(jnp.full(rows, key), position, rate_T, salt, 0, x.shape[1])
        return drop(x, keep, rate_T)

    return apply


@pytest.mark.parametrize(
    ("family", "remat", "adapters", "dropout"),
    [
        ("llama", "full", LORAS, DROPOUT),
        ("gemma2", "none", LORAS, 0),
        ("llama", "elementwise", LORAS, 0),
        pytest.param("gemma2", STASH, LORAS, 0, marks=pytest.mark.slow),
        ("qwen2", STASH, DORA_IA3, DROPOUT),
        pytest.param("qwen2", "attention", DORA_IA3, DROPOUT, marks=pytest.mark.slow),
        pytest.param("gemma3", "elementwise", LORAS, 0, marks=pytest.mark.slow),
        pytest.param("qwen2", "elementwise", DORA_IA3, DROPOUT, marks=pytest.mark.slow),
        pytest.param("llama", "elementwise", FUSED_LORA, 0, marks=pytest.mark.slow),
        pytest.param("llama", "none", DORA_IA3, 0, marks=pytest.mark.slow),
        pytest.param("qwen2", "full", FUSED_LORA, 0, marks=pytest.mark.slow),
        pytest.param("mistral", "none", FUSED_LORA, DROPOUT, marks=pytest.mark.slow),
        pytest.param("qwen2", "attention", LORAS, 0, marks=pytest.mark.slow),
        pytest.param("gemma3", "full", DORA_IA3, 0, marks=pytest.mark.slow),
        pytest.param("qwen3", "attention", FUSED_LORA, 0, marks=pytest.mark.slow),
        pytest.param("mistral", "none", LORAS, DROPOUT, marks=pytest.mark.slow),
    ],
)
def test_windows_in_any_order_give_the_whole_sequences_gradient(double, family, remat, adapters, dropout):
    scaled = any("method" in options for options in adapters)
    trainer = Trainer(family, double, remat, stashed=remat == STASH, scaled=scaled, dropout=dropout > 0)
    lanes, adapters, sequences, expected = train(trainer, adapters, dropout=dropout)
    for lane, adapter, gradient in zip(lanes, adapters, expected, strict=True):
        assert relative(trainer.gradients(lane, adapter), gradient) < 1e-10
    for sequence in sequences:
        loss, logprob = sequence.expected
        assert np.isclose(sequence.losses.sum(), loss, rtol=1e-6)  # they come back as float32
        assert np.allclose(sequence.logprobs[1:], logprob, rtol=1e-5)


def test_single_precision_is_as_close_to_the_exact_gradient_as_the_whole_sequence_is():
    trainer = Trainer("llama", **SINGLE)
    lanes, adapters, sequences, whole = train(trainer)
    exact = [None, None]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), trainer.params)
        oracles = [Oracle(trainer.config, params, adapter) for adapter in adapters]
        for sequence in sequences:
            lane = sequence.lane.index
            _, _, gradient = oracles[lane](sequence.token_ids, sequence.targets.weights)
            exact[lane] = gradient if exact[lane] is None else jax.tree.map(np.add, exact[lane], gradient)
    for lane, adapter, single, double_ in zip(lanes, adapters, whole, exact, strict=True):
        error = relative(trainer.gradients(lane, adapter), double_)
        assert error < max(1e-5, 2 * relative(single, double_))  # of one draw: over draws the two are as far on average


def test_a_lanes_bits_do_not_depend_on_how_its_windows_were_dealt_to_steps():
    """One after another, or as many in a step as fit, each lane once behind the other: the sums are the same sums."""
    found = []
    for together in (False, True):
        rng = np.random.default_rng(7)
        trainer = Trainer("llama", **EXTRAS)
        adapters = [random_adapter(trainer.config, rng, **options) for options in DORA_IA3]
        lanes = [trainer.lane(i, adapter) for i, adapter in enumerate(adapters)]
        sequences = [
            trainer.sequence(lanes[i % 2], rng.integers(0, 300, 9 + i), np.ones(9 + i), 32, i) for i in range(4)
        ]
        windows = [seq.backward_window(32) for seq in sequences]
        for group in [windows[1::-1], windows[2:]] if together else [[w] for w in windows]:
            trainer.run(tuple(group))
        found.append([trainer.gradients(lane, adapter) for lane, adapter in zip(lanes, adapters, strict=True)])
    assert_same_bits(*found)


def test_programs_that_know_scales_and_dropout_change_no_bit_of_others():
    found = []
    for options in (SINGLE, EXTRAS):
        rng = np.random.default_rng(8)
        trainer = Trainer("llama", **options)
        adapter = random_adapter(trainer.config, rng)
        lane = trainer.lane(0, adapter)
        trainer.run((trainer.sequence(lane, rng.integers(0, 300, 30), np.ones(30), 32, 0).backward_window(32),))
        found.append(trainer.gradients(lane, adapter))
    assert_same_bits(*found)


def assert_same_bits(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_accumulators_of_finished_sequences_are_zero_again():
    trainer = Trainer("llama", **SINGLE)
    train(trainer, seed=2)
    assert all(not np.asarray(pool).any() for layer in trainer.state.train.acc for pool in layer)


def test_taking_a_lanes_gradients_leaves_it_empty_and_the_other_as_it_is():
    trainer = Trainer("llama", **EXTRAS)
    lanes, adapters, _, expected = train(trainer, DORA_IA3, seed=2)
    assert relative(trainer.gradients(lanes[0], adapters[0]), expected[0]) < 1e-3
    assert not any(x.any() for x in jax.tree.leaves(trainer.gradients(lanes[0], adapters[0])))
    assert relative(trainer.gradients(lanes[1], adapters[1]), expected[1]) < 1e-3


@pytest.mark.parametrize("options", [{}, {"method": "dora"}, {"method": "ia3"}], ids=str)
def test_tokens_without_weight_contribute_exactly_nothing(options):
    rng = np.random.default_rng(3)
    trainer = Trainer("llama", **EXTRAS if options else SINGLE)
    adapter = random_adapter(trainer.config, rng, **options)
    lane = trainer.lane(0, adapter)
    ids = rng.integers(0, trainer.config.vocab_size, 50)
    trainer.train_on([trainer.sequence(lane, ids, np.zeros(50), 32, 0)], rng)
    assert not any(x.any() for x in jax.tree.leaves(trainer.gradients(lane, adapter)))


@pytest.mark.parametrize("adapters", [({}, {}), DORA_IA3, DORA_IA3[::-1]], ids=str)
def test_an_adapter_that_is_not_training_gets_exactly_no_gradient(adapters):
    rng = np.random.default_rng(4)
    trainer = Trainer("llama", **EXTRAS if adapters != ({}, {}) else SINGLE)
    adapters = [random_adapter(trainer.config, rng, **options) for options in adapters]
    lanes = [trainer.lane(i, adapter) for i, adapter in enumerate(adapters)]
    ids = rng.integers(0, trainer.config.vocab_size, 50)
    trainer.train_on([trainer.sequence(lanes[0], ids, np.ones(50), 32, 0)], rng)
    assert any(x.any() for x in jax.tree.leaves(trainer.gradients(lanes[0], adapters[0])))
    assert not any(x.any() for x in jax.tree.leaves(trainer.gradients(lanes[1], adapters[1])))


def test_dropout_masks_are_fair_coins_that_know_nothing_of_each_other():
    rows, columns, rate = 512, 256, 0.25
    position, rate_T = jnp.arange(rows, dtype=jnp.int32), jnp.full(rows, rate, jnp.float32)

    def mask(key=1, salt=0, first=0, position=position, columns=columns):
        keys = jnp.full(rows, key, jnp.int32)
        return np.asarray(keep_mask(keys, position, rate_T, salt, first, columns)).astype(float) - (1 - rate)

    one, noise = mask(), 5 / np.sqrt(rows * columns)
    assert abs(one.mean()) < noise
    assert np.abs(one.mean(0)).max() < 6 / np.sqrt(rows)
    assert np.abs(one.mean(1)).max() < 6 / np.sqrt(columns)
    others = [mask(key=2), mask(key=-5), mask(salt=1), mask(salt=7), mask(position=position + 1), mask(first=1)]
    others += [np.roll(one, 1, 0), np.roll(one, 1, 1)]
    assert all(abs((one * other).mean()) < noise for other in others)
    np.testing.assert_array_equal(mask(first=64, columns=64), one[:, 64:128])  # a shard has its columns of the whole
