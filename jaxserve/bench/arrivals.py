"""The same load at any rate and length: a trace scaled, or made-up requests."""

import math
from collections.abc import Sequence

from jaxserve.bench.load import Bursts
from jaxserve.bench.workload import Row, random_rows, read_trace, rescale
from jaxserve.config import Config
from jaxserve.errors import ConfigError

SPARE = 1.2  # made-up rows beyond the mean: arrivals are random, and the last ones are cut off


def rows_at(config: Config, rate: float, seconds: float) -> tuple[list[Row], str]:
    """Rows that come at ``rate`` per second on average, up to ``seconds``, and how they came about in words."""
    bench, options = config.bench, config.coserve
    if bench.trace is not None:
        rows, source = trace_at(read_trace(bench.trace), rate, seconds, bench.trace_scaling, bench.seed)
        return rows, f"trace {bench.trace}, {source}"
    bursts = Bursts(options.burst_factor, options.burst_seconds, options.burst_period)
    squeezed = 1 + (bursts.factor - 1) * bursts.seconds / bursts.period
    rows = random_rows(
        math.ceil(rate * seconds * squeezed * SPARE) + 50,
        input_len=bench.random_input_len,
        output_len=bench.random_output_len,
        range_ratio=bench.random_range_ratio,
        rate=rate,
        burstiness=bench.burstiness,
        seed=bench.seed,
    )
    source = f"random lengths, {rate:g} requests/s, gaps gamma of shape {bench.burstiness:g}, seed {bench.seed}"
    if bursts.factor > 1:
        rows, source = bursts.squeeze(rows), f"{source}, {bursts}"
    return [row for row in rows if row.arrival_s < seconds], source


def trace_at(rows: Sequence[Row], rate: float, seconds: float, how: str, seed: int = 0) -> tuple[list[Row], str]:
    """A trace brought to a mean rate. It begins again where it is too short.

    Args:
      how: "stretch" or "thin", as in ``rescale``.

    Raises:
      ConfigError: a trace without a length, or thinning that would have to speed it up.
    """
    first, last = rows[0].arrival_s, rows[-1].arrival_s
    if last <= first:
        raise ConfigError(["bench.trace: all requests come at once; a rate needs arrivals over time"])
    own = (len(rows) - 1) / (last - first)
    if how == "thin" and rate > own:
        raise ConfigError(
            [f"sweep.rates: {rate:g} requests/s of a trace that has {own:.3g}; thinning only slows down, stretch it"]
        )
    scaled = rescale([row._replace(arrival_s=row.arrival_s - first) for row in rows], rate / own, how, seed)
    if not scaled:
        raise ConfigError([f"sweep.rates {rate:g}: thinning leaves none of the trace's {len(rows)} requests"])
    period = len(scaled) / rate
    times = max(math.ceil(seconds / period), 1)
    repeated = [row._replace(arrival_s=row.arrival_s + turn * period) for turn in range(times) for row in scaled]
    said = {"stretch": f"time stretched {own / rate:.3g} times", "thin": f"thinned to {rate / own:.3g} of its rows"}
    again = f", {times} times over" if times > 1 else ""
    found = sorted(row for row in repeated if row.arrival_s < seconds)
    return found, f"{said[how]} to {rate:g} requests/s{again}"


def bursts_of(config: Config, seconds: float) -> list[tuple[float, float]]:
    """(start, end) of the bursts of made-up load."""
    options = config.coserve
    if config.bench.trace is not None:
        return []
    return Bursts(options.burst_factor, options.burst_seconds, options.burst_period).spans(seconds)
