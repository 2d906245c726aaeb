"""Who goes first: the order in which requests start, and in which running ones are preempted."""

from collections.abc import Iterable
from collections.abc import Sequence as Values
from typing import Protocol

from jaxserve.scheduler.request import Request, Sequence


class Policy(Protocol):
    """``rank`` orders sequences for good; ``order`` may look at the clock and at anything else it keeps."""

    def rank(self, request: Request) -> tuple:
        """Smaller starts earlier and is preempted later. Ties are broken by the order of arrival at the scheduler."""
        ...

    def order(self, waiting: Values[Sequence], now: float) -> Iterable[Sequence]:
        """The sequences to start, first one first; ``waiting`` comes sorted by rank."""
        ...


class Fcfs:
    """First come, first served."""

    def rank(self, request: Request) -> tuple:
        return (request.arrival,)

    def order(self, waiting: Values[Sequence], now: float) -> Iterable[Sequence]:
        return waiting


class Priority(Fcfs):
    """Lower priority values first, first come first served among equals."""

    def rank(self, request: Request) -> tuple:
        return (request.priority, request.arrival)


POLICIES = {"fcfs": Fcfs, "priority": Priority}
