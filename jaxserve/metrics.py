"""What the engine counts. Written by the engine's thread alone, read by anybody at any time."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, fields

import numpy as np

WINDOW = 4096  # newest values a distribution keeps for its percentiles


class Counter:
    """Only grows."""

    def __init__(self):
        self.value = 0

    def add(self, amount: int = 1) -> None:
        assert amount >= 0, f"{amount=}"
        self.value += amount

    def read(self) -> int:
        return self.value


class Gauge:
    """The latest value."""

    def __init__(self):
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = float(value)

    def read(self) -> float:
        return self.value


class Distribution:
    """Count and sum of all values, percentiles of the newest ones."""

    def __init__(self, window: int = WINDOW):
        self.count = 0
        self.sum = 0.0
        self._newest: deque[float] = deque(maxlen=window)

    def observe(self, value: float) -> None:
        self.count += 1
        self.sum += value
        self._newest.append(value)

    def read(self) -> dict[str, float]:
        return {"count": self.count, "sum": self.sum, **summary(self._newest.copy())}


def summary(values: Collection[float]) -> dict[str, float]:
    """mean, median, std and p99 (linear between neighbours); zeros where there are no values."""
    if not values:
        return {"mean": 0.0, "median": 0.0, "std": 0.0, "p99": 0.0}
    array = np.asarray(tuple(values), np.float64)
    median, p99 = np.percentile(array, (50, 99))
    return {"mean": float(array.mean()), "median": float(median), "std": float(array.std()), "p99": float(p99)}


@dataclass(frozen=True, kw_only=True)
class EngineMetrics:
    """Names and meanings as in vLLM where it has them."""

    num_requests_running: Gauge = field(default_factory=Gauge)
    num_requests_waiting: Gauge = field(default_factory=Gauge)
    kv_cache_usage_perc: Gauge = field(default_factory=Gauge)  # 0 to 1; cached pages nobody uses count as free
    prefix_cache_queries: Counter = field(default_factory=Counter)  # prompt tokens looked up
    prefix_cache_hits: Counter = field(default_factory=Counter)  # prompt tokens found
    num_preemptions: Counter = field(default_factory=Counter)
    prompt_tokens: Counter = field(default_factory=Counter)
    generation_tokens: Counter = field(default_factory=Counter)
    recompiles_total: Counter = field(default_factory=Counter)  # compilations after warm-up
    step_seconds: Distribution = field(default_factory=Distribution)  # from dispatch to tokens read
    host_seconds: Distribution = field(default_factory=Distribution)  # plan, pack and dispatch of a step

    def snapshot(self) -> dict[str, int | float | dict[str, float]]:
        """The values of this moment, by name."""
        return {f.name: getattr(self, f.name).read() for f in fields(self)}
