"""Means and percentiles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.metrics import summary


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
