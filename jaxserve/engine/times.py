"""How long a step takes: measured for each bucket at start-up, corrected by every step that is measured.

    seconds = pace * (base(bucket) + weights . what the step holds)

``base`` is the time of a bucket with nothing in it; padding is computed like anything else, so most of a step's time is
there. It follows the bucket's own steps: start-up measures few, and maybe beside other work. The weights stand for what
grows with contexts and adapters, and are found by recursive least squares with forgetting, from measurements at
start-up and from all later steps. ``pace`` follows a device that others slow down.
"""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxserve.engine.buckets import Bucket

FORGETTING = 0.002  # of the least squares, per step: some hundred steps are remembered
NOISE = 0.05  # relative error of one measurement
SPREAD = 0.5  # how far a weight may be from its prior, in units of the longest base
PACE_SHARE = 0.1  # of a new measurement in ``pace``
BASE_SHARE = 0.1  # of a new measurement in its bucket's own base
PACE_LIMITS = (0.5, 4.0)
OUTLIER = 3.0  # a measurement so many times off is a hiccup of the machine: it counts as this much
NUM_ERRORS = 1024  # newest relative errors that are kept


class StepLoad(NamedTuple):
    """What a step's time depends on. A span is the most keys that one row sees, and costs every row of its kind where
    attention goes over them together; pairs are counted row by row."""

    bucket: Bucket
    extended: bool = False  # the program knows scales and dropout
    decode_keys: int = 0
    decode_span: int = 0
    block_pairs: int = 0  # of chunk rows and gradient rows
    block_span: int = 0
    grad_pairs: int = 0
    grad_span: int = 0
    adapter_rows: int = 0  # rows with an adapter
    grad_rows: int = 0  # gradient rows in use

    def weighed(self) -> tuple[float, ...]:
        """The amounts that have a weight."""
        bucket = self.bucket
        return (
            bucket.decode_rows * self.decode_span,
            bucket.forward_block_rows * self.block_span,
            bucket.grad_rows * self.grad_span,
            self.decode_keys,
            self.block_pairs,
            self.grad_pairs,
            self.adapter_rows,
            self.grad_rows,
        )


NUM_BASES = 2  # a weight for buckets without gradient rows, and one more for those with


class StepTimes:
    """Predicts seconds.

    Args:
      buckets: of the engine: the largest ones give the weights their units.
      max_keys: keys that one row sees at most.
    """

    def __init__(self, buckets: Iterable[Bucket] = (), max_keys: int = 1):
        self.base: dict[tuple[Bucket, bool], float] = {}
        self.pace = 1.0
        self.errors: deque[float] = deque(maxlen=NUM_ERRORS)  # predicted over measured, minus 1
        self.uncertainty = 0.0  # running mean of their absolute values
        self._typical = 0.0  # of the longest step with nothing in it
        self.resize(buckets, max_keys)

    def resize(self, buckets: Iterable[Bucket], max_keys: int) -> None:
        """Starts over with other buckets; what was measured of a bucket stays."""
        buckets = list(buckets)
        decode, block, grad = (
            max((rows(b) for b in buckets), default=0) or 1
            for rows in (lambda b: b.decode_rows, lambda b: b.forward_block_rows, lambda b: b.grad_rows)
        )
        keys = (decode * max_keys, block * max_keys, grad * max_keys)
        self._units = (*keys, *keys, decode + block, grad)
        self._theta = np.zeros(NUM_BASES + len(self._units))
        self._theta[0] = 1.0
        prior = np.diag(np.array([0.1, 0.1, *[SPREAD] * len(self._units)]) ** 2)
        self._covariance, self._forgotten = prior, FORGETTING * prior
        self._x, self._through, self._outer = np.empty(len(prior)), np.empty(len(prior)), np.empty_like(prior)
        self._set_weights()

    def calibrate(self, bucket: Bucket, extended: bool, seconds: float) -> None:
        """Notes the time of a bucket with nothing in it."""
        self.base[bucket, extended] = seconds
        self._typical = max(self.base.values())

    def has_plain(self, bucket: Bucket) -> bool:
        """Whether the bucket has a program without extras."""
        return (bucket, False) in self.base

    def predict(self, load: StepLoad) -> float:
        """Seconds; infinite for a bucket that never ran."""
        base = self.base.get((load.bucket, load.extended))
        if base is None:
            return float("inf")
        return self.pace * self._in_bucket(load.bucket, base, self._slopes(load))

    def predict_each(self, load: StepLoad, buckets: Iterable[Bucket]) -> list[float]:
        """The same of the load in each of these buckets, with the plain program where there is one."""
        slopes, bases, pace, found = self._slopes(load), self.base, self.pace, []
        for bucket in buckets:
            base = bases.get((bucket, False)) or bases.get((bucket, True))
            found.append(float("inf") if base is None else pace * self._in_bucket(bucket, base, slopes))
        return found

    def _slopes(self, load: StepLoad) -> tuple[float, float, float, float]:
        """Seconds that the load adds for every decode row, block row and gradient row of its bucket, and in any."""
        _, _, decode_keys, decode_span, block_pairs, block_span, grad_pairs, grad_span, adapter_rows, grad_rows = load
        decode, block, grad, keys, pairs, more_pairs, with_adapter, trained = self._weights
        typical = self._typical
        anywhere = (
            decode_keys * keys
            + block_pairs * pairs
            + grad_pairs * more_pairs
            + adapter_rows * with_adapter
            + grad_rows * trained
        )
        return (
            decode_span * decode * typical,
            block_span * block * typical,
            grad_span * grad * typical,
            anywhere * typical,
        )

    def _in_bucket(self, bucket: Bucket, base: float, slopes: tuple[float, float, float, float]) -> float:
        decode, block, grad, anywhere = slopes
        rows = bucket.grad_rows
        more = bucket.decode_rows * decode + bucket.forward_block_rows * block + rows * grad + anywhere
        seconds = base * (self._per_base[1] if rows else self._per_base[0]) + more
        return seconds if seconds > 0.25 * base else 0.25 * base

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learns from a step that was measured."""
        key = load.bucket, load.extended
        base = self.base.get(key)
        if base is None:
            self.calibrate(load.bucket, load.extended, seconds)
            return
        linear = self._in_bucket(load.bucket, base, self._slopes(load))
        error = self.pace * linear / seconds - 1
        self.errors.append(error)
        self.uncertainty += PACE_SHARE / 2 * (min(abs(error), 1.0) - self.uncertainty)
        seconds = min(max(seconds, linear * self.pace / OUTLIER), linear * self.pace * OUTLIER)
        self._learn(load, base, linear, seconds / self.pace)
        self.base[key] = base * (1 + BASE_SHARE * (seconds / (self.pace * linear) - 1))
        low, high = PACE_LIMITS
        self.pace = min(max(self.pace + PACE_SHARE * (seconds / linear - self.pace), low), high)

    def _learn(self, load: StepLoad, base: float, linear: float, seconds: float) -> None:
        """One step of recursive least squares (a Kalman filter whose state stands still), on relative errors."""
        scale = self._typical / seconds
        more = [amount / unit * scale for amount, unit in zip(load.weighed(), self._units, strict=True)]
        x, through, outer, covariance = self._x, self._through, self._outer, self._covariance
        x[:] = base / seconds, base / seconds if load.bucket.grad_rows else 0.0, *more
        covariance.dot(x, through)
        gain = through / (x.dot(through) + NOISE**2)
        self._theta += gain * (1 - linear / seconds)
        gain[:, None].dot(through[None], outer)
        covariance -= outer
        covariance *= 1 - FORGETTING
        covariance += self._forgotten
        self._set_weights()

    def _set_weights(self) -> None:
        weights = self._theta.tolist()
        self._per_base = weights[0], weights[0] + weights[1]  # in buckets without and with gradient rows
        self._weights = [weight / unit for weight, unit in zip(weights[NUM_BASES:], self._units, strict=True)]

    def error(self, quantile: float = 0.9) -> float:
        """This quantile of the relative errors of late."""
        return float(np.quantile(np.abs(self.errors), quantile)) if self.errors else 0.0
