"""What a benchmark sends: requests with arrival times, replayed from a trace or made up; fixed by a seed."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxserve.config.messages import short
from jaxserve.errors import ConfigError

MAX_PROBLEMS = 20  # bad rows that are named before a trace is given up
MOST_TOKENS = 10**9  # of a row's prompt or output


class Row(NamedTuple):
    """One request of a trace: when, and how long."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """One request, complete."""

    arrival_s: float  # since the start of the run
    prompt_ids: tuple[int, ...]
    output_tokens: int
    tenant: str = ""
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests by arrival, and how they came about in words."""

    requests: tuple[BenchRequest, ...]
    source: str
    num_clipped: int = 0  # requests cut to max_model_len

    @property
    def total_output_tokens(self) -> int:
        return sum(request.output_tokens for request in self.requests)

    def on_adapters(self, names: Sequence[str | None], assignment: str = "round-robin", seed: int = 0) -> "Workload":
        """The same requests, each on one of these adapters (None: the base model); no names: all on the base model."""
        chosen = assign(self.requests, names, assignment, seed)
        requests = tuple(replace(r, adapter=name) for r, name in zip(self.requests, chosen, strict=True))
        return replace(self, requests=requests)


NOBODY = Workload(requests=(), source="no requests")


def read_trace(path: str | Path, limit: int | None = None) -> list[Row]:
    """The first ``limit`` rows of a CSV with columns arrival_s, prompt_tokens, output_tokens and maybe tenant.

    Raises:
      ConfigError: bad rows, each by file, line and field.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a byte order mark
            return _rows(str(path), csv.reader(file, skipinitialspace=True), limit)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([f"{path}: {error}"]) from None


def _rows(path: str, lines, limit: int | None) -> list[Row]:
    header = next(lines, [])
    missing = [name for name in Row._fields[:3] if name not in header]
    problems = [f"{path}:1: no column {name}" for name in missing]
    problems += [f"{path}:1: {header.count(name)} columns {name}" for name in Row._fields if header.count(name) > 1]
    if problems:
        raise ConfigError(problems)
    rows: list[Row] = []
    for cells in lines:
        if len(rows) == limit or len(problems) >= MAX_PROBLEMS:
            break
        if not cells:
            continue
        found = _row(header, cells, rows[-1].arrival_s if rows else 0.0)
        if isinstance(found, Row):
            rows.append(found)
        else:
            problems.append(f"{path}:{lines.line_num}: {found}")
    if problems or not rows:
        raise ConfigError(problems or [f"{path}: no requests"])
    return rows


def _row(header: list[str], cells: list[str], earliest: float) -> Row | str:
    """The row, or what is wrong with it."""
    if len(cells) != len(header):
        return f"{len(cells)} fields; the header has {len(header)}"
    fields = dict(zip(header, cells, strict=True))
    arrival = _float(fields["arrival_s"])
    if not earliest <= arrival < math.inf:
        return f"arrival_s: {short(fields['arrival_s'])} is not a time in seconds, {earliest:g} or later"
    counts = {name: _count(fields[name]) for name in ("prompt_tokens", "output_tokens")}
    for name, count in counts.items():
        if not 1 <= count <= MOST_TOKENS:
            return f"{name}: {short(fields[name])} is not a whole number from 1 to {MOST_TOKENS:,}"
    return Row(arrival, **counts, tenant=fields.get("tenant", ""))


def _count(text: str) -> int:
    """The whole number; 0 where there is none, or one of more digits than Python reads."""
    try:
        return int(text) if text.isascii() and text.isdigit() else 0
    except ValueError:
        return 0


def _float(text: str) -> float:
    """The number; NaN where there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def rescale(rows: Sequence[Row], speed: float, how: str, seed: int = 0) -> list[Row]:
    """A trace at ``speed`` times its rate.

    "stretch" changes the times between arrivals and so the duration; "thin" keeps the times and takes a random share
    of the rows, which softens bursts.

    Raises:
      ConfigError: thinning cannot speed a trace up.
    """
    if how == "stretch":
        return [row._replace(arrival_s=row.arrival_s / speed) for row in rows]
    if speed > 1:
        raise ConfigError([f"bench.trace_speed {speed:g}: thinning only slows down; stretch, or stay at or below 1"])
    keep = np.random.default_rng(seed).random(len(rows)) < speed
    return [row for row, kept in zip(rows, keep, strict=True) if kept]


def from_first(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The rows with times from the first arrival on, for which nobody waits, and that in words where it is late."""
    first = rows[0].arrival_s
    said = f", times from the first arrival at {first:g} s on" if first else ""
    return [row._replace(arrival_s=row.arrival_s - first) for row in rows], said


def random_rows(
    num: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    rate: float = math.inf,
    burstiness: float = 1.0,
    seed: int = 0,
) -> list[Row]:
    """Made-up requests: lengths uniform in mean x (1 - ratio, 1 + ratio), gaps of a gamma distribution.

    Args:
      rate: requests per second; inf sends all at once.
      burstiness: the gamma's shape: 1 is a Poisson process, less is burstier, more is steadier.
    """
    rng = np.random.default_rng(seed)
    prompts, outputs = (_lengths(rng, mean, range_ratio, num) for mean in (input_len, output_len))
    gaps = np.zeros(num) if math.isinf(rate) else rng.gamma(burstiness, 1 / (rate * burstiness), num)
    arrivals = np.cumsum(gaps) - gaps[:1]
    return [Row(*values) for values in zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)]


def _lengths(rng: np.random.Generator, mean: int, ratio: float, num: int) -> np.ndarray:
    low, high = math.floor(mean * (1 - ratio)), math.ceil(mean * (1 + ratio))
    return rng.integers(max(low, 1), max(high, 1), num, endpoint=True)


def clip(row: Row, max_model_len: int) -> Row:
    """A request that fits the model: its prompt gives way first, down to half of the length."""
    prompt = min(row.prompt_tokens, max(max_model_len - row.output_tokens, max_model_len // 2))
    return row._replace(prompt_tokens=prompt, output_tokens=min(row.output_tokens, max_model_len - prompt))


def make_workload(
    rows: Sequence[Row], *, source: str, vocab_size: int, max_model_len: int, shared_prefix_len: int = 0, seed: int = 0
) -> Workload:
    """Gives rows random prompts of their lengths, cut to what the model holds.

    Args:
      shared_prefix_len: so many first tokens are the same in all prompts of a tenant.
    """
    rng = np.random.default_rng(seed)
    fitting = [clip(row, max_model_len) for row in rows]
    tenants = sorted({row.tenant for row in rows})
    prefixes = {tenant: rng.integers(vocab_size, size=shared_prefix_len) for tenant in tenants}
    requests = []
    for row in fitting:
        ids = rng.integers(vocab_size, size=row.prompt_tokens)
        shared = min(shared_prefix_len, row.prompt_tokens)
        ids[:shared] = prefixes[row.tenant][:shared]
        prompt_ids, outputs = tuple(ids.tolist()), row.output_tokens
        requests.append(
            BenchRequest(arrival_s=row.arrival_s, prompt_ids=prompt_ids, output_tokens=outputs, tenant=row.tenant)
        )
    num_clipped = sum(a != b for a, b in zip(rows, fitting, strict=True))
    return Workload(requests=tuple(requests), source=source, num_clipped=num_clipped)


def assign(
    requests: Sequence[BenchRequest], names: Sequence[str | None], assignment: str, seed: int = 0
) -> Sequence[str | None]:
    """An adapter for each request: in turn, at random, or by tenant (from the start again when they run out)."""
    if not names:
        return [None] * len(requests)
    if assignment == "random":
        return [names[int(i)] for i in np.random.default_rng(seed).integers(len(names), size=len(requests))]
    keys = list(range(len(requests))) if assignment == "round-robin" else [r.tenant for r in requests]
    turn = {key: names[i % len(names)] for i, key in enumerate(dict.fromkeys(keys))}
    return [turn[key] for key in keys]
