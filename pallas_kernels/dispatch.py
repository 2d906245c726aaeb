"""Chooses an implementation of an op, and says why the others were refused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op; ``refuse`` returns the reason why it cannot run here, or None."""

    name: str
    function: Callable[..., Any]
    refuse: Callable[..., str | None] = lambda **facts: None


class NoImplementation(ValueError):
    """Every implementation refused; the message carries all reasons."""


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
        reason = named[forced].refuse(**facts)
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
    return {implementation.name: implementation.refuse(**facts) for implementation in implementations}
