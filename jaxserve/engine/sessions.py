"""What training by calls does to a session between its batches: optimizer steps, and its whole state out and in."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxserve.engine.job_programs import Hyper
from jaxserve.engine.lane_sums import LaneSums
from jaxserve.engine.training import Progress, Training
from jaxserve.finetune.session import Session


class Sessions:
    """The sessions among an engine's jobs; each must be idle when it is named here.

    Args:
      publish: makes a job's masters the newest version of its adapter.
    """

    def __init__(self, trainings: Mapping[str, Training], sums: LaneSums, publish: Callable[[Training], None]):
        self._trainings, self._sums, self._publish = trainings, sums, publish

    def _of(self, session: Session) -> Training:
        assert session.idle, session
        return self._trainings[session.id]

    def optim_step(self, session: Session, hyper: Hyper) -> tuple[float, bool]:
        """Takes a session's gradients: (their norm, whether they were finite and so applied)."""
        training = self._of(session)
        now, gradients = training.now, self._sums.take(training)
        apply = self._sums.programs(training.shapes).apply
        masters, optimizer, norm = apply(now.masters, now.optimizer, gradients, hyper, training.shares)
        size = float(norm)
        session.forget_gradients()
        training.loaded = None
        if not np.isfinite(size):
            return size, False
        session.step += 1
        training.now = training.read = Progress(masters, optimizer, session.step, now.cursor)
        self._publish(training)
        return size, True

    def state_of(self, session: Session) -> dict[str, Any]:
        """Everything of a session that is an array: parameters, moments, gradients so far."""
        training = self._of(session)
        now, gradients = training.now, self._sums.to_host(training)
        return {"masters": now.masters, "optimizer": now.optimizer, "gradients": gradients}

    def set_state(self, session: Session, state: Any, step: int, calls: int) -> None:
        """The opposite of ``state_of``; ``state`` may be on the host."""
        training = self._of(session)
        now = training.now
        masters, optimizer = jax.tree.map(
            lambda new, old: jax.device_put(new, old.sharding),
            (state["masters"], state["optimizer"]),
            (now.masters, now.optimizer),
        )
        training.now = training.read = Progress(masters, optimizer, step, now.cursor)
        training.loaded = self._sums.from_host(training, state["gradients"])
        session.step, session.num_batches = step, calls
        session.forget_gradients()
        self._sums.write(training, training.loaded)
        self._publish(training)
