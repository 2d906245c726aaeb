"""Which windows of which jobs go into the next step, and the pages they need.

Within a lane, sequences run their backward in the order of their examples, so the order in which gradients are summed
depends on the data alone: not on load, not on the jobs beside it.
"""

from collections.abc import Callable

from jaxserve.finetune.examples import Example
from jaxserve.finetune.job import Batch, Job
from jaxserve.finetune.windows import FinetunePlan, Lane, TrainSequence, WindowRows, cut, example_key
from jaxserve.kvcache.pages import PagePool


class Running:
    """A job with a lane."""

    def __init__(self, job: Job, lane: Lane):
        self.job = job
        self.lane = lane
        self.held = False  # begins no sequence: it is to be paused, or its newest version has no place yet


class FinetuneQueue:
    """Sequences under way, over the same K/V pages as serving and over accumulator pages of their own."""

    def __init__(
        self,
        pool: PagePool,
        num_slots: int,
        acc_pages: int,
        row_block: int,
        max_window: int,
        *,
        clear: Callable[[list[int]], None],
    ):
        self.pool, self.row_block, self.max_window, self._clear = pool, row_block, max_window, clear
        self._slots = list(range(num_slots))
        self._acc = list(range(acc_pages))
        self.running: list[Running] = []
        self.active: list[TrainSequence] = []
        self.owner: dict[int, tuple[Job, Batch]] = {}  # by id of an active sequence

    # plan

    def plan(self, grad_rows: int, chunk_rows: int) -> FinetunePlan | None:
        """Windows for a step with this much room; None when nothing fits or nothing is left."""
        for running in self.running:
            self._admit(running)
        grads, forwards, blocked = [], [], set()
        for seq in self.active:
            lane = seq.lane.index
            while (window := seq.next_backward) and lane not in blocked and self._rows(window) <= grad_rows:
                if any(held.seq is seq for held in grads):
                    break  # one window of a sequence per step: the next needs this one's accumulators
                grads.append(window)
                grad_rows -= self._rows(window)
                seq.num_backward += 1
            if not seq.done:
                blocked.add(lane)
            window = seq.next_forward
            if window and self._rows(window) <= chunk_rows:
                forwards.append(window)
                chunk_rows -= self._rows(window)
                seq.num_forward += 1
        return FinetunePlan(tuple(grads), tuple(forwards)) if grads or forwards else None

    def _rows(self, window: WindowRows) -> int:
        return -(-window.length // self.row_block) * self.row_block

    def _admit(self, running: Running) -> None:
        """Begins sequences of the job's batch while there are slots and pages."""
        job = running.job
        if running.held:
            return
        if job.batch is None:
            job.batch = job.next_batch()
        batch = job.batch
        while batch is not None and batch.waiting and self._slots:
            seq = self._sequence(batch.waiting[0], batch, running)
            if seq is None:
                return
            batch.waiting.pop(0)
            batch.sequences.append(seq)
            self.active.append(seq)
            self.owner[id(seq)] = (job, batch)

    def _sequence(self, example: Example, batch: Batch, running: Running) -> TrainSequence | None:
        config, needed = running.job.config, self.pool.pages_for(example.num_tokens - 1)
        num_acc = 0 if batch.forward_only else needed
        if num_acc > len(self._acc):
            return None
        pages = self.pool.alloc(needed)
        if pages is None:
            return None
        seq = TrainSequence(
            example.token_ids,
            batch.targets(example),
            running.lane,
            cut(example.num_tokens, min(config.window or self.max_window, self.max_window)),
            forward_only=batch.forward_only,
            dropout=0.0 if batch.forward_only else config.dropout,
            drop_key=example_key(config.seed, batch.epoch, example.index),
        )
        seq.slot, seq.pages = self._slots.pop(0), pages
        seq.acc_pages = [self._acc.pop() for _ in range(num_acc)]
        return seq

    # results

    def retire(self) -> list[tuple[Job, Batch]]:
        """Frees sequences all of whose windows are planned; returns the batches that this completes.

        Their pages may be given away at once: the device runs steps in order.
        """
        for seq in [seq for seq in self.active if seq.done]:
            self._free(seq)
        complete = [(r.job, r.job.batch) for r in self.running if r.job.batch is not None and r.job.batch.planned]
        return [(job, batch) for job, batch in complete if batch is not None]

    def _free(self, seq: TrainSequence) -> None:
        self.active.remove(seq)
        self.pool.free(seq.pages)
        self._acc.extend(seq.acc_pages)
        self._slots.append(seq.slot)
        seq.pages, seq.acc_pages = [], []

    def drop(self, job: Job) -> None:
        """Forgets a job's sequences, wherever they are; its accumulators are set back to zero."""
        for seq in [seq for seq in self.active if self.owner[id(seq)][0] is job]:
            self._clear(seq.acc_pages)
            self._free(seq)
        self.owner = {key: value for key, value in self.owner.items() if value[0] is not job}
        self.forget(job)

    def forget(self, job: Job) -> None:
        """Takes a job that has no sequence under way off the list."""
        self.running = [running for running in self.running if running.job is not job]

    def give_way(self) -> bool:
        """Frees the youngest sequence that has no backward in any step yet; False when there is none.

        One whose backward has begun cannot be taken back: part of its gradient is summed already.
        """
        for seq in reversed(self.active):
            if seq.num_backward == 0:
                self._take_back(seq)
                return True
        return False

    def hold(self, job: Job) -> None:
        """Takes back what the job has begun, but for sequences whose backward has; nothing new begins."""
        for running in self.running:
            running.held |= running.job is job
        for seq in [seq for seq in reversed(self.active) if seq.num_backward == 0 and self.owner[id(seq)][0] is job]:
            self._take_back(seq)

    def take_back_all(self, job: Job) -> None:
        """Takes back everything, after the device has lost it."""
        for seq in [seq for seq in self.active if self.owner[id(seq)][0] is job]:
            self._free(seq)
        self.owner = {key: value for key, value in self.owner.items() if value[0] is not job}

    def go_on(self, job: Job) -> None:
        """The opposite of ``hold``."""
        for running in self.running:
            running.held &= running.job is not job

    def is_idle(self, job: Job) -> bool:
        """No sequence of the job is under way."""
        return not any(self.owner[id(seq)][0] is job for seq in self.active)

    def _take_back(self, seq: TrainSequence) -> None:
        _, batch = self.owner.pop(id(seq))
        batch.sequences.remove(seq)
        batch.waiting.insert(0, next(e for e in batch.examples if e.token_ids is seq.token_ids))
        self._free(seq)

    def check(self, num_slots: int, acc_pages: int) -> None:
        """Slots and accumulator pages are free or owned, once."""
        slots = [*self._slots, *(seq.slot for seq in self.active)]
        acc = [*self._acc, *(page for seq in self.active for page in seq.acc_pages)]
        assert sorted(slots) == list(range(num_slots)), f"{slots=}"
        assert sorted(acc) == list(range(acc_pages)), f"{acc=}"
