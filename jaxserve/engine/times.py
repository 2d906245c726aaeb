"""How long a step of each bucket takes: calibrated at start-up, corrected by every step that is measured."""

from dataclasses import dataclass, field

from jaxserve.engine.buckets import Bucket

WEIGHT = 0.1  # of a new measurement


@dataclass
class StepTimes:
    """An exponential mean of seconds per bucket."""

    seconds: dict[Bucket, float] = field(default_factory=dict)

    def observe(self, bucket: Bucket, seconds: float) -> None:
        known = self.seconds.get(bucket)
        self.seconds[bucket] = seconds if known is None else (1 - WEIGHT) * known + WEIGHT * seconds

    def predict(self, bucket: Bucket) -> float:
        """Seconds; infinite for a bucket that never ran."""
        return self.seconds.get(bucket, float("inf"))
