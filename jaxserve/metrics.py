"""Numbers about numbers."""

from collections.abc import Collection

import numpy as np


def percent(share: float | None, digits: int = 1) -> str:
    """As people write it; - where there is none."""
    return "-" if share is None else f"{share:.{digits}%}"


def summary(values: Collection[float]) -> dict[str, float]:
    """mean, median, std and p99 (linear between neighbours); zeros where there are no values."""
    if not values:
        return {"mean": 0.0, "median": 0.0, "std": 0.0, "p99": 0.0}
    array = np.asarray(tuple(values), np.float64)
    median, p99 = np.percentile(array, (50, 99))
    return {"mean": float(array.mean()), "median": float(median), "std": float(array.std()), "p99": float(p99)}
