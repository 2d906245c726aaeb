"""Who goes first: the order in which requests start, and in which running ones are preempted."""

import heapq
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Values
from typing import Protocol

from jaxserve.scheduler.request import Request, Sequence

PROMPT_TOKEN, OUTPUT_TOKEN = 1.0, 2.0  # what a token is charged (Sheng et al., section 4.1)
FORWARD_TOKEN, GRADIENT_TOKEN = 1.0, 2.0  # of finetuning: forward alone, forward and backward
MAX_TENANTS = 10_000  # whose counters are kept


class Policy(Protocol):
    """``rank`` orders sequences for good; ``order`` may look at the clock and at anything else it keeps."""

    def rank(self, request: Request) -> tuple:
        """Smaller starts earlier and is preempted later. Ties are broken by the order of arrival at the scheduler."""
        ...

    def order(self, waiting: Values[Sequence], now: float) -> Iterable[Sequence]:
        """The sequences to start, first one first; ``waiting`` comes sorted by rank."""
        ...

    def enter(self, seq: Sequence) -> None:
        """Notes that a sequence waits, for the first time or again."""
        ...

    def leave(self, seq: Sequence) -> None:
        """Notes that it waits no more."""
        ...

    def charge(self, tenant: str, cost: float) -> None:
        """Notes what was done for a tenant."""
        ...

    def charge_outputs(self, sequences: Iterable[Sequence]) -> None:
        """Notes that each of these had one more token."""
        ...

    def served(self, tenant: str) -> float:
        """What was charged, as far as it matters who was served less."""
        ...


class Fcfs:
    """First come, first served."""

    def rank(self, request: Request) -> tuple:
        return (request.arrival,)

    def order(self, waiting: Values[Sequence], now: float) -> Iterable[Sequence]:
        return waiting

    def enter(self, seq: Sequence) -> None: ...

    def leave(self, seq: Sequence) -> None: ...

    def charge(self, tenant: str, cost: float) -> None: ...

    def charge_outputs(self, sequences: Iterable[Sequence]) -> None: ...

    def served(self, tenant: str) -> float:
        return 0.0


class Priority(Fcfs):
    """Lower priority values first, first come first served among equals."""

    def rank(self, request: Request) -> tuple:
        return (request.priority, request.arrival)


class Fair(Fcfs):
    """The tenant who has been served least goes first, first come first served within a tenant.

    Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, algorithm 2): two
    tenants who both have requests waiting differ in service by at most twice what one prompt, or one step's full batch
    of outputs kept to its end, is charged. A tenant who comes back is lifted to the least of those who wait: having
    been away earns nothing. Finetuning is charged to the tenant of its job.
    """

    def __init__(self):
        self.counters: dict[str, float] = defaultdict(float)
        self._waiting: dict[str, list[Sequence]] = {}  # by rank, of tenants who have any
        self._last = ""  # who was the last to have nothing waiting any more

    def order(self, waiting: Values[Sequence], now: float) -> Iterator[Sequence]:
        """A sequence that was started must have been charged when the next one is asked for."""
        heads = [(self.counters[tenant], queue[0].rank, tenant, 0) for tenant, queue in self._waiting.items()]
        heapq.heapify(heads)
        while heads:
            _, _, tenant, place = heapq.heappop(heads)
            queue = self._waiting[tenant]
            yield queue[place]
            if place + 1 < len(queue):
                heapq.heappush(heads, (self.counters[tenant], queue[place + 1].rank, tenant, place + 1))

    def enter(self, seq: Sequence) -> None:
        tenant = seq.request.tenant
        if tenant not in self._waiting:
            if not seq.num_preempted:
                others = [self.counters[other] for other in self._waiting] or [self.counters[self._last]]
                self.counters[tenant] = max(self.counters[tenant], min(others))
                self._forget_some()
            self._waiting[tenant] = []
        insort(self._waiting[tenant], seq, key=_rank)

    def leave(self, seq: Sequence) -> None:
        tenant = seq.request.tenant
        queue = self._waiting[tenant]
        del queue[bisect_left(queue, seq.rank, key=_rank)]
        if not queue:
            del self._waiting[tenant]
            self._last = tenant

    def charge(self, tenant: str, cost: float) -> None:
        self.counters[tenant] += cost

    def charge_outputs(self, sequences: Iterable[Sequence]) -> None:
        for seq in sequences:
            self.charge(seq.request.tenant, OUTPUT_TOKEN)

    def served(self, tenant: str) -> float:
        return self.counters[tenant]

    def _forget_some(self) -> None:
        """Of too many tenants, those who were served least and have nothing waiting: they would be lifted anyway."""
        if len(self.counters) > MAX_TENANTS:
            idle = sorted(self.counters.keys() - self._waiting.keys() - {self._last}, key=self.counters.__getitem__)
            for tenant in idle[: len(idle) // 2]:
                del self.counters[tenant]


def _rank(seq: Sequence) -> tuple:
    return seq.rank


POLICIES = {"fcfs": Fcfs, "priority": Priority, "fair": Fair}
