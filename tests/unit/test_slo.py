"""How long a step may take for the sake of the requests in it."""

from types import SimpleNamespace

import pytest

from jaxserve.scheduler.request import NEVER, Objective
from jaxserve.scheduler.slo import FIRST_TOKEN_STEPS, MARGIN, MAX_CREDIT, LatencyBudget

TPOT = 0.05 * (1 - MARGIN)


def request(outputs, first, tpot=0.05, left=100, pending=0):
    return SimpleNamespace(
        request=SimpleNamespace(objective=Objective(tpot=tpot), arrival=0.0),
        num_drawn=10 + outputs + pending,
        first_token_at=first,
        max_total=10 + outputs + left,
        prompt_len=10,
    )


@pytest.fixture
def budget():
    return LatencyBudget((Objective(1.0, 0.05),))


def test_a_request_on_time_gives_a_step_one_token_and_what_it_gained_before(budget):
    assert budget.slack([request(1, first=0.0)], start=0.0, shortest=0.01) == pytest.approx(TPOT)
    assert budget.slack([request(5, first=0.0)], start=0.05, shortest=0.01) == pytest.approx(5 * TPOT - 0.05)
    assert budget.tpot == pytest.approx(TPOT)


def test_the_tightest_request_decides(budget):
    tight, loose = request(3, first=0.0), request(30, first=0.0)
    alone = budget.slack([tight], 0.1, 0.01)
    assert budget.slack([loose, tight], 0.1, 0.01) == alone < budget.slack([loose], 0.1, 0.01)


def test_a_token_on_its_way_counts_as_known_but_this_steps_own_does_not(budget):
    assert budget.slack([request(4, 0.0, pending=1)], 0.0, 0.01) == pytest.approx(5 * TPOT)
    assert budget.slack([request(4, 0.0, pending=1)], 0.0, 0.01, planned=1) == pytest.approx(4 * TPOT)


def test_one_that_can_catch_up_gets_short_steps_and_one_that_cannot_gets_its_objective(budget):
    behind = request(2, first=0.0, left=100)
    assert budget.slack([behind], start=0.2, shortest=0.01) == pytest.approx(2 * TPOT - 0.2)
    lost = request(2, first=0.0, left=1)
    assert budget.slack([lost], start=2.0, shortest=0.01) == pytest.approx(TPOT)
    assert budget.slack([behind], start=0.2, shortest=0.06) == pytest.approx(TPOT)


def test_without_objectives_nothing_limits_a_step():
    free = LatencyBudget()
    assert free.slack([request(1, 0.0, tpot=NEVER)], 9.0, 0.01) == NEVER == free.arrival_limit
    assert not free.has_promises


def test_a_step_leaves_room_for_the_first_token_of_who_comes_meanwhile(budget):
    assert budget.arrival_limit == pytest.approx(1.0 * (1 - MARGIN) / FIRST_TOKEN_STEPS)
    waiting = SimpleNamespace(request=SimpleNamespace(objective=Objective(ttft=1.0), arrival=0.0))
    assert not budget.first_token_risk([(waiting, 100)], now=0.5, rows_per_second=1000)
    assert budget.first_token_risk([(waiting, 600)], now=0.5, rows_per_second=1000)
    assert budget.first_token_risk([(waiting, 300), (waiting, 300)], now=0.5, rows_per_second=1000)
    assert budget.first_token_risk([(waiting, 480)], now=0.5, rows_per_second=1000)  # within the margin
    assert not budget.first_token_risk([(waiting, 600)], now=2.0, rows_per_second=1000)  # it is lost already


def test_the_floor_earns_a_share_of_the_time_and_no_more_than_it_may_save():
    budget = LatencyBudget((Objective(),), floor=0.2)
    budget.earn(1.0)
    assert budget.credit == pytest.approx(0.2)
    budget.spend(0.05)
    assert budget.credit == pytest.approx(0.15)
    budget.spend(1.0)
    assert budget.credit == 0.0
    budget.earn(100.0)
    assert budget.credit == MAX_CREDIT
