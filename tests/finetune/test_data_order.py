"""Training data once read: in which order they come, how they are split, told apart and packed."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import tokens

from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Cursor
from jaxserve.finetune.errors import DataError
from jaxserve.finetune.job import Batch
from jaxserve.finetune.packing import pack


def many(count, **fields):
    return tokens([([place % 100, 1], None) for place in range(count)], config=FinetuneConfig(**fields))


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own():
    dataset = many(500)
    orders = [dataset.order(epoch).tolist() for epoch in range(4)]
    assert all(sorted(order) == list(range(500)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert many(500, seed=1).order(0).tolist() not in orders


def test_the_order_is_the_same_in_every_version():
    assert many(10, seed=3).order(0).tolist() == [6, 1, 8, 5, 2, 7, 9, 4, 3, 0]


def test_without_shuffling_the_order_is_that_of_the_data():
    dataset = many(9, shuffle=False)
    assert dataset.order(0).tolist() == dataset.order(5).tolist() == list(range(9))


@given(count=st.integers(1, 30), batch=st.integers(1, 40), stop=st.integers(0, 12))
def test_a_job_resumed_from_its_cursor_sees_what_the_undisturbed_one_sees(count, batch, stop):
    dataset = many(count)

    def run(cursor, steps):
        seen = []
        for _ in range(steps):
            examples, cursor = dataset.batch(cursor, batch)
            seen.append([example.index for example in examples])
        return seen, cursor

    undisturbed, end = run(Cursor(), 40)
    before, cursor = run(Cursor(), stop)
    cursor = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
    after, again = run(cursor, 40 - stop)
    assert before + after == undisturbed
    assert again == end
    epoch = undisturbed[: -(-count // batch)]
    assert sorted(itertools.chain(*epoch)) == list(range(count))


@pytest.mark.parametrize(
    "value", [None, {}, [0, 1], {"epoch": 0}, {"epoch": 0, "position": -1}, {"epoch": True, "position": 0}], ids=str
)
def test_a_cursor_that_is_none_is_refused(value):
    with pytest.raises(DataError):
        Cursor.from_json(value)


def test_a_cursor_beyond_the_data_is_refused():
    with pytest.raises(DataError, match="position 9"):
        many(9).batch(Cursor(0, 9), 2)


@given(count=st.integers(2, 60), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 2**32 - 1))
def test_a_split_puts_every_example_on_one_side(count, fraction, seed):
    training, validation = many(count).split(fraction, seed)
    assert len(training) > 0
    assert len(validation) > 0
    assert abs(len(validation) - count * fraction) <= 1
    indices = [example.index for part in (training, validation) for example in part.examples]
    assert sorted(indices) == list(range(count))
    again = many(count).split(fraction, seed)
    assert (again[0].digest, again[1].digest) == (training.digest, validation.digest)


def test_the_split_follows_the_seed():
    splits = {tuple(e.index for e in many(50).split(0.2, seed)[1].examples) for seed in range(5)}
    assert len(splits) == 5


def test_one_example_cannot_be_split():
    with pytest.raises(DataError, match="cannot be split"):
        many(1).split(0.1, 0)


def test_the_digest_follows_every_token_weight_and_boundary():
    variants = [
        [([1, 2, 3], None)],
        [([1, 2, 4], None)],
        [([1, 2, 3], [0, 1, 0])],
        [([1, 2], None), ([3, 4], None)],
        [([1, 2, 3], None), ([1, 2, 3], None)],
        [([3, 4], None), ([1, 2], None)],
    ]
    assert len({tokens(variant).digest for variant in variants}) == len(variants)
    assert tokens(variants[0]).digest == tokens([(np.array([1, 2, 3]), np.ones(3))]).digest


def test_weights_share_the_loss_however_large_they_are():
    batch = Batch(1, tokens([([1, 2, 3], [0, 3e38, 1e38])] * 4).examples, 0, Cursor())
    assert batch.targets(batch.examples[0]).weights.tolist() == pytest.approx([0, 3 / 16, 1 / 16])


# packing


@given(lengths=st.lists(st.integers(1, 50), max_size=40), window=st.integers(1, 40))
def test_a_bin_holds_a_window_or_one_long_example(lengths, window):
    bins = pack(lengths, window)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    for members in bins:
        assert members == sorted(members)
        assert sum(lengths[place] for place in members) <= window or len(members) == 1
    short = [members for members in bins if sum(lengths[place] for place in members) <= window]
    fills = [sum(lengths[place] for place in members) for members in short]
    assert sum(fill * 2 <= window for fill in fills) <= 1  # two half empty bins would have been one
    assert bins == first_fit(lengths, window)


def first_fit(lengths, window):
    """Longest first, each into the first bin that has room for it."""
    bins = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        fitting = (members for members in bins if sum(lengths[p] for p in members) + lengths[place] <= window)
        members = next(fitting, None)
        if members is None:
            bins.append(members := [])
        members.append(place)
    return sorted(sorted(members) for members in bins)


def test_examples_that_fit_together_share_a_window():
    assert pack([5, 4, 3, 2, 1], 8) == [[0, 2], [1, 3, 4]]
    assert pack([1, 2, 3, 4, 5], 8) == [[0, 1, 3], [2, 4]]
    assert pack([8, 8], 8) == [[0], [1]]
    assert pack([20, 3], 8) == [[0], [1]]
    assert pack([], 8) == []
