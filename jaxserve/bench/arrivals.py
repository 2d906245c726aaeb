"""The same load at any rate and length: a trace scaled, or made-up requests."""

import math
from collections.abc import Sequence

from jaxserve.bench.load import Bursts
from jaxserve.bench.workload import Row, from_first, random_rows, read_trace, rescale
from jaxserve.config import Config
from jaxserve.errors import ConfigError

SPARE = 1.2  # made-up rows beyond the mean, mostly enough: arrivals are random, and the last ones are cut off


def rows_at(config: Config, rate: float, seconds: float) -> tuple[list[Row], str]:
    """Rows that come at ``rate`` per second on average, between bursts if there are some, up to ``seconds``, and how
    they came about in words."""
    bench, bursts, rows = config.bench, Bursts.of(config), list[Row]()
    if bench.trace is not None:
        rows, source = trace_at(read_trace(bench.trace), rate, seconds, bench.trace_scaling, bench.seed)
        return rows, f"trace {bench.trace}, {source}"
    count = math.ceil(rate * seconds * bursts.gain * SPARE) + 50
    while not rows or rows[-1].arrival_s < seconds:
        made_up = random_rows(
            count,
            input_len=bench.random_input_len,
            output_len=bench.random_output_len,
            range_ratio=bench.random_range_ratio,
            rate=rate,
            burstiness=bench.burstiness,
            seed=bench.seed,
        )
        rows, count = bursts.squeeze(made_up), 2 * count
    source = f"random lengths, {rate:g} requests/s, gaps gamma of shape {bench.burstiness:g}, seed {bench.seed}"
    if bursts.factor > 1:
        source += f", {bursts}"
    return [row for row in rows if row.arrival_s < seconds], source


def trace_at(rows: Sequence[Row], rate: float, seconds: float, how: str, seed: int = 0) -> tuple[list[Row], str]:
    """The beginning of a trace brought to a mean rate over ``seconds``. It begins again where it is too short.

    A part of a trace rarely has the rate of the whole, so the rate is that of the rows which come.

    Args:
      how: "stretch" or "thin", as in ``rescale``.

    Raises:
      ConfigError: a trace without a length, or thinning that would have to speed it up.
    """
    rows, since = from_first(rows)
    if rows[-1].arrival_s <= 0:
        raise ConfigError(["bench.trace: all requests come at once; a rate needs arrivals over time"])
    used, lasts = _beginning(rows, rate, seconds, how)
    own = len(used) / lasts
    if how == "thin" and rate > own:
        said = f"{rate:g} requests/s of a trace that has {own:.3g} in its first {lasts:.3g} s"
        raise ConfigError([f"sweep.rates: {said}; thinning only slows down, stretch it"])
    scaled = rescale(used, rate / own, how, seed)
    if not scaled:
        raise ConfigError([f"sweep.rates {rate:g}: thinning leaves none of the trace's {len(used)} requests"])
    period = lasts * own / rate if how == "stretch" else lasts
    times = max(math.ceil(seconds / period), 1)
    repeated = [row._replace(arrival_s=row.arrival_s + turn * period) for turn in range(times) for row in scaled]
    said = {"stretch": f"time stretched {own / rate:.3g} times", "thin": f"thinned to {rate / own:.3g} of its rows"}
    again = f", {times} times over" if times > 1 else ""
    found = sorted(row for row in repeated if row.arrival_s < seconds)
    return found, f"{said[how]} to {rate:g} requests/s{again}{since}"


def _beginning(rows: list[Row], rate: float, seconds: float, how: str) -> tuple[list[Row], float]:
    """The first rows, as many as ``seconds`` take: of stretched ones at ``rate``, of thinned ones as they are; and the
    time until the next one comes."""
    if how == "thin":
        count, lasts = sum(row.arrival_s < seconds for row in rows), seconds
    else:
        count = min(math.ceil(rate * seconds), len(rows))
        while count < len(rows) and rows[count].arrival_s <= 0:  # all so far come at once
            count += 1
        lasts = rows[min(count, len(rows) - 1)].arrival_s
    if count == len(rows):  # the gap behind the last one is as long as the others are on average
        lasts = rows[-1].arrival_s * count / (count - 1)
    return rows[:count], lasts
