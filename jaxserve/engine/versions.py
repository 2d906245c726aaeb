"""The versions of an adapter that its training makes: put into the store, given a place in the bank, written there by
the device. No file and no copy on the host is between a step and the requests that it answers.
"""

import itertools
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.adapters.bank import Bank, sites_touched
from jaxserve.adapters.residency import Residency
from jaxserve.adapters.scales import Scales, fused_inputs
from jaxserve.adapters.store import AdapterStore, AdapterVersion
from jaxserve.engine.lane_sums import LaneSums
from jaxserve.engine.lanes import weights_of
from jaxserve.engine.training import Publisher, Training
from jaxserve.finetune.live import LiveWeights
from jaxserve.finetune.windows import Lane


class Versions:
    """The newest version of every job, pinned in the bank while its job has a lane."""

    def __init__(self, trainings: Mapping[str, Training], sums: LaneSums, residency: Residency, store: AdapterStore):
        self._trainings, self._sums, self._residency, self._store = trainings, sums, residency, store
        # names no content twice: a step may be made again, of other masters, after a failure or from a saved state
        self._life, self._numbers = secrets.token_hex(8), itertools.count()

    def make_resident(self, training: Training) -> bool:
        """Publishes the job's version if there is none, and pins it in the bank; False: there is no room now."""
        if training.version is None:
            self._put(training)
        assert training.version is not None
        training.resident = training.resident or self._residency.try_acquire(training.version)
        return training.resident

    def publish(self, training: Training) -> bool:
        """Makes the masters the newest version of the adapter: on the device, in the next step. False: requests hold
        so many versions that the bank has no room."""
        old = training.version
        assert old is not None
        self._put(training)
        if training.resident:
            self._residency.release(old)
        training.resident = False
        made = self.make_resident(training)
        self._residency.drop(old)
        return made or self.make_resident(training)

    def _put(self, training: Training) -> None:
        live = LiveWeights(training.job.start, training.now.masters, weights_of, f"{self._life} {next(self._numbers)}")
        live.source = training.publisher
        training.version = self._store.put(training.job.adapter, live)
        training.job.version = training.version.version

    def unpin(self, training: Training) -> None:
        """The job has no lane any more: its version may leave the bank."""
        if training.resident:
            self._residency.release(training.version)
            training.resident = False

    def lane_of(self, training: Training) -> Lane:
        """What a job's windows say of its adapter: where it lies, and where its gradients go."""
        assert training.lane is not None
        start, pages = training.job.start, self._residency.pages_of(training.version)
        sites = sites_touched(sorted({member for _, member in start.pairs}))
        lane_pages = tuple(self._sums.pages(training).tolist())[: len(pages)]
        return Lane(training.lane, pages, sites, lane_pages, training.scaled, fused_inputs(start))

    def upload(
        self, version: AdapterVersion, pages: list[int], bank: Bank, scales: Scales | None, params: Any
    ) -> tuple[Bank, Scales | None]:
        """Writes a version that was made here into bank pages; ``params`` is the base model, for DoRA."""
        live = version.weights
        assert isinstance(live, LiveWeights), version
        source: Publisher = live.source
        bank, scales, norms = self._sums.programs(source.shapes, scales is not None).publish(
            bank, scales, params if source.needs_model else None, live.masters, np.array(pages, np.int32),
            source.factors,
        )  # fmt: skip
        for training in self._trainings.values():
            if training.version is version:
                training.norms = norms
        return bank, scales
