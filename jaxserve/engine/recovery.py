"""After a failed step. What it took from the device is gone, so the engine begins anew with what the host has read:
requests run again from their tokens, jobs from their last step. Who is in too many failing steps is given up.
"""

import logging
from collections.abc import Callable

from jaxserve.engine.planner import Planner
from jaxserve.engine.results import News
from jaxserve.errors import EngineError
from jaxserve.finetune.windows import FinetunePlan
from jaxserve.scheduler.plan import Outcome, StepPlan
from jaxserve.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_REPLAYS = 2  # failed steps in a row before the requests in flight are given up


class Recovery:
    """Counts failed steps, and replays what was in them.

    Args:
      rebuild: makes the device's side anew, but for nothing in it; called with the windows of the step that failed.
    """

    def __init__(self, scheduler: Scheduler, planner: Planner, rebuild: Callable[[FinetunePlan | None], None]):
        self._scheduler, self._planner, self._rebuild = scheduler, planner, rebuild
        self._failures = 0  # in a row

    def succeeded(self) -> None:
        """A step has come to its end."""
        self._failures = 0

    def failed(self, error: Exception, plan: StepPlan) -> list[News]:
        """Rebuilds and replays; returns the ends of requests that are given up. To be called where the error is
        handled.

        A step with finetune windows is blamed on them first: the requests go alone in the next one.

        Raises:
          EngineError: an error that is one; replaying would not help.
        """
        windows = plan.finetune is not None
        self._failures += not windows
        logger.exception("step failed (%d in a row%s)", self._failures, ", with finetune windows" if windows else "")
        if isinstance(error, EngineError):
            raise error
        running = list(self._scheduler.running)
        self._planner.forget()
        self._scheduler.reset()
        self._rebuild(plan.finetune)
        if self._failures <= MAX_REPLAYS:
            return []
        lost = [seq for first in running for seq in self._scheduler.abort(first.request.id)]
        for seq in lost:
            seq.finish_reason = "error"
        reason = f"the engine's step failed {self._failures} times in a row"
        self._failures = 0
        return [News(Outcome(seq, None, "error", None), None, [], reason) for seq in lost]
