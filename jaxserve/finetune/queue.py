"""Which windows of which jobs go into the next step, and the pages they need.

Windows are as long as a step has room for. Of a deterministic job they are cut by the example alone, and its sequences
run their backward in the order of their examples, so the order in which gradients are summed depends on the data: not
on load, not on the jobs beside it.
"""

from collections.abc import Callable

from jaxserve.finetune.examples import Example
from jaxserve.finetune.job import Batch, Job
from jaxserve.finetune.windows import FinetunePlan, Lane, TrainSequence, WindowRows, example_key, rounded
from jaxserve.kvcache.pages import PagePool


class Running:
    """A job with a lane."""

    def __init__(self, job: Job, lane: Lane):
        self.job = job
        self.lane = lane
        self.held = False  # begins no sequence: it is to be paused, or its newest version has no place yet


class FinetuneQueue:
    """Sequences under way, over the same K/V pages as serving, and over accumulator pages and blocks of the stash of
    their own.

    Args:
      stash_blocks: row blocks whose activations wait for their backward; 0: no sequence has a stash.
    """

    def __init__(
        self,
        pool: PagePool,
        num_slots: int,
        acc_pages: int,
        row_block: int,
        max_window: int,
        *,
        stash_blocks: int = 0,
        clear: Callable[[list[int]], None],
    ):
        self.pool, self.row_block, self.max_window, self._clear = pool, row_block, max_window, clear
        self._slots = list(range(num_slots))
        self._acc = list(range(acc_pages))
        self._stash = list(range(stash_blocks))
        self.stashed = stash_blocks > 0
        self.running: list[Running] = []
        self.active: list[TrainSequence] = []
        self.owner: dict[TrainSequence, tuple[Job, Batch]] = {}  # of the active sequences
        self.num_finished = 0  # sequences that were planned to their end

    @property
    def has_work(self) -> bool:
        """Something is under way or could be begun."""
        return bool(self.active) or any(not (r.held or r.job.idle or r.job.exhausted) for r in self.running)

    def left(self) -> tuple[int, int, bool]:
        """At most so many gradient rows and forward rows could go into the next step, and whether some sequence is
        trained with dropout."""
        backward = forward = 0
        dropout = False
        block = self.row_block
        for seq in self.active:
            if not seq.forward_only:
                backward += rounded(min(seq.remaining, seq.window), block)
            if not seq.backward_begun and seq.forwarded < seq.num_rows:
                forward += rounded(seq.num_rows - seq.forwarded, block)
            if seq.dropout:
                dropout = True
        return backward, forward, dropout

    # plan

    def draft(self, grad_rows: int, chunk_rows: int, usual: int, plain: bool) -> FinetunePlan:
        """The windows of a step with this much room; nothing is begun yet.

        Args:
          usual: gradient rows that steps mostly have room for. Rows that a backward of so many will run forward
            itself are left out of phase F.
          plain: the step's program knows no dropout.
        """
        if self.stashed:
            all_forward = self._forward(chunk_rows, usual, set(), plain)
            ends = {window.seq: window.end for window in all_forward}  # a step's backward follows all of its forward

            def of_forwarded(seq: TrainSequence, room: int) -> WindowRows | None:
                return seq.backward_window(room) if ends.get(seq, seq.forwarded) == seq.num_rows else None

            return FinetunePlan(self._backward(grad_rows, of_forwarded) if grad_rows else (), all_forward)
        ahead: list[WindowRows] = []  # what must go forward beside a backward that begins
        left = chunk_rows

        def with_rows_ahead(seq: TrainSequence, room: int) -> WindowRows | None:
            nonlocal left
            window = seq.backward_window(room)
            if window is None or seq.backward_begun:
                return window
            length = window.start - seq.forwarded
            if not _is_worth_it(window, usual) or rounded(length, self.row_block) > left:
                return None
            if length > 0:
                ahead.append(WindowRows(seq, seq.forwarded, length))
                left -= rounded(length, self.row_block)
            return window

        grads = self._backward(grad_rows, with_rows_ahead) if grad_rows else ()
        taken = {window.seq for window in grads}
        return FinetunePlan(grads, (*ahead, *self._forward(left, usual, taken, plain)))

    def _forward(self, chunk_rows: int, usual: int, taken: set[TrainSequence], plain: bool) -> tuple[WindowRows, ...]:
        """Windows of phase F; ``taken``: sequences that are in the step already."""
        forwards = []
        for seq in self.active:
            if chunk_rows < self.row_block:
                break
            if seq in taken or (plain and seq.dropout):
                continue
            window = seq.forward_window(chunk_rows, usual)
            if window is not None:
                forwards.append(window)
                chunk_rows -= rounded(window.length, self.row_block)
        return tuple(forwards)

    def _backward(
        self, grad_rows: int, window_of: Callable[[TrainSequence, int], WindowRows | None]
    ) -> tuple[WindowRows, ...]:
        """Windows of phase B; ``window_of``: a sequence's next one in so many rows, if it is ready."""
        grads = []
        blocked: set[int] = set()  # lanes whose order forbids more
        for seq in sorted(self.active, key=_not_begun):
            if grad_rows < self.row_block:
                break
            if seq.lane.index in blocked:
                continue
            window = window_of(seq, grad_rows)
            if window is not None:
                grads.append(window)
                grad_rows -= rounded(window.length, self.row_block)
            if (seq.fixed and (window is None or window.start > 0)) or (seq.alone and window is not None):
                blocked.add(seq.lane.index)
        return tuple(grads)

    def begin(self, plan: FinetunePlan) -> None:
        """Notes that these windows go into a step."""
        for window in plan.forwards:
            window.seq.take_forward(window)
        for window in plan.grads:
            window.seq.take_backward(window)

    def admit(self, reserve: int = 0) -> None:
        """Begins sequences of the jobs' batches, job by job in turn, while there are slots and pages; so many pages are
        left to others."""
        jobs = list(self.running)
        while jobs:
            jobs = [running for running in jobs if self._admit_one(running, reserve)]

    def _admit_one(self, running: Running, reserve: int) -> bool:
        job = running.job
        if running.held:
            return False
        if job.batch is None:
            job.batch = job.next_batch()
        batch = job.batch
        if batch is None or not batch.waiting or not self._slots:
            return False
        if job.config.packing and not batch.arranged:
            batch.arrange(self.row_block, self._window_of(job))
        seq = self._sequence(batch.waiting[0], batch, running, reserve)
        if seq is None:
            return False
        batch.waiting.pop(0)
        batch.sequences.append(seq)
        self.active.append(seq)
        self.owner[seq] = (job, batch)
        return True

    def _sequence(self, example: Example, batch: Batch, running: Running, reserve: int) -> TrainSequence | None:
        config, needed = running.job.config, self.pool.pages_for(example.num_tokens - 1)
        num_acc = 0 if batch.forward_only else needed
        num_blocks = 0 if batch.forward_only or not self.stashed else -(-(example.num_tokens - 1) // self.row_block)
        if num_acc > len(self._acc) or num_blocks > len(self._stash) or needed + reserve > self.pool.num_available:
            return None
        pages = self.pool.alloc(needed)
        if pages is None:
            return None
        seq = TrainSequence(
            example.token_ids,
            batch.targets(example),
            running.lane,
            window=self._window_of(running.job),
            fixed=config.deterministic,
            alone=not config.packing,
            forward_only=batch.forward_only,
            dropout=config.dropout if batch.loss_function.dropout and not batch.forward_only else 0.0,
            drop_key=example_key(config.seed, batch.epoch, example.index) if config.dropout else 0,
            row_block=self.row_block,
        )
        seq.slot, seq.pages = self._slots.pop(0), pages
        seq.acc_pages = [self._acc.pop() for _ in range(num_acc)]
        seq.stash_blocks = [self._stash.pop() for _ in range(num_blocks)]
        return seq

    def _window_of(self, job: Job) -> int:
        return min(job.config.window or self.max_window, self.max_window)

    # results

    def retire(self) -> list[tuple[Job, Batch]]:
        """Frees what no later step needs: sequences all of whose rows are planned, and of others the pages behind
        their backward. Returns the batches that this completes.

        Pages may be given away at once: the device runs steps in order.
        """
        for seq in [seq for seq in self.active if seq.done]:
            self._free(seq)
            self.num_finished += 1
        for seq in [seq for seq in self.active if seq.backward_begun]:
            needed = self.pool.pages_for(seq.remaining)
            if needed < len(seq.pages):
                self.pool.free(seq.pages[needed:])
                self._acc.extend(seq.acc_pages[needed:])
                del seq.pages[needed:], seq.acc_pages[needed:]
            blocks = -(-seq.remaining // self.row_block)
            self._stash.extend(seq.stash_blocks[blocks:])
            del seq.stash_blocks[blocks:]
        batches = [(running.job, running.job.batch) for running in self.running]
        return [(job, batch) for job, batch in batches if batch is not None and batch.planned]

    def _free(self, seq: TrainSequence) -> None:
        self.active.remove(seq)
        self.pool.free(seq.pages)
        self._acc.extend(seq.acc_pages)
        self._stash.extend(seq.stash_blocks)
        self._slots.append(seq.slot)
        seq.pages, seq.acc_pages, seq.stash_blocks = [], [], []

    def drop(self, job: Job) -> None:
        """Forgets a job's sequences, wherever they are; its accumulators are set back to zero."""
        self.clear(job)
        self.take_back_all(job)
        self.forget(job)

    def clear(self, job: Job) -> None:
        """Sets the accumulators of what the job has under way back to zero."""
        for seq in self.active:
            if self.owner[seq][0] is job:
                self._clear(seq.acc_pages)

    def forget(self, job: Job) -> None:
        """Takes a job that has no sequence under way off the list."""
        self.running = [running for running in self.running if running.job is not job]

    def give_way(self) -> bool:
        """Frees the youngest sequence that has no backward in any step yet; False when there is none.

        One whose backward has begun cannot be taken back: part of its gradient is summed already.
        """
        for seq in reversed(self.active):
            if not seq.backward_begun:
                self._take_back(seq)
                return True
        return False

    def hold(self, job: Job) -> None:
        """Takes back what the job has begun, but for sequences whose backward has; nothing new begins."""
        for running in self.running:
            running.held |= running.job is job
        for seq in [seq for seq in reversed(self.active) if not seq.backward_begun and self.owner[seq][0] is job]:
            self._take_back(seq)

    def take_back_all(self, job: Job) -> None:
        """Takes back everything, whose accumulators are zero."""
        for seq in [seq for seq in self.active if self.owner[seq][0] is job]:
            self._free(seq)
        self.owner = {key: value for key, value in self.owner.items() if value[0] is not job}

    def go_on(self, job: Job) -> None:
        """The opposite of ``hold``."""
        for running in self.running:
            running.held &= running.job is not job

    def is_idle(self, job: Job) -> bool:
        """No sequence of the job is under way."""
        return not any(self.owner[seq][0] is job for seq in self.active)

    def _take_back(self, seq: TrainSequence) -> None:
        _, batch = self.owner.pop(seq)
        batch.sequences.remove(seq)
        batch.waiting.insert(0, next(e for e in batch.examples if e.token_ids is seq.token_ids))
        self._free(seq)

    def check(self, num_slots: int, acc_pages: int, stash_blocks: int = 0) -> None:
        """Slots, accumulator pages and blocks of the stash are free or owned, once."""
        slots = [*self._slots, *(seq.slot for seq in self.active)]
        acc = [*self._acc, *(page for seq in self.active for page in seq.acc_pages)]
        assert sorted(slots) == list(range(num_slots)), f"{slots=}"
        assert sorted(acc) == list(range(acc_pages)), f"{acc=}"
        stash = [*self._stash, *(block for seq in self.active for block in seq.stash_blocks)]
        assert sorted(stash) == list(range(stash_blocks)), f"{stash=}"


def _not_begun(seq: TrainSequence) -> bool:
    return not seq.backward_begun


def _is_worth_it(window: WindowRows, usual: int) -> bool:
    """Whether to begin a backward here rather than wait for a step with more room. What it leaves over must be run
    forward twice, at half the price of the gradient rows that would lie idle otherwise."""
    seq = window.seq
    return window.start == 0 or seq.fixed or 3 * window.length > min(seq.num_rows, seq.window, usual)
