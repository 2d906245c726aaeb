"""How requests and finetuning share one device: together in every step, or by turns.

The alternatives to co-serving are here to be measured against, in the same engine: FlexLLM's baselines (arXiv
2402.18789, section 8). Turns take whole sequences, as those do.
"""

from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jaxserve.engine.planner import Planned, Planner


class Turn(Enum):
    """Who is in the next step."""

    TOGETHER = auto()
    REQUESTS = auto()
    FINETUNE = auto()


class Sharing(Protocol):
    """Decides whose turn it is."""

    def turn(self, planner: "Planner") -> Turn:
        """Whose step the next one is."""
        ...

    def planned(self, planned: "Planned") -> None:
        """Notes what came of it."""
        ...


class CoServing:
    """Both in every step, by the latency budget."""

    def turn(self, planner: "Planner") -> Turn:
        return Turn.TOGETHER

    def planned(self, planned: "Planned") -> None: ...


class RequestsOnly(CoServing):
    """Finetuning waits for ever."""

    def turn(self, planner: "Planner") -> Turn:
        return Turn.REQUESTS


class FinetuneOnly(CoServing):
    """Requests wait while there is anything to finetune."""

    def turn(self, planner: "Planner") -> Turn:
        return Turn.FINETUNE


class Temporal:
    """One sequence is finetuned on, alone and from end to end, after every ``every`` steps of requests, and whenever
    there are none. ``every`` None: only then."""

    def __init__(self, every: int | None):
        self.every = every
        self._steps = 0  # of requests since the last turn of finetuning
        self._until: int | None = None  # sequences that will have been finished at the end of this turn

    def turn(self, planner: "Planner") -> Turn:
        assert planner.finetuning is not None
        queue = planner.finetuning.queue
        if self._until is not None and queue.num_finished < self._until:
            return Turn.FINETUNE
        self._until = None
        due = self.every is not None and self._steps >= self.every
        if (due or not planner.scheduler.has_requests) and queue.has_work:
            self._until = queue.num_finished + 1
            self._steps = 0
            return Turn.FINETUNE
        return Turn.REQUESTS

    def planned(self, planned: "Planned") -> None:
        self._steps += planned.plan.finetune is None


def sharing(name: str) -> Sharing:
    """coserve, inference-only, finetune-only, temporal:N or temporal-dynamic.

    Raises:
      ValueError: no such name.
    """
    plain = {"coserve": CoServing, "inference-only": RequestsOnly, "finetune-only": FinetuneOnly}
    if name in plain:
        return plain[name]()
    if name == "temporal-dynamic":
        return Temporal(None)
    kind, _, every = name.partition(":")
    if kind == "temporal" and every.isdecimal() and int(every) > 0:
        return Temporal(int(every))
    raise ValueError(f"{name!r} is not one of {', '.join(plain)}, temporal:N, temporal-dynamic")
