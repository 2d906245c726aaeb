"""Batches of a training loop of one's own: their order, their results, and which gradients are summed."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.examples import Example
from jaxserve.finetune.job import Loss, Purpose
from jaxserve.finetune.session import Session


@pytest.fixture
def session() -> Session:
    return Session("policy", FinetuneConfig(), None, tenant="lab")  # pyright: ignore[reportArgumentType]


def hand_in(session, purpose=Purpose.ACCUMULATE):
    examples = [Example(np.arange(n, dtype=np.int32), np.ones(n, np.float32), n) for n in (3, 5)]
    return session.hand_in(examples, purpose, Loss())


def read(session, batch):
    """The last example's sequence was begun first; a token's loss is its id."""
    for example in reversed(batch.examples):
        values = example.token_ids.astype(np.float32)
        batch.sequences.append(SimpleNamespace(token_ids=example.token_ids, losses=values, logprobs=-values))
    session.read(batch)


def test_batches_run_in_the_order_they_came_but_repeated_ones_first(session):
    one, two = hand_in(session), hand_in(session)
    assert one.epoch != two.epoch  # or dropout's masks would be the same
    assert session.next_batch() is one
    session.again.append(again := one.again(retried=False))
    assert (session.next_batch(), session.next_batch(), session.idle) == (again, two, True)
    assert (session.next_batch(), session.exhausted) == (None, False)


@pytest.mark.parametrize("attribute", ["pending", "batch", "again"])
def test_a_session_with_a_batch_anywhere_is_not_idle(session, attribute):
    assert session.idle
    batch = hand_in(session)
    session.pending.clear()
    setattr(session, attribute, batch if attribute == "batch" else [batch])
    assert not session.idle


def test_losses_are_sums_and_charged_to_the_tenant(session):
    batch = hand_in(session)
    assert [batch.targets(example).weights.sum() for example in batch.examples] == [3, 5]
    assert session.tenant == "lab"


def test_a_result_is_by_example_and_given_once(session):
    batch = hand_in(session)
    assert session.result(batch) is None
    read(session, batch)
    result = session.result(batch)
    assert [losses.tolist() for losses in result.losses] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert [logprobs.tolist() for logprobs in result.logprobs] == [[0, -1, -2], [0, -1, -2, -3, -4]]
    assert result.loss == 13
    assert session.result(batch) is None
    read(session, again := batch.again(retried=False))  # after a failure, for the sums alone
    assert session.result(again) is None


def test_what_is_summed_is_begun_again_after_a_failure_until_an_update_takes_it(session):
    one, two, looked_at = hand_in(session), hand_in(session), hand_in(session, Purpose.FORWARD)
    for batch in (one, two, looked_at):
        assert session.next_batch() is batch
        read(session, batch)
    read(session, one.again(retried=False))
    assert session.begun() == [one, two]
    assert not session.withdraw(one)
    assert session.begun() == [two]
    session.forget_gradients()
    assert session.begun() == []


def test_a_batch_that_nobody_waits_for_is_forgotten(session):
    one, two = hand_in(session), hand_in(session)
    assert session.next_batch() is one
    assert (session.withdraw(two), session.withdraw(one), session.idle) == (True, False, True)
    read(session, one)
    assert session.result(one) is None
    read(session, three := hand_in(session))
    session.withdraw(three)
    assert session.result(three) is None
