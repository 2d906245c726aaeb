"""An adapter that is trained by calls instead of by a data set: somebody else's loop says what comes next."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.adapters.weights import AdapterWeights
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Cursor, Dataset
from jaxserve.finetune.examples import Example
from jaxserve.finetune.job import Batch, Job, Loss, Purpose

ENDLESS = 2**31 - 1  # steps; nobody gets there


@dataclass(frozen=True)
class BatchResult:
    """What a call found, by example; entry t of an array is about predicting token t, and entry 0 is zero."""

    losses: list[np.ndarray]  # [S] float32: each token's weighted loss
    logprobs: list[np.ndarray]  # [S] float32, of the tokens under the adapter as it was
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Sum of all."""
        return float(sum(float(losses.sum(dtype=np.float64)) for losses in self.losses))


class Session(Job):
    """A job without an end; its batches are handed in."""

    def __init__(self, adapter: str, config: FinetuneConfig, start: AdapterWeights, tenant: str = ""):
        super().__init__(adapter, config, Dataset(()), start, tenant=tenant)
        self.total_steps = ENDLESS
        self.pending: deque[Batch] = deque()
        self._awaited: set[int] = set()
        self._results: dict[int, BatchResult] = {}
        self._summed: list[Batch] = []  # read, and part of the gradients that no optimizer step has taken

    @property
    def idle(self) -> bool:
        return not (self.pending or self.batch is not None or self.again)

    def hand_in(self, examples: Sequence[Example], purpose: Purpose, loss: Loss) -> Batch:
        """Queues a batch, for ``result``. Its losses are sums, not means."""
        # every call is an epoch of its own: dropout's masks differ between calls
        batch = Batch(self.step, tuple(examples), self.num_batches, Cursor(), purpose, loss, mean=False)
        self.num_batches += 1
        self.pending.append(batch)
        self._awaited.add(batch.serial)
        return batch

    def read(self, batch: Batch) -> None:
        """Takes in a batch that the host has read."""
        if batch.purpose is Purpose.ACCUMULATE and batch.serial not in {b.serial for b in self._summed}:
            self._summed.append(batch)
        if batch.serial in self._awaited:
            of = {id(seq.token_ids): seq for seq in batch.sequences}
            sequences = [of[id(example.token_ids)] for example in batch.examples]
            self._results[batch.serial] = BatchResult([s.losses for s in sequences], [s.logprobs for s in sequences])
            self._awaited.discard(batch.serial)

    def result(self, batch: Batch) -> BatchResult | None:
        """What became of a batch, once; None while it is under way."""
        return self._results.pop(batch.serial, None)

    def withdraw(self, batch: Batch) -> bool:
        """Forgets a batch, whose result nobody waits for. False: it had been begun, and may be in the sums."""
        self._awaited.discard(batch.serial)
        self._results.pop(batch.serial, None)
        if batch in self.pending:
            self.pending.remove(batch)
            return True
        self._summed = [each for each in self._summed if each.serial != batch.serial]
        return False

    def forget_gradients(self) -> None:
        """The sums were taken: nothing of what was read has to be done again."""
        self._summed = []

    def begun(self) -> list[Batch]:
        return list(self._summed)

    def next_batch(self) -> Batch | None:
        if self.again:
            return self.again.pop(0)
        return self.pending.popleft() if self.pending else None

    @property
    def exhausted(self) -> bool:
        return False

    def announce(self) -> None:
        self.note("status", "open for training by calls")
