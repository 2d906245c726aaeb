"""The device mesh: one axis, ``tensor``; one device is a mesh of one."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

AXIS = "tensor"


def make_mesh(tensor_parallel: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over the first ``tensor_parallel`` devices.

    Raises:
      ValueError: fewer devices than asked for.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not 1 <= tensor_parallel <= len(devices):
        raise ValueError(f"tensor_parallel {tensor_parallel} must be between 1 and the {len(devices)} devices present")
    return Mesh(np.array(devices[:tensor_parallel]), (AXIS,))
