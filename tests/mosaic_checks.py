"""What the tests of Mosaic kernels share: which JAX they need, how near is near, what a race looks like.

A module takes the fixture ``no_races`` of tests/kernels/conftest.py for all its tests.
"""

import jax
import pytest

from pallas_kernels.dispatch import MOSAIC, MOSAIC_VERSION, UNKNOWN_VERSION

OLD_JAX = not MOSAIC_VERSION <= jax.__version_info__ < UNKNOWN_VERSION  # or one that is too new
needs_mosaic = pytest.mark.skipif(
    OLD_JAX, reason=f"Mosaic kernels need jax {MOSAIC_VERSION} or later, this is {jax.__version__}"
)
ON_DEVICE = pytest.param(MOSAIC, marks=pytest.mark.gpu)
RACE = "RACE DETECTED"  # the interpreter's detector prints what it finds
TOLERANCE = {"bfloat16": 0.01, "float16": 0.0015}  # of the largest value
