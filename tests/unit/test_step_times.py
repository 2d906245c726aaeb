"""The model of step times: calibrated, corrected by what is measured, undisturbed by hiccups."""

import numpy as np
import pytest

from jaxserve.engine.buckets import Bucket, Buckets
from jaxserve.engine.times import StepLoad, StepTimes

BUCKETS = Buckets.make(256, 64, 16, max_grad_rows=128)
MAX_KEYS = 1024


def base(bucket: Bucket) -> float:
    return 1e-3 + 2e-5 * bucket.rows + 4e-5 * bucket.grad_rows


def real(load: StepLoad) -> float:
    """A device whose attention costs more the longer the contexts are."""
    attention = 4e-8 * load.decode_keys + 2e-8 * load.block_pairs + 3e-8 * load.grad_pairs
    attention += 4e-8 * load.bucket.grad_rows * load.grad_span
    return base(load.bucket) + attention + 1e-6 * load.adapter_rows


def random_load(rng: np.random.Generator) -> StepLoad:
    bucket = list(BUCKETS)[rng.integers(len(list(BUCKETS)))]
    decodes = int(rng.integers(min(bucket.decode_rows, 1), bucket.decode_rows + 1))
    span = int(rng.integers(1, MAX_KEYS))
    return StepLoad(
        bucket,
        decode_keys=decodes * span // 2,
        decode_span=span,
        block_pairs=bucket.block_rows * int(rng.integers(1, MAX_KEYS)),
        block_span=int(rng.integers(1, MAX_KEYS)),
        grad_pairs=bucket.grad_rows * int(rng.integers(1, MAX_KEYS)),
        grad_span=int(rng.integers(1, MAX_KEYS)),
        adapter_rows=int(rng.integers(bucket.rows)),
        grad_rows=bucket.grad_rows,
    )


@pytest.fixture
def times() -> StepTimes:
    times = StepTimes(BUCKETS, MAX_KEYS)
    for bucket in BUCKETS:
        times.calibrate(bucket, False, base(bucket))
    return times


def errors(times, rng, slow=1.0, steps=200):
    found = []
    for _ in range(steps):
        load = random_load(rng)
        found.append(abs(times.predict(load) / (slow * real(load)) - 1))
        times.observe(load, slow * real(load) * (1 + 0.02 * rng.standard_normal()))
    return np.array(found)


def test_it_learns_what_grows_with_the_contexts(times):
    rng = np.random.default_rng(0)
    first = errors(times, rng)
    later = errors(times, rng)
    assert np.quantile(first[:20], 0.9) > 0.1  # calibration alone does not know of it
    assert np.quantile(later, 0.9) < 0.05
    assert times.error() < 0.06


def test_what_a_load_takes_in_many_buckets_is_what_it_takes_in_each(times):
    rng = np.random.default_rng(3)
    errors(times, rng)
    extended = Bucket(1024, 64)
    times.calibrate(extended, True, 0.1)
    load, buckets = random_load(rng), [*BUCKETS, extended, Bucket(2048, 64)]
    alone = [times.predict(load._replace(bucket=bucket, extended=bucket == extended)) for bucket in buckets]
    assert times.predict_each(load, buckets) == pytest.approx(alone, rel=1e-12)


def test_what_steps_with_gradient_rows_take_too_long_is_learnt_of_all_of_them_and_of_no_others(times):
    plain, trains = ([b for b in BUCKETS if (b.grad_rows > 0) == grads] for grads in (False, True))
    for _ in range(100):
        times.observe(StepLoad(trains[0]), 1.5 * base(trains[0]))
        times.observe(StepLoad(plain[0]), base(plain[0]))
    off = [times.predict(StepLoad(bucket)) / base(bucket) for bucket in (plain[-1], trains[-1])]
    assert off == pytest.approx([1.0, 1.5], rel=0.2)


def test_it_follows_a_device_that_slows_down_and_comes_back(times):
    rng = np.random.default_rng(1)
    errors(times, rng)
    for slow in (2.0, 1.0):
        errors(times, rng, slow, steps=60)
        assert np.median(errors(times, rng, slow, steps=60)) < 0.1


def test_a_hiccup_does_not_spoil_it(times):
    rng = np.random.default_rng(2)
    errors(times, rng)
    load = random_load(rng)
    before = times.predict(load)
    times.observe(load, 100 * real(load))
    assert times.predict(load) < 2 * before
    errors(times, rng, steps=60)
    assert np.median(errors(times, rng, steps=60)) < 0.05


def test_a_step_that_never_ran_is_not_taken_for_a_short_one(times):
    assert times.predict(StepLoad(Bucket(1024, 64))) == float("inf")
    assert times.predict(StepLoad(next(iter(BUCKETS)), extended=True)) == float("inf")


def test_its_error_is_unknown_before_anything_was_measured():
    assert StepTimes().error() == 0.0


def test_a_bucket_that_was_measured_wrongly_at_start_up_is_put_right_by_its_steps(times):
    wrong, other = list(BUCKETS)[-1], next(iter(BUCKETS))
    times.calibrate(wrong, False, 4 * base(wrong))
    for _ in range(200):
        for bucket in (wrong, other):
            times.observe(StepLoad(bucket), base(bucket))
    for bucket in (wrong, other):
        assert times.predict(StepLoad(bucket)) == pytest.approx(base(bucket), rel=0.1)
