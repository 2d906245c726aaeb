"""Chooses an implementation of an op, and says why the others were refused."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax

from pallas_kernels import lowered

MOSAIC_VERSION, UNKNOWN_VERSION = (0, 11, 2), (0, 13)  # of JAX: Mosaic kernels are written for those between
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
MOSAIC, INTERPRETED = "mosaic", "mosaic_interpreted"
COPY_BYTES, COPY_SIDE = 16, 256  # of a kernel's bulk copies: multiples of so many bytes, elements of an axis at most
CORES = 132  # multiprocessors of an H100 or H200, where the device does not say


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op; ``refuse`` returns the reason why it cannot run here, or None."""

    name: str
    function: Callable[..., Any]
    refuse: Callable[..., str | None] = lambda **facts: None


class NoImplementation(ValueError):
    """Every implementation refused; the message carries all reasons."""


@dataclass(frozen=True)
class Target:
    """The device that a program is made for: not always one of this machine."""

    platform: str
    kind: str
    cores: int | None = None


def target() -> Target | None:
    """The device of the mesh that the code being traced runs on (``shard_map``); None: no mesh, so nobody knows."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else Target(device.platform, device.device_kind, device.num_cores)


def num_cores() -> int:
    """Multiprocessors of the device that the code being traced is for."""
    device = target()
    return (device and device.cores) or CORES


def choose(
    op: str, implementations: tuple[Implementation, ...], forced: str | None = None, **facts: Any
) -> Implementation:
    """Returns the forced implementation, or the first that does not refuse ``facts`` (best first).

    Raises:
      NoImplementation: an unknown name, a forced implementation that refuses, or all refuse.
    """
    if forced is not None:
        named = {implementation.name: implementation for implementation in implementations}
        if forced not in named:
            raise NoImplementation(f"{op}: no implementation {forced!r}; there are {sorted(named)}")
        reason = named[forced].refuse(**facts, forced=True)
        if reason:
            raise NoImplementation(f"{op}: {forced} refused: {reason}")
        return named[forced]
    reasons = explain(implementations, **facts)
    for implementation in implementations:
        if reasons[implementation.name] is None:
            return implementation
    raise NoImplementation(f"{op}: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def explain(implementations: tuple[Implementation, ...], **facts: Any) -> dict[str, str | None]:
    """The reason of each implementation against these facts; None where it would run."""
    return {implementation.name: implementation.refuse(**facts, forced=False) for implementation in implementations}


def mosaic_pair(module: str, refuse: Callable[..., str | None]) -> tuple[Implementation, Implementation]:
    """A Pallas Mosaic GPU kernel, on a Hopper GPU and in the interpreter that reports data races.

    Args:
      module: has ``run(*arguments, interpret=..., **settings)``. Imported by the first call: other JAX versions can't.
      refuse: the kernel's own reasons; takes the op's facts.
    """

    def on_gpu(*args: Any, **settings: Any) -> Any:
        return lowered.call(import_module(module).run, *args, **settings, interpret=False)

    def in_interpreter(*args: Any, **settings: Any) -> Any:
        return import_module(module).run(*args, **settings, interpret=True)

    def refuse_hardware(*, forced: bool, **facts: Any) -> str | None:
        return _other_jax() or _not_hopper(target(), forced) or refuse(**facts)

    def refuse_interpreter(*, forced: bool, **facts: Any) -> str | None:
        return _other_jax() or (None if forced else "the interpreter is for tests, which name it") or refuse(**facts)

    return (
        Implementation(MOSAIC, on_gpu, refuse_hardware),
        Implementation(INTERPRETED, in_interpreter, refuse_interpreter),
    )


def _other_jax() -> str | None:
    if MOSAIC_VERSION <= jax.__version_info__ < UNKNOWN_VERSION:
        return None
    least, beyond = (".".join(map(str, version)) for version in (MOSAIC_VERSION, UNKNOWN_VERSION))
    return f"Pallas Mosaic GPU kernels need jax {least} or later, before {beyond}; this is {jax.__version__}"


def _not_hopper(target: Target | None, forced: bool) -> str | None:
    if target is None:
        return None if forced else "no mesh says which device this is for, and nobody named the kernel"
    if target.platform != "gpu" or not HOPPER.search(target.kind):
        return f"the kernel is for Hopper GPUs (H100, H200), this is for {target.kind} ({target.platform})"
    return None
