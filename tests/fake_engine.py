"""A model that a person can compute by hand, behind the real scheduler and the real page pool.

A cell of a fake page holds what keys and values depend on: token, position and adapter. The next token is a hash of
all cells from position 0 on, read through the page table, so a wrong page, a stale prefix or the wrong adapter changes
every token that follows. Steps run in the order of their plans; results are read ``run_ahead`` steps later.

Shapes: P pages, G tokens per page, S context.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from jaxserve.kvcache.pages import PagePool
from jaxserve.scheduler.plan import Outcome, Segment, StepPlan, StepResult
from jaxserve.scheduler.request import Request, Sequence, State
from jaxserve.scheduler.scheduler import Scheduler, SchedulerConfig

VOCAB = 11
EOS = 7
NOT_FINITE = -1  # a poisoned cell: whoever reads it gets a row that is not finite


@dataclass(frozen=True, eq=False)
class FakeAdapter:
    name: str
    version: int = 0
    poisoned_from: int | None = None  # position from which this adapter's numbers are not finite

    @property
    def digest(self) -> bytes:
        return f"{self.name}@{self.version}".encode()


@dataclass
class FakeResidency:
    """``capacity`` adapters on the device; counts pins, and notices a release too many."""

    capacity: int = 2
    pins: Counter = field(default_factory=Counter)

    def try_acquire(self, adapter: FakeAdapter) -> bool:
        if adapter not in self.pins and len(self.pins) == self.capacity:
            return False
        self.pins[adapter] += 1
        return True

    def release(self, adapter: FakeAdapter) -> None:
        assert self.pins[adapter] > 0, f"{adapter} is released more often than acquired"
        self.pins[adapter] -= 1
        if not self.pins[adapter]:
            del self.pins[adapter]


def cells(tokens, first_position: int, adapter: FakeAdapter | None) -> np.ndarray:
    """What the model leaves in the cache for each token: int64 [S]."""
    position_S = np.arange(first_position, first_position + len(tokens), dtype=np.int64)
    digest = crc32(adapter.digest) if adapter else 0
    cell_S = (digest << 24) + (position_S << 8) + np.asarray(tokens, np.int64)
    if adapter and adapter.poisoned_from is not None:
        cell_S[position_S >= adapter.poisoned_from] = NOT_FINITE
    return cell_S


def next_token(cell_S: np.ndarray, request: Request, choice: int) -> int | None:
    """The token after a context, or None when the numbers are not finite."""
    if (cell_S == NOT_FINITE).any():
        return None
    params = request.params
    drawn = crc32(repr((params.seed, choice)).encode(), crc32(cell_S.tobytes()))
    held_back = len(cell_S) - len(request.prompt_ids) < params.min_tokens and not params.ignore_eos
    return drawn % (VOCAB - 4) if held_back else drawn % VOCAB


def expected(request: Request, choice: int, config: SchedulerConfig) -> tuple[list[int], str]:
    """Outputs and finish reason of one choice, computed alone and without any cache."""
    params, tokens = request.params, list(request.prompt_ids)
    limit = config.max_model_len if params.max_tokens is None else len(tokens) + params.max_tokens
    while len(tokens) < limit:
        token = next_token(cells(tokens, 0, request.adapter), request, choice)
        if token is None:
            return tokens[len(request.prompt_ids) :], "error"
        tokens.append(token)
        outputs = len(tokens) - len(request.prompt_ids)
        if token == EOS and not params.ignore_eos and outputs > params.min_tokens:
            return tokens[len(request.prompt_ids) :], "stop"
    return tokens[len(request.prompt_ids) :], "length"


class FakeEngine:
    """plan, run, commit; ``dispatch`` and ``collect`` are step()'s halves, for what may happen between them."""

    def __init__(
        self, config: SchedulerConfig, pool: PagePool, *, adapter_slots: int = 2, run_ahead: int = 1, report_chunks=True
    ):
        self.config = config
        self.pool = pool
        self.residency = FakeResidency(adapter_slots)
        self.scheduler = Scheduler(config, pool, self.residency)
        self.run_ahead = run_ahead
        self.report_chunks = report_chunks
        self.cell_PG = np.full((pool.num_pages, pool.page_size), NOT_FINITE, np.int64)
        self.last_token: dict[int, int] = {}  # by slot, as on the device
        self.flying: deque[tuple[StepPlan, StepResult]] = deque()
        self.sequences: list[Sequence] = []
        self.terminal: Counter = Counter()  # how often each sequence was reported over
        self.clock = 0

    def add(self, request: Request) -> list[Sequence]:
        group = self.scheduler.add(request)
        self.sequences += group
        return group

    def abort(self, request_id: str) -> list[Sequence]:
        ended = self.scheduler.abort(request_id)
        self.terminal.update(ended)
        return ended

    def finish(self, seq: Sequence) -> None:
        self.terminal[seq] += self.scheduler.finish(seq, "stop")

    def step(self) -> list[Outcome]:
        dispatched = self.dispatch()
        if self.flying and (not dispatched or len(self.flying) > self.run_ahead):
            return self.collect()
        return []

    def dispatch(self) -> StepPlan | None:
        self.clock += 1
        assert self.clock < 300_000, "no end in sight"
        plan = self.scheduler.plan(now=float(self.clock))
        if plan is not None:
            self._check_plan(plan)
            self.flying.append((plan, self._run(plan)))
        return plan

    def collect(self) -> list[Outcome]:
        outcomes = self.scheduler.commit(*self.flying.popleft(), now=float(self.clock))
        for outcome in outcomes:
            self.terminal[outcome.seq] += outcome.finish_reason is not None
        return outcomes

    def run(self, max_steps: int = 10_000) -> None:
        """Steps until nothing is left to do; each step must bring somebody forward."""
        for _ in range(max_steps):
            if not self.scheduler.has_work():
                return
            before = self._progress()
            self.step()
            assert self._progress() > before, "an idle step while work waits"
        raise AssertionError(f"still at work after {max_steps} steps")

    def check(self) -> None:
        self.scheduler.check()
        running = [seq for seq in self.sequences if seq.state is State.RUNNING and seq.request.adapter]
        assert self.residency.pins == Counter(seq.request.adapter for seq in running)

    def check_idle(self) -> None:
        """Everything ended once, and everything was given back."""
        self.check()
        assert self.pool.num_free + self.pool.num_cached == self.pool.num_pages
        assert not self.residency.pins
        assert all(seq.state is State.FINISHED and self.terminal[seq] == 1 for seq in self.sequences)

    def check_tokens(self, seq: Sequence) -> None:
        """What a sequence got is what it would have got alone; a part of it if it was ended from outside."""
        outputs, reason = expected(seq.request, seq.index, self.config)
        assert seq.output_ids == outputs[: seq.num_outputs], f"{seq}: {seq.output_ids} instead of {outputs}"
        if seq.finish_reason in ("length", "error"):
            assert (seq.output_ids, seq.finish_reason) == (outputs, reason), seq

    def _progress(self) -> int:
        return self.scheduler._num_planned + self.scheduler._num_committed

    def _check_plan(self, plan: StepPlan) -> None:
        config = self.config
        aligned = sum(-(-chunk.length // config.row_block) * config.row_block for chunk in plan.chunks)
        assert plan.chunk_rows == aligned <= config.max_chunk_rows
        assert plan.num_rows == aligned + len(plan.decodes) > 0
        assert len(plan.decodes) <= config.max_num_seqs
        planned = [segment.seq for segment in (*plan.chunks, *plan.decodes)]
        assert len(set(planned)) == len(planned)
        assert not set(plan.preempted) & set(planned)
        slots = [sample.seq.slot for sample in plan.samples]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < config.max_num_seqs for slot in slots)

    def _run(self, plan: StepPlan) -> StepResult:
        """The device: copies, then all writes, then all reads."""
        copied = [self.cell_PG[src].copy() for src, _ in plan.page_copies]
        for (_, dst), page in zip(plan.page_copies, copied, strict=True):
            self.cell_PG[dst] = page
        written: set[tuple[int, int]] = set()
        for segment in (*plan.chunks, *plan.decodes):
            self._write(segment, written)
        drawn = []
        for seq, i, kind in plan.samples:
            segment = plan.decodes[i] if kind == "decode" else plan.chunks[i]
            drawn.append(next_token(self._read(segment.seq, segment.end), seq.request, seq.index))
        for (seq, _, _), token in zip(plan.samples, drawn, strict=True):
            assert seq.slot is not None
            self.last_token[seq.slot] = token or 0
        finite = [bool((self._read(chunk.seq, chunk.end) != NOT_FINITE).all()) for chunk in plan.chunks]
        return StepResult(
            tokens=[token or 0 for token in drawn],
            finite=[token is not None for token in drawn],
            chunk_finite=finite if self.report_chunks else (),
        )

    def _write(self, segment: Segment, written: set[tuple[int, int]]) -> None:
        seq, start = segment.seq, segment.start
        assert seq.slot is not None
        known = seq.tokens[start : segment.end]
        tokens = known or [self.last_token[seq.slot]]
        assert len(tokens) == segment.length, f"{segment} has rows whose tokens nobody knows"
        for position, cell in enumerate(cells(tokens, start, seq.request.adapter), start):
            place = (seq.pages[position // self.pool.page_size], position % self.pool.page_size)
            assert place not in written, f"{seq} writes page {place} that another sequence writes in this step"
            assert not self.pool.is_indexed(place[0]), f"{seq} writes page {place} that is in the prefix index"
            written.add(place)
            self.cell_PG[place] = cell

    def _read(self, seq: Sequence, length: int) -> np.ndarray:
        return self.cell_PG[seq.pages].reshape(-1)[:length]
