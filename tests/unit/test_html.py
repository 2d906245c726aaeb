"""Plots of the reports: what can be read off them."""

import re
from itertools import pairwise

import pytest

from jaxserve.bench import html
from jaxserve.bench.html import Plot, Series


@pytest.mark.parametrize("values", [(26.0, 39.0), (41.0, 41.0), (2.6, 2.7), (0.3, 900.0)])
def test_an_axis_has_two_values_at_least(values):
    low, high = min(values) * 0.8, max(values) * 1.25
    found = html.log_ticks(low, high)
    assert len(found) >= 2
    assert all(low <= value <= high for value in found)


@pytest.mark.parametrize("end", [0.001, 0.3, 1.0, 4.07, 31.07, 60.0, 599.9])
def test_bins_end_where_the_run_does(end):
    edges = html.bins(end, 120)
    widths = [right - left for left, right in pairwise(edges)]
    assert (edges[0], edges[-1]) == (0.0, end)
    assert 60 <= len(widths) <= 250
    assert 0.49 * widths[0] < widths[-1] < 1.51 * widths[0]


@pytest.mark.parametrize("kind", ["line", "dots"])
def test_as_many_series_as_ways_to_share_can_be_told_apart(kind):
    series = [Series(label=f"way {i}", x=[1.0], y=[1.0], kind=kind, color=1 + i, dashed=i >= 8) for i in range(11)]
    figure = html.figure(Plot(title="t", x_label="x", y_label="y", series=series))
    for shape in (r'<i class="([^"]+)"', r'<(?:circle|polyline) class="([^"]+)"'):
        assert len(set(re.findall(shape, figure))) == 11
    assert set(re.findall(r'class="[bsf](\d+)', figure)) == set("12345678")  # those that a page has colours for
