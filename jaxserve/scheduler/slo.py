"""How long the next step may take, so that running requests keep their time per output token and waiting ones their
time to the first.

The objective is about a request's mean time per output token, so what it gained by short steps may be spent in a long
one: token j is due (j - 1) * tpot after the first. Keeping every token's due time keeps the mean at whatever token the
request ends.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxserve.scheduler.request import NEVER, Objective, Sequence

MARGIN = 0.03  # of every objective, kept back
FIRST_TOKEN_STEPS = 3  # a request comes into a step under way, waits for the next one, and is in the third
MAX_CREDIT = 1.0  # seconds that the floor may save up


@dataclass
class LatencyBudget:
    """Turns the objectives of requests into the seconds of a step.

    Args:
      objectives: those that a request may come with.
      floor: the share of the device's time that finetuning gets whatever the objectives say.
    """

    objectives: tuple[Objective, ...] = ()
    floor: float = 0.0
    credit: float = field(default=0.0, init=False)  # seconds that the floor has earned and finetuning has not used

    def __post_init__(self):
        ttft = min((o.ttft for o in self.objectives), default=NEVER)
        self.arrival_limit = ttft * (1 - MARGIN) / FIRST_TOKEN_STEPS  # a step's, for those who come while it runs
        self.tpot = min((o.tpot for o in self.objectives), default=NEVER) * (1 - MARGIN)  # the shortest
        self.has_tpot = self.tpot < NEVER
        self.has_promises = self.has_tpot or ttft < NEVER

    def slack(self, decoding: Iterable[Sequence], start: float, shortest: float, planned: int = 0) -> float:
        """The most seconds that a step may take which begins at ``start``, by the tokens it brings.

        Args:
          shortest: seconds of a step that has nothing else in it.
          planned: tokens of this step that the sequences count as pending already.

        A request that has fallen behind and cannot catch up any more even with ``shortest`` steps has lost already;
        for its sake no step is longer than its objective, but none has to be shorter either.
        """
        least = NEVER
        if not self.has_tpot:
            return least
        objective, tpot = None, NEVER
        for seq in decoding:
            if seq.request.objective is not objective:
                objective = seq.request.objective
                tpot = objective.tpot * (1 - MARGIN)
            if tpot == NEVER:
                continue
            known, first = seq.num_drawn - seq.prompt_len - planned, seq.first_token_at
            slack = (start if first is None else first) + known * tpot - start
            if slack < tpot:
                left = seq.max_total - seq.prompt_len - known
                if slack - tpot + left * (tpot - shortest) < 0:
                    slack = tpot
            if slack < least:
                least = slack
        return least

    def first_token_risk(self, ahead: Iterable[tuple[Sequence, int]], now: float, rows_per_second: float) -> bool:
        """Whether some request would miss its first token's objective if prompts went on at this pace.

        Args:
          ahead: requests without a first token, in the order in which they are served, each with its prompt rows left.
        """
        rows = 0
        for seq, left in ahead:
            rows += left
            due = seq.request.arrival + seq.request.objective.ttft * (1 - MARGIN)
            if now < due < now + rows / rows_per_second:
                return True
        return False

    def earn(self, seconds: float) -> None:
        """Notes that the device was busy for so long; the floor saves up its share."""
        self.credit = min(self.credit + self.floor * seconds, MAX_CREDIT)

    def spend(self, seconds: float) -> None:
        """Notes what finetuning added to a step."""
        self.credit = max(self.credit - seconds, 0.0)
