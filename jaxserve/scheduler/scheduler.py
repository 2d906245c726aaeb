"""Decides, step by step, which rows of which sequences the device computes next.

Shapes: P pages, G tokens per page.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable
from collections.abc import Sequence as Values
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from jaxserve.errors import InvalidRequest
from jaxserve.kvcache.pages import PagePool
from jaxserve.kvcache.prefix import PrefixChain, PrefixKey
from jaxserve.scheduler.limits import SchedulerConfig, check_request, max_total
from jaxserve.scheduler.plan import Outcome, Read, Sample, Segment, StepPlan, StepResult
from jaxserve.scheduler.policy import POLICIES, PROMPT_TOKEN, Policy
from jaxserve.scheduler.request import Request, Sequence, State


class Residency(Protocol):
    """Keeps adapters on the device while sequences use them. The base model (None) is never asked for."""

    def try_acquire(self, version: Any, /) -> bool:
        """True: resident, and pinned once more."""
        ...

    def release(self, version: Any, /) -> None:
        """Takes one pin back."""
        ...


class Counts(NamedTuple):
    waiting: int  # choices
    running: int  # choices
    preemptions: int
    prompt_tokens: int  # of requests that have started
    cached_tokens: int  # of those, found in the prefix cache


@dataclass
class _Draft:
    """A plan in the making."""

    index: int
    room: int  # rows left for chunks
    chunks: list[Segment] = field(default_factory=list)
    decoding: list[Sequence] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    prefilling: list[Sequence] = field(default_factory=list)  # running, with prompt rows left before this step
    samples: list[Sample] = field(default_factory=list)  # behind chunks
    page_copies: list[tuple[int, int]] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Continuous batching over a pool of pages: plan() may run one step ahead of commit().

    A sequence owns all pages of its known tokens from the moment it starts, so only decode rows ever need a page in
    mid-flight. They are served in order of rank and take pages from the running sequence of last rank; the first one
    can always go on, because any request fits the pool alone. A sequence that finds nobody behind it sits out.
    """

    def __init__(self, config: SchedulerConfig, pool: PagePool, residency: Residency, policy: Policy | None = None):
        self.config = config
        self.pool = pool
        self.residency = residency
        self.policy = policy or POLICIES[config.policy]()
        self.reclaim: Callable[[], bool] = lambda: False  # frees somebody else's pages, if there are any to free
        self.waiting: list[Sequence] = []  # both by rank; followers are in neither until they part from their leader
        self.running: list[Sequence] = []
        self._requests: dict[str, list[Sequence]] = {}
        self._free_slots = list(range(config.max_num_seqs))
        self._num_added = self._num_planned = self._num_committed = 0
        self._num_queued = self._num_preempted = self._prompt_tokens = self._cached_tokens = 0
        self._num_prefilling = 0  # of ``running``
        self._decoding: tuple[Sequence, ...] = ()  # in the last plan
        self.backlog = False  # in the last plan prompt rows were left over for want of rows, slots or pages

    # requests

    def add(self, request: Request) -> list[Sequence]:
        """Queues a request and returns its choices; raises InvalidRequest for what can never be served."""
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is in use; it must be unique among live requests", "id")
        check_request(request, self.config, self.pool, self._num_queued)
        params = request.params
        eos = () if params.ignore_eos else self.config.eos_token_ids
        stop_ids = frozenset(params.stop_token_ids or ()) | frozenset(eos)
        root = self._prefix_key(request).root
        rank = (*self.policy.rank(request), self._num_added)
        self._num_added += 1
        group = [
            Sequence(
                request=request,
                index=index,
                tokens=list(request.prompt_ids),
                max_total=max_total(request, self.config),
                stop_ids=stop_ids,
                rank=(*rank, index),
                chain=PrefixChain(root, self.pool.page_size),
            )
            for index in range(params.n)
        ]
        leader, followers = group[0], group[1:]
        leader.followers = followers
        for follower in followers:
            follower.leader = leader
        self._requests[request.id] = group
        self._enqueue(leader)
        return group

    def abort(self, request_id: str) -> list[Sequence]:
        """Ends a request, whatever it is doing; returns the choices that this ended (none: unknown or over)."""
        ended = [seq for seq in self._requests.get(request_id, ()) if seq.state is not State.FINISHED]
        self._finish_all(ended, "abort")
        return ended

    def finish(self, seq: Sequence, reason: str) -> bool:
        """Ends one choice that has had a token, as on a stop string; False when it was over already."""
        assert seq.leader is None, f"{seq} has had no token yet"
        assert not seq.followers, f"{seq} has had no token yet"
        if seq.state is State.FINISHED:
            return False
        self._finish_all([seq], reason)
        return True

    def reset(self) -> None:
        """After a step that failed on the device: forgets all pages and uncommitted steps, and starts the running
        sequences over from the tokens the host has read."""
        while self.running:
            self._preempt(self.running[-1])
        self.pool.drop_cache()
        for seq in self.waiting:
            seq.num_drawn = len(seq.tokens)
        self._num_committed = self._num_planned

    @property
    def has_requests(self) -> bool:
        """A request is alive."""
        return bool(self._requests)

    @property
    def has_prompts(self) -> bool:
        """Somebody has prompt rows left to compute, and a slot or the prospect of one in the next step."""
        return self._num_prefilling > 0 or (bool(self.waiting) and bool(self._free_slots))

    def has_work(self) -> bool:
        """True while a request is alive or a plan is not committed."""
        return bool(self._requests) or self._num_committed < self._num_planned

    def counts(self) -> Counts:
        num_running = self.config.max_num_seqs - len(self._free_slots)
        return Counts(self._num_queued, num_running, self._num_preempted, self._prompt_tokens, self._cached_tokens)

    # one step

    def plan(self, now: float, room: int | None = None) -> StepPlan | None:
        """The next step's rows, or None when nothing can run before a commit, an add or an adapter's arrival.

        Args:
          room: the most chunk rows, in whole blocks; ignored where prompts cannot be cut. None: as many as a step has.
        """
        if room is None or not self.config.enable_chunked_prefill:
            room = self.config.max_chunk_rows
        draft = _Draft(self._num_planned, room)
        self.backlog = False
        self._plan_decodes(draft)
        for seq in draft.prefilling:
            self._plan_chunk(draft, seq)
        if not draft.preempted:  # whoever lost its pages in this step must not take them back in it
            self._admit(draft, now)
        self.backlog |= bool(draft.preempted)
        if not draft.chunks and not draft.decoding:
            return None
        self._num_planned += 1
        decoding = tuple(draft.decoding)
        if decoding != self._decoding:
            self._decoding = decoding
        return StepPlan(
            index=draft.index,
            chunks=tuple(draft.chunks),
            decoding=self._decoding,
            positions=draft.positions,
            chunk_samples=tuple(draft.samples),
            page_copies=tuple(draft.page_copies),
            started=tuple(draft.started),
            preempted=tuple(draft.preempted),
            chunk_rows=room - draft.room,
        )

    def commit(self, plan: StepPlan, result: StepResult, now: float = 0.0) -> list[Outcome]:
        """Takes in the results, read at ``now``, of the oldest plan that has none yet; sequences that are over are
        passed by. Returns what became of each sample, in order, after chunks that failed as such."""
        read = self.read(plan, result, now)
        rows = enumerate(zip(plan.decoding, result.tokens, strict=False))
        outcomes = [Outcome(seq, token, None, row) for row, (seq, token) in rows if row not in read.apart]
        return sorted([*read.outcomes, *outcomes], key=_sample) if read.outcomes else outcomes

    def read(self, plan: StepPlan, result: StepResult, now: float = 0.0) -> Read:
        """The same, without an object for each decode row whose sequence goes on."""
        assert plan.index == self._num_committed, f"step {plan.index} is committed, {self._num_committed} is due"
        assert len(result.tokens) == len(result.finite) == plan.num_samples, f"{plan.num_samples} samples"
        assert len(result.chunk_finite) in (0, len(plan.chunks)), f"{len(plan.chunks)} chunks"
        self._num_committed += 1
        outcomes, apart = self._commit_chunks(plan, result), set()
        all_finite = all(result.finite)
        for row, (seq, token) in enumerate(zip(plan.decoding, result.tokens, strict=False)):
            known = seq.tokens
            if all_finite and len(known) < seq.quiet_until and token not in seq.stop_ids:
                known.append(token)
            elif seq.state is State.FINISHED:
                apart.add(row)
            else:
                reason = self._commit_row(seq, plan.positions[row] + 1, token, result.finite[row])
                if reason is not None:
                    apart.add(row)
                    outcomes.append(Outcome(seq, token if reason != "error" else None, reason, row))
        for i, (seq, chunk, _) in enumerate(plan.chunk_samples, len(plan.decoding)):
            if seq.state is State.FINISHED:
                continue
            token, finite = result.tokens[i], result.finite[i]
            if result.chunk_finite:
                finite = finite and result.chunk_finite[chunk]
            reason = self._commit_row(seq, plan.chunks[chunk].end, token, finite)
            if finite and seq.first_token_at is None:
                seq.first_token_at = now
            outcomes.append(Outcome(seq, token if finite else None, reason, i))
        self.policy.charge_outputs(seq for row, seq in enumerate(plan.decoding) if row not in apart)
        self.policy.charge_outputs(outcome.seq for outcome in outcomes if outcome.token is not None)
        return Read(apart, outcomes)

    def check(self) -> None:
        """Raises unless every page, slot and place in the queue is where it should be; for tests and debugging."""
        live = [seq for group in self._requests.values() for seq in group if seq.state is not State.FINISHED]
        self.pool.check(seq.pages for seq in live)
        slots = [seq.slot for seq in live if seq.slot is not None]
        assert sorted(slots + self._free_slots) == list(range(self.config.max_num_seqs)), "slots"
        assert self.waiting == sorted(self.waiting, key=_rank), "waiting is out of order"
        assert self.running == sorted(self.running, key=_rank), "running is out of order"
        assert self._num_prefilling == sum(seq.prefilling for seq in self.running), "sequences with prompt rows left"
        assert self._num_queued == sum(len(seq.group) for seq in self.waiting), "queue length"
        heads = [seq for seq in live if seq.leader is None]
        assert set(self.waiting) == {seq for seq in heads if seq.state is State.WAITING}, "waiting"
        assert set(self.running) == {seq for seq in heads if seq.state is State.RUNNING}, "running"
        for seq in live:
            assert (seq.slot is not None) == (seq.state is State.RUNNING), seq
            assert seq.state is State.RUNNING or not (seq.pages or seq.copy_on_write), seq
            assert seq.num_verified <= seq.num_computed <= len(seq.tokens) + seq.num_pending <= seq.max_total, seq
            if seq in self.running and not seq.prefilling:
                assert seq.num_drawn == seq.num_computed + 1, seq

    # decode rows

    def _plan_decodes(self, draft: _Draft) -> None:
        index, decoding, positions = draft.index, draft.decoding, draft.positions
        for seq in self.running:  # preemption shortens the list, always behind the place that this has come to
            position = seq.num_computed
            if position >= seq.decode_end and not self._may_decode(draft, seq):
                continue
            decoding.append(seq)
            positions.append(position)
            seq.num_computed = position + 1
            seq.num_drawn = position + 2
            seq.last_step = index

    def _may_decode(self, draft: _Draft, seq: Sequence) -> bool:
        """Whether a sequence at its ``decode_end`` has a row in this step, with a page for it."""
        position, page_size = seq.num_computed, self.pool.page_size
        if position < seq.prefill_end:
            draft.prefilling.append(seq)
            return False
        if seq.num_drawn >= seq.max_total:
            return False
        writable = position < len(seq.pages) * page_size and not seq.copy_on_write
        if not writable and not self._make_writable(draft, seq):
            return False
        # The last token is drawn from the row before it, and has no row itself.
        seq.decode_end = min(len(seq.pages) * page_size, seq.max_total - 1)
        return True

    def _make_writable(self, draft: _Draft, seq: Sequence) -> bool:
        """Gives the next row a page that only ``seq`` writes; False when there is none to be had in this step."""
        while True:
            if seq.copy_on_write and self.pool.refcount(seq.pages[-1]) == 1:
                # All others are gone. The leader may have filled and indexed the page with its own tokens.
                self.pool.forget(seq.pages[-1])
                seq.copy_on_write = False
                return True
            fresh = self.pool.alloc_one()
            if fresh is not None:
                break
            if self.reclaim():
                continue
            if self.running[-1] is seq:
                return False
            draft.preempted.append(self._preempt(self.running[-1]))
        if seq.copy_on_write:
            # By now the leader may have written its own outputs behind the prompt. They do no harm: this sequence
            # writes each of those positions itself before it first reads it.
            shared = seq.pages.pop()
            draft.page_copies.append((shared, fresh))
            self.pool.free([shared])
            seq.copy_on_write = False
        seq.pages.append(fresh)
        return True

    def _preempt(self, seq: Sequence) -> Sequence:
        """Sends a sequence (with its followers) back to the queue; what it has computed will be computed again."""
        assert seq.last_step < self._num_planned, f"{seq} is preempted in the step that it is part of"
        self._remove_running(seq)
        for member in seq.group:
            self._vacate(member)
            member.state = State.WAITING
        seq.num_computed = seq.num_verified = seq.prefill_end = 0
        seq.copy_on_write = False
        seq.num_preempted += 1
        self._num_preempted += 1
        self._enqueue(seq)
        return seq

    # chunks

    def _plan_chunk(self, draft: _Draft, seq: Sequence) -> None:
        remaining = seq.prefill_end - seq.num_computed
        length = min(remaining, draft.room)
        # A recompute may be longer than a whole step; with chunking off, it alone is cut, and only at a full step.
        if length == 0 or (length < remaining and not self._may_cut(draft)):
            self.backlog = True
            return
        draft.chunks.append(Segment(seq, seq.num_computed, length))
        draft.room -= -(-length // self.config.row_block) * self.config.row_block
        seq.num_computed += length
        seq.last_step = draft.index
        if seq.prefilling:
            self.backlog = True
        else:
            self._num_prefilling -= 1
            self._sample_group(draft, seq)

    def _may_cut(self, draft: _Draft) -> bool:
        return self.config.enable_chunked_prefill or draft.room == self.config.max_chunk_rows

    def _sample_group(self, draft: _Draft, leader: Sequence) -> None:
        """Draws a first token for every choice from the prompt's last row; followers part from their leader here."""
        for seq in leader.group:
            seq.num_drawn = leader.num_computed + 1
            seq.last_step = draft.index
            draft.samples.append(Sample(seq, len(draft.chunks) - 1, "chunk"))
        for follower in leader.followers:
            for page in leader.pages:
                self.pool.share(page)
            follower.pages = leader.pages.copy()
            follower.chain = leader.chain.copy()
            follower.num_computed = follower.prefill_end = leader.num_computed
            follower.num_verified = leader.num_verified
            follower.copy_on_write = leader.num_computed % self.pool.page_size != 0
            follower.leader = None
            insort(self.running, follower, key=_rank)
        leader.followers = []

    # admission

    def _admit(self, draft: _Draft, now: float) -> None:
        started, hold_adapters = [], False
        for seq in self.policy.order(self.waiting, now):
            prefix = self._room_for(draft, seq)
            if prefix is None:  # nobody passes a sequence that waits for rows, slots or pages: it would starve
                self.backlog = True
                break
            if seq.request.adapter is not None and (hold_adapters or not self._acquire(seq)):
                seq.num_bypassed += 1
                hold_adapters |= seq.num_bypassed > self.config.max_bypass
                continue
            self._num_queued -= len(seq.group)
            self._start(seq, prefix)
            started.append(seq)
            draft.started += seq.group
            self._plan_chunk(draft, seq)
        for seq in started:  # only now: ``order`` may be going through the list itself
            self._leave_queue(seq)

    def _room_for(self, draft: _Draft, seq: Sequence) -> list[int] | None:
        """The cached pages that ``seq`` can start from, or None when there is no room for it in this step."""
        if draft.room == 0 or len(self._free_slots) < len(seq.group) or seq.last_step >= self._num_committed:
            return None
        prompt_rows = seq.request.params.prompt_logprobs is not None
        prefix = [] if prompt_rows else self.pool.longest_prefix(seq.chain, seq.tokens)
        if len(seq.tokens) - len(prefix) * self.pool.page_size > draft.room and not self._may_cut(draft):
            return None
        fresh = self.pool.pages_for(len(seq.tokens)) - len(prefix)
        revived = sum(self.pool.refcount(page) == 0 for page in prefix)
        # Beside others, leave each running sequence a page to grow into, or the newcomer is soon preempted for it.
        reserve = len(self.running) + len(seq.followers) if self.running else 0
        while fresh + revived + reserve > self.pool.num_available:
            if not self.reclaim():
                return None
        return prefix

    def _acquire(self, seq: Sequence) -> bool:
        """Pins the adapter once for each member of the group, or not at all."""
        adapter = seq.request.adapter
        for held in range(len(seq.group)):
            if not self.residency.try_acquire(adapter):
                for _ in range(held):
                    self.residency.release(adapter)
                return False
        return True

    def _start(self, seq: Sequence, prefix: list[int]) -> None:
        for page in prefix:
            self.pool.share(page)
        fresh = self.pool.alloc(self.pool.pages_for(len(seq.tokens)) - len(prefix))
        assert fresh is not None, f"{self.pool.num_available} pages are not enough for {seq}"
        seq.pages = prefix + fresh
        seq.num_computed = seq.num_verified = len(prefix) * self.pool.page_size
        seq.prefill_end = len(seq.tokens)
        if seq.num_preempted == 0:
            seq.num_cached = seq.num_computed
            self._prompt_tokens += seq.prompt_len
            self._cached_tokens += seq.num_cached
            self.policy.charge(seq.request.tenant, PROMPT_TOKEN * (seq.prompt_len - seq.num_cached))
        for member in seq.group:
            member.slot = heapq.heappop(self._free_slots)
            member.state = State.RUNNING
        self._num_prefilling += 1
        insort(self.running, seq, key=_rank)

    # results

    def _commit_chunks(self, plan: StepPlan, result: StepResult) -> list[Outcome]:
        """Indexes the pages of finite chunks, and fails the sequences of others. Without a word about the chunks,
        a sequence's pages wait for its next sample: their values reach it through attention."""
        outcomes = []
        for i, finite in enumerate(result.chunk_finite):
            seq = plan.chunks[i].seq
            if finite:
                self._verify(seq, plan.chunks[i].end)
            elif seq.state is not State.FINISHED:
                for member in seq.group:
                    self._fail(member)
                    outcomes.append(Outcome(member, None, "error", None))
        return outcomes

    def _commit_row(self, seq: Sequence, end: int, token: int, finite: bool) -> str | None:
        """Takes in a token drawn behind the row before ``end``. Returns why that was the last one, if it was."""
        if not finite:
            self._fail(seq)
            return "error"
        self._verify(seq, end)
        return self._accept(seq, token)

    def _verify(self, seq: Sequence, end: int) -> None:
        """Notes that keys and values up to ``end`` are finite, and indexes the pages that this fills."""
        if seq.state is not State.RUNNING:  # preempted since: the pages are gone
            return
        page_size = self.pool.page_size
        for place in range(seq.num_verified // page_size, end // page_size):
            digest = seq.chain.digest(place, seq.tokens)
            if self.pool.insert(seq.pages[place], digest):
                seq.indexed.append(digest)
        seq.num_verified = end
        seq.quiet_until = min((end // page_size + 1) * page_size, seq.max_total - 1)

    def _accept(self, seq: Sequence, token: int) -> str | None:
        seq.tokens.append(token)
        reason = None
        # The device masks the stop ids while fewer than min_tokens outputs came before.
        if token in seq.stop_ids and seq.num_outputs > seq.request.params.min_tokens:
            reason = "stop"
        elif len(seq.tokens) >= seq.max_total:
            reason = "length"
        if reason is not None:
            self._finish_all([seq], reason)
        return reason

    def _fail(self, seq: Sequence) -> None:
        """Ends a choice whose numbers are not finite; nothing it has computed may be found by others."""
        for digest in seq.indexed:
            self.pool.forget_digest(digest)
        self._finish_all([seq], "error")

    # the ends of a sequence's life

    def _finish_all(self, sequences: Values[Sequence], reason: str) -> None:
        for seq in sequences:
            if seq.leader is None and seq.state is State.WAITING:
                self._leave_queue(seq)
                self._num_queued -= len(seq.group)
            elif seq.leader is None:
                self._remove_running(seq)
            if seq.state is State.RUNNING:
                self._vacate(seq)
            seq.state = State.FINISHED
            seq.finish_reason = reason
        for request_id in {seq.request.id for seq in sequences}:
            if all(seq.state is State.FINISHED for seq in self._requests[request_id]):
                del self._requests[request_id]

    def _vacate(self, seq: Sequence) -> None:
        """Gives back pages, slot and adapter."""
        self.pool.free(seq.pages)
        seq.pages = []
        assert seq.slot is not None, f"{seq} holds no slot"
        heapq.heappush(self._free_slots, seq.slot)
        seq.slot = None
        seq.decode_end = seq.quiet_until = 0
        if seq.request.adapter is not None:
            self.residency.release(seq.request.adapter)

    def _enqueue(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=_rank)
        self.policy.enter(seq)
        self._num_queued += len(seq.group)

    def _leave_queue(self, seq: Sequence) -> None:
        self._remove(self.waiting, seq)
        self.policy.leave(seq)

    def _remove_running(self, seq: Sequence) -> None:
        self._num_prefilling -= seq.prefilling
        self._remove(self.running, seq)

    def _remove(self, queue: list[Sequence], seq: Sequence) -> None:
        place = bisect_left(queue, seq.rank, key=_rank)
        assert queue[place] is seq, f"{seq} is not in its queue"
        del queue[place]

    def _prefix_key(self, request: Request) -> PrefixKey:
        return PrefixKey(
            tenant=request.tenant,
            salt=request.salt,
            base_digest=self.config.base_digest,
            adapter_digest=request.adapter_digest,
        )


def _rank(seq: Sequence) -> tuple:
    return seq.rank


def _sample(outcome: Outcome) -> int:
    return -1 if outcome.sample is None else outcome.sample
