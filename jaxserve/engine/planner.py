"""One step's work: requests first, finetuning in what their latency objectives leave.

Plain Python over a scheduler, a queue of finetune windows and a model of step times: the engine's loop and the
simulator's are both built around it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from itertools import chain
from typing import NamedTuple, Protocol

from jaxserve.engine.buckets import Bucket, Buckets
from jaxserve.engine.sharing import CoServing, Sharing, Turn
from jaxserve.engine.times import StepLoad, StepTimes
from jaxserve.finetune.queue import FinetuneQueue
from jaxserve.finetune.windows import FinetunePlan, WindowRows, total_rows
from jaxserve.scheduler.plan import NO_REQUESTS, StepPlan
from jaxserve.scheduler.policy import FORWARD_TOKEN, GRADIENT_TOKEN
from jaxserve.scheduler.request import NEVER, Sequence
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.slo import LatencyBudget

NUM_KEPT = 4096  # choices of buckets that are remembered
STEP_ROWS = 128  # fewer rows forward take about as long as so many: weights are read, kernels started
GRADIENT_ROWS = 1.3  # rows forward that take as long as the backward of one: the head's product runs in it twice
# What the backward of a row is worth beside the forward of one, where they are in different steps. A step of nothing
# but gradient rows reads the weights forward for its decode rows alone, one of nothing but forward rows wastes nothing:
# at equal prices all forwards would come first, and such backwards last.
GRADIENT_WORTH = 1.8
RECENT_STEPS = 8  # whose room for gradient rows says what is usual
RECENT_STARTS = 8  # of requests, whose mean distance says when to expect the next one
MAX_WAIT = 8  # steps in a row that finetuning stays out of for a longer one
WORTH_WAITING = 1.05  # times the work per second that a longer one must promise, more where step times are unsure
SHORTEST = 1e-6  # seconds

NOTHING = StepPlan(index=NO_REQUESTS, chunks=(), chunk_rows=0)


class Finetuning(Protocol):
    """The jobs of an engine, as far as planning knows them."""

    queue: FinetuneQueue
    held: bool  # after a failed step the requests go alone once

    def settle(self) -> None:
        """Moves on what waits for something else than a step."""
        ...


class Room(NamedTuple):
    """What the objectives leave of a step for finetune windows, in seconds."""

    now: float  # that the step may take
    most: float  # that any later one may take
    gain: float = 0.0  # by which ``now`` grows with every step of requests alone, as long as no request comes
    gap: float = NEVER  # between requests that come, in the mean


UNLIMITED = Room(NEVER, NEVER)


class Option(NamedTuple):
    """A bucket with room for windows."""

    work: float  # at most
    seconds: float  # at least, judging by the requests alone
    bucket: Bucket


class Planned(NamedTuple):
    """A step that is ready to be packed, and what it is expected to take."""

    plan: StepPlan
    load: StepLoad
    seconds: float


class Planner:
    """Plans steps, and learns from those that were measured.

    Args:
      needs_extras: whether a plan needs a program that knows scales and dropout; by default none does.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        buckets: Buckets,
        max_keys: int,
        budget: LatencyBudget | None = None,
        sharing: Sharing | None = None,
        needs_extras: Callable[[StepPlan], bool] | None = None,
    ):
        self.scheduler, self.budget, self.needs_extras = scheduler, budget or LatencyBudget(), needs_extras
        self.sharing: Sharing = sharing or CoServing()
        self.finetuning: Finetuning | None = None
        self.max_keys = max_keys
        self.times = StepTimes()
        self.set_buckets(buckets)
        self._free_at = 0.0  # when the device is expected to be through with everything planned
        self._planned: deque[float] = deque()  # expected seconds of steps that have not been measured
        self._recent: deque[int] = deque(maxlen=RECENT_STEPS)
        self._starts: deque[float] = deque(maxlen=RECENT_STARTS)  # of requests
        self._waited = 0  # steps in a row that finetuning stayed out of

    def set_buckets(self, buckets: Buckets) -> None:
        self.buckets = buckets
        self._fit = lru_cache(NUM_KEPT)(buckets.fit)
        self._with_room = lru_cache(NUM_KEPT)(partial(_with_room, buckets))
        self.times.resize(buckets, self.max_keys)
        self.gradient_token = GRADIENT_TOKEN - FORWARD_TOKEN if buckets.stashed else GRADIENT_TOKEN
        self.gradient_worth = GRADIENT_WORTH if buckets.stashed else GRADIENT_TOKEN
        self.row_block = self.scheduler.config.row_block

    # the loop

    def plan(self, now: float) -> Planned | None:
        """The next step, or None when nothing can run."""
        start = max(now, self._free_at)
        finetuning = self.finetuning
        if finetuning is not None:
            finetuning.settle()
        turn = self.sharing.turn(self) if finetuning is not None else Turn.REQUESTS
        chosen = None
        if finetuning is not None and turn is Turn.FINETUNE:
            chosen = self._with_windows(finetuning.queue, None, UNLIMITED)
        if chosen is None:
            plan = self.scheduler.plan(now, self._chunk_room(now, start))
            alone = plan and self._alone(plan)
            if finetuning is None or turn is not Turn.TOGETHER or (finetuning.held and plan is not None):
                chosen = alone
            else:
                chosen = self._with_windows(finetuning.queue, alone, self._room(alone, start))
        if chosen is None and turn is Turn.REQUESTS and self._is_held_up():
            assert finetuning is not None
            chosen = self._with_windows(finetuning.queue, None, UNLIMITED)
        if chosen is None:
            return None
        self.sharing.planned(chosen)
        self._planned.append(chosen.seconds)
        self._free_at = start + chosen.seconds
        return chosen

    def measured(self, load: StepLoad, seconds: float, now: float) -> None:
        """Takes in what the oldest planned step took; it was over at ``now``."""
        self.times.observe(load, seconds)
        self.budget.earn(seconds)
        self._planned.popleft()
        self._free_at = now + sum(self._planned)

    def forget(self) -> None:
        """After a failed step: nothing is under way."""
        self._planned.clear()
        self._free_at = 0.0

    def _is_held_up(self) -> bool:
        """Requests can do nothing, and no step under way will change that: begun sequences hold the pages they need."""
        finetuning = self.finetuning
        under_way = finetuning is not None and any(seq.backward_begun for seq in finetuning.queue.active)
        return under_way and self.scheduler.has_requests and not self._planned

    # requests

    def _chunk_room(self, now: float, start: float) -> int | None:
        """The most prompt rows that leave running requests their time per token; None: no limit."""
        scheduler = self.scheduler
        if not scheduler.has_prompts:
            return None
        if not self.budget.has_promises and self.finetuning is not None and self.finetuning.queue.has_work:
            return self.buckets.beside(self.buckets.grad_rows[-1])  # as they may take what they can, both go on
        if not self.budget.has_tpot:
            return None
        decoding = [seq for seq in scheduler.running if seq.num_computed >= seq.prefill_end]
        if not decoding:
            return None
        positions = [seq.num_computed for seq in decoding]
        keys, span = sum(positions) + len(positions), max(positions) + 1
        alone = StepLoad(self._fit(0, len(decoding)), decode_keys=keys, decode_span=span)
        shortest = self.times.predict(alone)
        allowed = self.budget.slack(decoding, start, shortest) / (1 + self.times.uncertainty)
        rows, seconds = self._longest_chunk(alone, allowed)
        if self.budget.first_token_risk(self._prompts(), now, rows / seconds):
            return None
        return rows

    def _longest_chunk(self, alone: StepLoad, allowed: float) -> tuple[int, float]:
        """Rows and seconds of the largest chunk that a step of so long has room for; of the smallest, if of none."""
        done = max([seq.num_computed for seq in self.scheduler.running if seq.prefilling], default=0)
        best, keys, span = None, alone.decode_keys, alone.decode_span
        for rows in self.buckets.chunk_rows:
            bucket = self._fit(rows, alone.bucket.decode_rows)
            pairs = (done + rows // 2) * rows
            seconds = self.times.predict(StepLoad(bucket, False, keys, span, pairs, done + rows))
            if best is None or seconds <= allowed:
                best = rows, seconds
            if seconds > allowed:
                break
        assert best is not None, "no chunk rows"
        return best

    def _prompts(self):
        """Requests that have no first token, with their prompt rows left, in the order they are served."""
        for seq in chain((seq for seq in self.scheduler.running if seq.prefilling), self.scheduler.waiting):
            yield seq, max(seq.prefill_end, len(seq.tokens)) - seq.num_computed

    def _alone(self, plan: StepPlan) -> Planned:
        """A step of requests."""
        bucket = self._fit(plan.chunk_rows, len(plan.decoding))
        load = request_load(plan, bucket, self.needs_extras is not None and self.needs_extras(plan))
        return Planned(plan, load, self.times.predict(load))

    # finetuning

    def _room(self, alone: Planned | None, start: float) -> Room:
        """What the objectives leave of the step for finetune windows."""
        limit = self.budget.arrival_limit
        if alone is None:
            return Room(limit, limit)
        if alone.plan.started:
            self._starts.append(start)
        if self.scheduler.backlog and self.budget.has_promises:
            return Room(0.0, 0.0)  # prompts are waiting: the sooner this step is over, the better
        slack = self.budget.slack(alone.plan.decoding, start, alone.seconds, planned=1)
        sure = 1 / (1 + self.times.uncertainty)
        gap = max(start - self._starts[0], SHORTEST) / len(self._starts) if self._starts else NEVER
        return Room(min(slack, limit) * sure, limit * sure, (self.budget.tpot - alone.seconds) * sure, gap)

    def _with_windows(self, queue: FinetuneQueue, alone: Planned | None, room: Room) -> Planned | None:
        """The step of these requests with the windows that fit into it, if any do.

        Args:
          alone: the step without windows; None: there are no requests in it.
        """
        if alone is None or self.budget.credit > 0 or not (self.scheduler.backlog and self.budget.has_promises):
            policy = self.scheduler.policy
            queue.running.sort(key=lambda running: policy.served(running.job.tenant))
            queue.admit(reserve=len(self.scheduler.running))
        if not queue.active:
            return alone
        base = alone or Planned(NOTHING, StepLoad(self._fit(0, 0)), 0.0)
        options = self._options(queue, base)
        if self._waits(options, base, room):
            self._waited += 1
            return alone
        best = self._best(queue, base, options, room.now)
        if best is None and alone is None:
            best = self._least(queue, base, options, NEVER)
        elif best is None and self.budget.credit > 0:
            best = self._least(queue, base, options, base.seconds + self.budget.credit)
        if best is None:
            return alone
        self._waited = 0
        queue.begin(best.plan.finetune)
        self._charge(queue, best.plan.finetune)
        self.budget.spend(best.seconds - base.seconds)
        return best

    def _charge(self, queue: FinetuneQueue, windows: FinetunePlan) -> None:
        for kind, cost in ((windows.grads, self.gradient_token), (windows.forwards, FORWARD_TOKEN)):
            for window in kind:
                job, _ = queue.owner[window.seq]
                self.scheduler.policy.charge(job.tenant, cost * window.length)

    def _waits(self, options: Iterable[Option], base: Planned, room: Room) -> bool:
        """Whether finetuning stays out of this step so that a later one has the time for windows that get more done in
        the seconds they add than any that fit now. A request that comes meanwhile has saved up nothing, and the wait
        was in vain: the chance that none does counts."""
        if room.gain <= 0:
            return False
        now = max((_rate(option, base) for option in options if option.seconds <= room.now), default=0.0)
        least = WORTH_WAITING * (1 + self.times.uncertainty) * now
        for option in options:
            if room.now < option.seconds <= room.most:
                steps = (option.seconds - room.now) / room.gain
                undisturbed = math.exp(-steps * base.seconds / room.gap)
                if self._waited + steps <= MAX_WAIT and undisturbed * _rate(option, base) > least:
                    return True
        return False

    def _best(self, queue: FinetuneQueue, base: Planned, options: list[Option], allowed: float) -> Planned | None:
        """The windows that get most work done per second in a step that takes no longer than ``allowed``."""
        candidates = [
            (_worth(work, seconds, allowed, bucket), bucket) for work, seconds, bucket in options if seconds <= allowed
        ]
        if not candidates:
            return None
        candidates.sort(key=_promise, reverse=True)
        fitting = max(bucket.grad_rows for _, bucket in candidates)
        self._recent.append(fitting)
        usual = max(self._recent) or queue.max_window
        best = self._draft(queue, base, allowed, candidates, usual)
        if best is None and 0 < fitting < usual:  # nothing can begin but with less than usual
            best = self._draft(queue, base, allowed, candidates, fitting)
        return best

    def _least(self, queue: FinetuneQueue, base: Planned, options: list[Option], allowed: float) -> Planned | None:
        """The windows that take the least time."""
        for _, seconds, bucket in sorted(options, key=lambda option: option.seconds):
            if seconds > allowed:
                break
            best = self._draft(queue, base, allowed, [(NEVER, bucket)], bucket.grad_rows or queue.max_window)
            if best is not None:
                return best
        return None

    def _options(self, queue: FinetuneQueue, base: Planned) -> list[Option]:
        """Every bucket with room to spare for windows."""
        backward, forward, dropout = queue.left()
        rows, found = base.plan.chunk_rows, []
        buckets = self._with_room(rows, len(base.plan.decoding), dropout)
        for bucket, seconds in zip(buckets, self.times.predict_each(base.load, buckets), strict=True):
            grad_rows, room = bucket.grad_rows, bucket.chunk_rows - rows
            work = self.gradient_worth * (grad_rows if grad_rows < backward else backward)
            work += FORWARD_TOKEN * (room if room < forward else forward)
            found.append(Option(work, seconds, bucket))
        return found

    def _draft(self, queue: FinetuneQueue, base: Planned, allowed: float, candidates, usual: int) -> Planned | None:
        best, most, can_forward = None, 0.0, True
        for promise, bucket in candidates:
            if promise <= most:
                break
            if not (bucket.grad_rows or can_forward):
                continue
            room = bucket.chunk_rows - base.plan.chunk_rows
            windows = queue.draft(bucket.grad_rows, room, usual, plain=not bucket.finetunes)
            if best is not None and windows.grads and windows == best[0]:  # the same step again
                continue
            work = self.gradient_worth * _length(windows.grads) + FORWARD_TOKEN * _length(windows.forwards)
            if not work:  # whether there is anything to forward does not depend on the room
                can_forward &= bucket.grad_rows > 0
                continue
            load = self._load_with(base, windows, self._tight(base.plan, windows, bucket))
            seconds = self.times.predict(load)
            worth = _worth(work, seconds, allowed, load.bucket)
            if seconds <= allowed and worth > most:
                best, most = (windows, load, seconds), worth
        if best is None:
            return None
        windows, load, seconds = best
        return Planned(base.plan.beside(windows), load, seconds)

    def _load_with(self, base: Planned, windows: FinetunePlan, bucket: Bucket) -> StepLoad:
        """What the step holds with windows beside what is in it."""
        extended = base.load.extended or not self.times.has_plain(bucket)
        if not extended and self.needs_extras is not None:
            extended = self.needs_extras(NOTHING.beside(windows))
        return with_windows(base.load, windows, bucket, extended)

    def _tight(self, plan: StepPlan, windows: FinetunePlan, bucket: Bucket) -> Bucket:
        """The smallest bucket for these windows."""
        grad_rows = total_rows(windows.grads, self.row_block)
        chunk_rows = plan.chunk_rows + total_rows(windows.forwards, self.row_block)
        if not grad_rows and bucket.grad_rows and not bucket.stashed:
            grad_rows = 1  # only these programs know dropout
        return self._fit(chunk_rows, len(plan.decoding), grad_rows)


def _with_room(buckets: Buckets, chunk_rows: int, decode_rows: int, dropout: bool) -> list[Bucket]:
    """Those that hold these rows of requests and have room for windows, of sequences with dropout if so."""
    return [
        bucket
        for bucket in buckets.holding(chunk_rows, decode_rows)
        if bucket.grad_rows or (bucket.chunk_rows != chunk_rows and (bucket.finetunes or not dropout))
    ]


def _rate(option: Option, base: Planned) -> float:
    """Work per second that windows add to the step without."""
    return option.work / max(option.seconds - base.seconds, SHORTEST)


def _promise(candidate: tuple[float, Bucket]) -> float:
    return candidate[0]


def _length(windows: Iterable[WindowRows]) -> int:
    return sum([length for _, _, length in windows])


def _worth(work: float, seconds: float, allowed: float, bucket: Bucket) -> float:
    """Work per second. Where nothing limits a step, per row that runs forward or backward, padding among them: there
    measured times decide nothing, so that a job which has the engine to itself can be repeated bit for bit."""
    if allowed != NEVER:
        return work / seconds
    return work / (max(bucket.rows - bucket.first_row, STEP_ROWS) + GRADIENT_ROWS * bucket.grad_rows)


def request_load(plan: StepPlan, bucket: Bucket, extended: bool) -> StepLoad:
    """What a step of requests holds, as the model of step times sees it."""
    block_pairs = block_span = 0
    decode_keys, decode_span = sum(plan.positions) + len(plan.positions), max(plan.positions, default=-1) + 1
    adapter_rows = _num_with_adapter(plan.decoding)
    for seq, start, length in plan.chunks:
        block_pairs += _pairs(start, length)
        block_span = max(block_span, start + length)
        adapter_rows += length if seq.request.adapter is not None else 0
    return StepLoad(bucket, extended, decode_keys, decode_span, block_pairs, block_span, adapter_rows=adapter_rows)


@lru_cache(maxsize=1)  # most steps have the same decode rows as the one before
def _num_with_adapter(decoding: tuple[Sequence, ...]) -> int:
    return sum([seq.request.adapter is not None for seq in decoding])


def with_windows(load: StepLoad, windows: FinetunePlan, bucket: Bucket, extended: bool) -> StepLoad:
    """The same with finetune windows, in another bucket."""
    block_pairs, block_span, grad_pairs, grad_span, grad_rows, rows = load.block_pairs, load.block_span, 0, 0, 0, 0
    for _, start, length in windows.grads:
        grad_pairs += _pairs(start, length)
        if start + length > grad_span:
            grad_span = start + length
        grad_rows += length
    if not bucket.stashed:  # they run forward as well
        block_pairs, block_span, rows = block_pairs + grad_pairs, max(block_span, grad_span), grad_rows
    for _, start, length in windows.forwards:
        block_pairs += _pairs(start, length)
        if start + length > block_span:
            block_span = start + length
        rows += length
    return StepLoad(
        bucket,
        extended,
        load.decode_keys,
        load.decode_span,
        block_pairs,
        block_span,
        grad_pairs,
        grad_span,
        load.adapter_rows + rows,
        grad_rows,
    )


def _pairs(start: int, length: int) -> int:
    """Keys that these rows see, added up over the rows."""
    return length * (2 * start + length + 1) // 2
