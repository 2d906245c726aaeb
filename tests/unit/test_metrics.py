"""Counters and percentiles."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.metrics import Counter, Distribution, EngineMetrics, summary


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_summary_is_numpys(values):
    expected = {
        "mean": np.mean(values),
        "median": np.median(values),
        "std": np.std(values),
        "p99": np.percentile(values, 99),
    }
    assert summary(values) == pytest.approx(expected, abs=1e-6)


def test_no_values_summarise_to_zeros():
    assert set(summary([]).values()) == {0.0}


def test_a_distribution_counts_all_and_summarises_the_newest():
    times = Distribution(window=2)
    for value in (9.0, 1.0, 3.0):
        times.observe(value)
    assert times.read() | {"p99": None} == {
        "count": 3,
        "sum": 13.0,
        "mean": 2.0,
        "median": 2.0,
        "std": 1.0,
        "p99": None,
    }


def test_a_counter_never_goes_back():
    counter = Counter()
    counter.add(3)
    counter.add()
    with pytest.raises(AssertionError, match="amount=-1"):
        counter.add(-1)
    assert counter.read() == 4


def test_a_snapshot_has_every_metric_and_is_json():
    metrics = EngineMetrics()
    metrics.num_requests_running.set(2)
    metrics.generation_tokens.add(5)
    metrics.step_seconds.observe(0.5)
    shot = json.loads(json.dumps(metrics.snapshot()))
    assert (shot["num_requests_running"], shot["generation_tokens"]) == (2.0, 5)
    assert shot["step_seconds"]["p99"] == 0.5
    assert shot["host_seconds"]["count"] == 0


def test_a_snapshot_may_be_taken_while_the_engine_counts():
    metrics, done = EngineMetrics(), threading.Event()

    def count():
        while not done.is_set():
            metrics.step_seconds.observe(1.0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(200):
            assert metrics.snapshot()["step_seconds"]["mean"] in (0.0, 1.0)
    finally:
        done.set()
        thread.join()
