"""The device mesh: one axis, ``tensor``; one device is a mesh of one."""

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

AXIS = "tensor"
COUNT_FLAG = "xla_force_host_platform_device_count"  # XLA's own way to split a CPU


def make_mesh(tensor_parallel: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over the first ``tensor_parallel`` devices. A CPU that JAX has not used yet is split into as many.

    Raises:
      ValueError: fewer devices than asked for.
    """
    if devices is None:
        _split_cpu(tensor_parallel)
        devices = jax.devices()
    devices = list(devices)
    if not 1 <= tensor_parallel <= len(devices):
        whole_cpu = tensor_parallel > 1 and [device.platform for device in devices] == ["cpu"]
        hint = "; a CPU is split only at JAX's first use in a process" if whole_cpu else ""
        present = f"{len(devices)} devices present{hint}"
        raise ValueError(f"tensor_parallel {tensor_parallel} must be between 1 and the {present}")
    return Mesh(np.array(devices[:tensor_parallel]), (AXIS,))


def _split_cpu(count: int) -> None:
    """Lets JAX's CPU client have ``count`` devices, which share the cores, unless somebody has said how many. One that
    is there already keeps those that it has."""
    said = jax.config.values["jax_num_cpu_devices"] != -1 or COUNT_FLAG in os.environ.get("XLA_FLAGS", "")
    if count > 1 and not said:
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
