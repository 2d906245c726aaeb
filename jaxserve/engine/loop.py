"""The engine's loop: plan, pack, dispatch; read the step before, commit. Token ids in, token ids out.

The loop runs one step ahead: step n + 1 goes to the device before the host has read what step n drew, so the host's
work hides behind the device's. A sequence that turns out to have ended at step n has one wasted row in step n + 1.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.adapters.bank import BankShape, sites_touched
from jaxserve.adapters.residency import Residency
from jaxserve.adapters.scales import fused_inputs, is_scaled
from jaxserve.adapters.store import AdapterStore, AdapterVersion
from jaxserve.adapters.weights import AdapterWeights, Key
from jaxserve.engine.bank_writer import BankWriter
from jaxserve.engine.batch import BatchLayout
from jaxserve.engine.buckets import Bucket, Buckets
from jaxserve.engine.compiles import CompileCounter
from jaxserve.engine.gradient import TrainShape, TrainState, empty_train_state
from jaxserve.engine.job_programs import DeviceShapes, shapes_of
from jaxserve.engine.lane_sums import LaneSums
from jaxserve.engine.lanes import SITE_OF, adapter_lengths
from jaxserve.engine.pack import AdapterRows, Packer, Slots, check_edits, slot_edits
from jaxserve.engine.planner import Planned, Planner
from jaxserve.engine.sharing import sharing
from jaxserve.engine.state import EngineState, copy_pages, empty_state, write_slot
from jaxserve.engine.step import StepOutput, StepSpec, step
from jaxserve.engine.times import StepLoad
from jaxserve.engine.trainer import Trainer
from jaxserve.errors import EngineError, InvalidRequest
from jaxserve.finetune.live import LiveWeights
from jaxserve.kvcache.pages import PagePool
from jaxserve.models.config import ModelConfig
from jaxserve.scheduler.plan import NO_REQUESTS, Outcome, StepPlan, StepResult
from jaxserve.scheduler.request import Objective, Request, Sequence
from jaxserve.scheduler.scheduler import Scheduler, SchedulerConfig
from jaxserve.scheduler.slo import LatencyBudget
from pallas_kernels.lora_matmul import PAGE_RANK, SINGLE_ROWS

logger = logging.getLogger(__name__)

COPIES = 16  # page copies per device call
DISK_SECONDS = 0.05  # waited for at a time when jobs wait for nothing but the disk
MAX_COMPILERS = 4  # each may take gigabytes for a large model
TRAIN_SLOTS = 8  # finetune sequences under way at once
MAX_REPLAYS = 2  # failed steps in a row before the requests in flight are given up


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """Sizes of an engine core, all resolved: nothing is a default any more."""

    dtype: str
    num_pages: int
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    row_block: int
    max_logprobs: int
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    max_queue: int = 1024
    max_loras: int = 0
    max_lora_rank: int = 0
    attention: str | None = None
    lora: str | None = None
    max_grad_rows: int = 256
    remat: str = "attention"
    objectives: Mapping[str, Objective] = field(default_factory=lambda: {"": Objective()})  # by class of requests
    finetune_floor: float = 0.0
    sharing: str = "coserve"

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)

    @property
    def adapter_pages(self) -> int:
        """Bank pages of an adapter of the greatest rank."""
        return -(-self.max_lora_rank // PAGE_RANK)

    @property
    def bank_pages(self) -> int:
        """Bank pages in all; page 0 is the bare base model."""
        return 1 + self.max_loras * self.adapter_pages if self.max_loras else 0


class Extras(NamedTuple):
    """What the extended programs know; the others cost nothing for it."""

    scales: bool = False
    dropout: bool = False


class InFlight(NamedTuple):
    """A step the device has and the host has not read."""

    plan: StepPlan
    load: StepLoad
    output: StepOutput
    chunk_slots: list[int]  # as they were then: by the time the step is read, a sequence may have lost its slot
    started: float


class News(NamedTuple):
    """What became of one sequence in one step, with the log-probabilities it asked for."""

    outcome: Outcome
    logprobs: dict[int, float] | None
    prompt_logprobs: list[tuple[int, dict[int, float]]]  # (prompt position, log-probabilities) that became known
    error: str | None = None  # why, where the outcome is an error


class EngineCore:
    """One model on one mesh: scheduler, device state and the compiled steps."""

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        mesh: Mesh,
        config: CoreConfig,
        eos_token_ids: tuple[int, ...],
        base_digest: bytes,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self.params, self.mesh, self.config, self.clock = model, params, mesh, config, clock
        self.bank = BankShape(model, config.bank_pages, mesh.size, config.dtype) if config.max_loras else None
        self.writer = BankWriter(self.bank, mesh, config.adapter_pages) if self.bank is not None else None
        self.state = self._empty_state()
        self.pool = PagePool(config.num_pages, config.page_size, config.enable_prefix_caching)
        # Planning only notes what is to be uploaded: a failure there is then one of the step, and replayed like one.
        self._uploads: deque[tuple[AdapterVersion, list[int]]] = deque()
        self.residency = Residency(max(config.bank_pages, 1), lambda *upload: self._uploads.append(upload))
        limits = SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            row_block=config.row_block,
            policy=config.policy,
            enable_chunked_prefill=config.enable_chunked_prefill,
            max_queue=config.max_queue,
            eos_token_ids=eos_token_ids,
            base_digest=base_digest,
        )
        self.scheduler = Scheduler(limits, self.pool, self.residency)
        self.extras = Extras()
        self.specs: dict[tuple[Bucket, bool], StepSpec] = {}  # by bucket, and whether it knows the extras
        self.slots = Slots(config.max_num_seqs, config.pages_per_seq, TRAIN_SLOTS)
        self.packer = Packer(
            self.slots,
            {},
            config.row_block,
            config.num_pages,
            config.page_size,
            model.vocab_size,
            config.bank_pages,
        )
        self.in_flight: deque[InFlight] = deque()
        self.compiles = CompileCounter()
        self.num_steps = self.failures = 0
        self.host_seconds = 0.0
        self._idle = False
        self.on_accelerator = mesh.devices.flat[0].platform != "cpu"
        self.trainer: Trainer | None = None
        budget = LatencyBudget(tuple(config.objectives.values()), config.finetune_floor)
        buckets = Buckets.make(limits.max_chunk_rows, config.max_num_seqs, config.row_block)
        self.planner = Planner(
            self.scheduler, buckets, config.max_model_len, budget, sharing(config.sharing), self._needs_extras
        )
        self._last_done = 0.0
        self.lock = threading.RLock()
        self._add_specs(buckets, extended=False)

    # start-up

    def _empty_state(self) -> EngineState:
        c = self.config
        return empty_state(
            self.model,
            self.mesh,
            num_pages=c.num_pages,
            page_size=c.page_size,
            num_slots=c.max_num_seqs,
            dtype=c.dtype,
            bank=self.bank,
        )

    def _add_specs(self, buckets: Iterable[Bucket], extended: bool) -> list[tuple[Bucket, bool]]:
        """Declares programs; returns those that are new."""
        specs = {(bucket, extended): self._spec(bucket, extended) for bucket in buckets}
        new = [key for key, spec in specs.items() if self.specs.get(key) != spec]
        self.specs |= specs
        self.packer.layouts |= {key: spec.layout for key, spec in specs.items()}
        return new

    def _spec(self, bucket: Bucket, extended: bool) -> StepSpec:
        c, scaled = self.config, extended and self.extras.scales
        # decode rows stand side by side by adapter: a run of them ends with its block or its adapter
        runs = min(-(-bucket.decode_rows // SINGLE_ROWS) + c.bank_pages - 1, bucket.decode_rows)
        lora_items = (bucket.block_rows // c.row_block + runs) * c.adapter_pages if self.bank else 0
        layout = BatchLayout(
            bucket,
            c.max_num_seqs,
            c.pages_per_seq,
            lora_items,
            train_slots=TRAIN_SLOTS,
            grad_items=bucket.grad_rows // c.row_block * c.adapter_pages,
            row_block=c.row_block,
            scaled=scaled,
            dropout=extended and self.extras.dropout and bucket.grad_rows > 0,
        )
        return StepSpec(
            train=self.trainer.shape if bucket.grad_rows and self.trainer else None,
            config=self.model,
            mesh=self.mesh,
            layout=layout,
            row_block=c.row_block,
            page_size=c.page_size,
            max_logprobs=c.max_logprobs,
            bank=self.bank,
            attention=c.attention,
            lora=c.lora,
            scaled=scaled,
        )

    def warm_up(self) -> dict[str, float]:
        """Compiles every program the engine will ever run, by running it on nothing. Returns seconds by program."""
        seconds = self._try_all(self.specs)
        start = self.clock()
        drop = np.full(COPIES, self.config.num_pages, np.int32)
        self.state = copy_pages(self.state, np.zeros(COPIES, np.int32), drop)
        self.state = self._write_slot(0, [], 0, slot_edits(None))
        if self.writer is not None:
            self._warm_up_writer()
        jax.block_until_ready(self.state)
        seconds["slot and page writers"] = self.clock() - start
        self.compiles.mark_ready()
        return seconds

    def _try_all(self, keys: Iterable[tuple[Bucket, bool]]) -> dict[str, float]:
        """Compiles programs and runs each twice on nothing; the second run is its time. Returns the seconds that each
        took to compile."""
        seconds = {}
        for (bucket, extended), compiling in self._compile(list(keys)).items():
            ints, _, floats, _ = self.specs[bucket, extended].layout.empty()
            jax.block_until_ready(self._run(bucket, extended, ints, floats))
            start = self.clock()
            jax.block_until_ready(self._run(bucket, extended, ints, floats))
            self.planner.times.calibrate(bucket, extended, self.clock() - start)
            seconds[f"{bucket} extended" if extended else str(bucket)] = compiling
        return seconds

    def _compile(self, keys: list[tuple[Bucket, bool]]) -> dict[tuple[Bucket, bool], float]:
        """Compiles programs side by side, each on a thread: the compiler keeps but one core busy. A call finds the
        program that was compiled for its arguments. Returns seconds by program."""

        def compile_one(lowered: Any) -> float:
            start = self.clock()
            with self.compiles.preparing():
                lowered.compile()
            return self.clock() - start

        with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_COMPILERS)) as pool:
            futures = {key: pool.submit(compile_one, self._lower(*key)) for key in keys}
            return {key: future.result() for key, future in futures.items()}

    def _lower(self, bucket: Bucket, extended: bool) -> Any:
        spec = self.specs[bucket, extended]
        ints, _, floats, _ = spec.layout.empty()
        state, _, scales = self._arguments(bucket, spec)
        return step.lower(self.params, state, ints, floats, scales, spec=spec)

    def _run(self, bucket: Bucket, extended: bool, ints: np.ndarray, floats: np.ndarray) -> StepOutput:
        """One step on the device."""
        spec = self.specs[bucket, extended]
        state, kept, scales = self._arguments(bucket, spec)
        state, output = step(self.params, state, ints, floats, scales, spec=spec)
        if state.train is not None:
            assert self.trainer is not None
            self.trainer.sums.state = replace(state.train, scale_lanes=kept) if kept is not None else state.train
        self.state = replace(state, train=None)
        return output

    def _arguments(self, bucket: Bucket, spec: StepSpec) -> tuple[EngineState, Any, Any]:
        """The state that a program takes, the sums that it leaves alone, and scales. Only steps with gradient rows
        carry the finetuning state."""
        state, kept, trainer = self.state, None, self.trainer if bucket.grad_rows else None
        if trainer is not None:
            kept = None if spec.scaled else trainer.sums.state.scale_lanes
            state = replace(
                state, train=trainer.sums.state if spec.scaled else replace(trainer.sums.state, scale_lanes=None)
            )
        return state, kept, self.writer.scales if spec.scaled and self.writer is not None else None

    def enable_training(self, store: AdapterStore, lanes: int) -> dict[str, float]:
        """Makes room for finetuning jobs and compiles the steps with gradient rows. Returns seconds by program."""
        c = self.config
        if self.bank is None:
            raise InvalidRequest("finetuning needs enable_lora: an adapter is trained where adapters are served")
        if self.mesh.size > self.model.num_kv_heads:
            raise InvalidRequest(
                f"finetuning needs tensor_parallel at most num_key_value_heads {self.model.num_kv_heads}; "
                f"it is {self.mesh.size}"
            )
        with self.lock, self.compiles.preparing():
            rows = c.max_grad_rows // c.row_block * c.row_block
            shape = TrainShape(TRAIN_SLOTS, 2 * c.pages_per_seq, lanes * c.adapter_pages, c.remat, lanes)
            empty = partial(empty_train_state, shape, self.bank, self.model, self.mesh, c.page_size, c.dtype)
            self.trainer = Trainer(
                self.model,
                self.mesh,
                LaneSums(shape, self.bank, self.mesh, empty, self._device_shapes),
                self.pool,
                self.residency,
                store,
                row_block=c.row_block,
                max_window=rows,
                clock=self.clock,
            )
            self.packer.train = shape
            self.scheduler.reclaim = self.trainer.queue.give_way
            buckets = Buckets.make(self.scheduler.config.max_chunk_rows, c.max_num_seqs, c.row_block, rows)
            self.planner.set_buckets(buckets)
            self.planner.finetuning = self.trainer
            if self.extras.scales:
                self.trainer.sums.enable_scales()
            return self._try_all(self._add_specs(buckets, extended=False) + self._extended_specs())

    def _device_shapes(self) -> DeviceShapes:
        assert self.trainer is not None
        assert self.writer is not None
        train = TrainState(acc=[], lanes=self.trainer.sums.state.lanes, scale_lanes=self.trainer.sums.state.scale_lanes)
        return DeviceShapes(
            self.mesh,
            self.writer.shape,
            *map(shapes_of, (train, self.state.bank, self.writer.scales, self.params)),
        )

    def enable(self, *, scales: bool = False, dropout: bool = False) -> dict[str, float]:
        """Compiles the programs that know scales (of (IA)3 and DoRA adapters) or dropout, once either is asked for.
        Returns seconds by program."""
        with self.lock, self.compiles.preparing():
            extras = Extras(self.extras.scales or scales, self.extras.dropout or dropout)
            if self.writer is None or extras == self.extras:
                return {}
            if extras.scales and not self.extras.scales:
                self.writer.enable_scales()
                self._warm_up_writer()
                if self.trainer is not None:
                    self.trainer.sums.enable_scales()
            self.extras = extras
            return self._try_all(self._extended_specs())

    def _extended_specs(self) -> list[tuple[Bucket, bool]]:
        """Programs that know all extras which are enabled; without gradient rows there is no dropout to know."""
        with_scales = [bucket for bucket in self.planner.buckets if self.extras.scales]
        with_dropout = [bucket for bucket in self.planner.buckets if self.extras.dropout and bucket.grad_rows]
        return self._add_specs(dict.fromkeys([*with_scales, *with_dropout]), extended=True)

    def _warm_up_writer(self) -> None:
        assert self.writer is not None
        assert self.state.bank is not None
        self.state = replace(self.state, bank=self.writer.warm_up(self.state.bank, self.params))

    def base_lengths(self) -> dict[Key, np.ndarray]:
        """The length of every row of every linear layer [out], by module."""
        assert self.bank is not None
        with self.lock, self.compiles.preparing():
            nothing = np.zeros(1, np.int32)  # page 0
            lengths = adapter_lengths(
                self.state.bank, self.params, nothing, mesh=self.mesh, shape=self.bank, members=tuple(SITE_OF)
            )
            lengths = jax.device_get(lengths)
        return {(layer, member): row for member, rows in lengths.items() for layer, row in enumerate(rows)}

    # requests

    def add(self, request: Request) -> list[Sequence]:
        """Queues a request; raises InvalidRequest for what can never run."""
        check_edits(request.params, self.scheduler.config.eos_token_ids)
        with self.lock:
            self._idle = False
            return self.scheduler.add(request)

    def abort(self, request_id: str) -> list[Sequence]:
        """Ends a request in whatever phase it is."""
        with self.lock:
            return self.scheduler.abort(request_id)

    def finish(self, seq: Sequence, reason: str) -> bool:
        """Ends one choice, as on a stop string."""
        with self.lock:
            return self.scheduler.finish(seq, reason)

    def has_work(self) -> bool:
        training = self.trainer is not None and self.trainer.has_work()
        return bool(self.in_flight) or self.scheduler.has_work() or training

    def stuck(self) -> bool:
        """True when requests are alive, though nothing was in flight, nothing was planned and none came since."""
        return self._idle and not self.in_flight and self.scheduler.has_work()

    def stats(self) -> dict[str, Any]:
        """Counters and gauges."""
        counts, pool = self.scheduler.counts(), self.pool
        return {
            "running": counts.running,
            "waiting": counts.waiting,
            "preemptions": counts.preemptions,
            "prefix_queries": counts.prompt_tokens,
            "prefix_hits": counts.cached_tokens,
            "kv_pages": pool.num_pages,
            "kv_pages_free": pool.num_free,
            "kv_pages_cached": pool.num_cached,
            "kv_usage": pool.num_used / pool.num_pages,
            "steps": self.num_steps,
            "host_seconds": self.host_seconds,
            "recompiles": self.compiles.after_ready,
            "resident_adapters": len(self.residency.resident()),
        }

    # the loop

    def step(self) -> list[News]:
        """Dispatches the next step and takes in the one before."""
        start = time.perf_counter()
        with self.lock:
            planned = self.planner.plan(self.clock())
            self._idle = planned is None and not self.in_flight
            if planned is not None:
                try:
                    self.in_flight.append(self._dispatch(planned))
                except Exception as error:
                    return self._recover(error, planned.plan)
            self.host_seconds += time.perf_counter() - start
            if planned is not None and len(self.in_flight) < 2:
                return []
            oldest = self.in_flight[0] if self.in_flight else None
        if oldest is None:
            if self.trainer is not None and self.trainer.has_work():
                self.trainer.wait_for_disk(DISK_SECONDS)
            return []
        try:
            jax.block_until_ready(oldest.output)
        except Exception as error:
            with self.lock:
                return self._recover(error, oldest.plan)
        with self.lock:
            try:
                self._commit_finetune(oldest)
            except Exception as error:
                return self._recover(error, oldest.plan)
            self.in_flight.popleft()
            self.failures = 0
            return self._commit(oldest)

    def _dispatch(self, planned: Planned) -> InFlight:
        plan, load = planned.plan, planned.load
        while self._uploads:
            self._upload(*self._uploads.popleft())
        for seq in plan.started:
            self._admit(seq)
        for start in range(0, len(plan.page_copies), COPIES):
            self._copy(plan.page_copies[start : start + COPIES])
        packed = self.packer.pack(plan, load.bucket, load.extended)
        output = self._run(load.bucket, load.extended, packed.ints, packed.floats)
        if self.trainer is not None:
            self.trainer.after_dispatch()
        if self.on_accelerator:
            for array in (output.token_R, output.logprob_R, output.finite_R, output.finite_B):
                array.copy_to_host_async()
        self.num_steps += 1
        chunk_slots = [segment.seq.slot for segment in plan.chunks if segment.seq.slot is not None]
        return InFlight(plan, load, output, chunk_slots, self.clock())

    def _needs_extras(self, plan: StepPlan) -> bool:
        """Some row's adapter has scales, or is trained with dropout."""
        if not any(self.extras):
            return False
        grads, forwards = plan.finetune or ((), ())
        if any(window.seq.lane.scaled or window.seq.dropout for window in (*grads, *forwards)):
            return True
        adapters = {segment.seq.request.adapter for segment in (*plan.chunks, *plan.decodes)}
        return any(version is not None and is_scaled(version.weights) for version in adapters)

    def _admit(self, seq: Sequence) -> None:
        """Gives a sequence that starts, or starts again, its slot's parameters."""
        p = seq.request.params
        special = bool(p.logit_bias or p.min_tokens or p.uses_penalties)
        if special:
            self.state = self._write_slot(seq.slot, seq.tokens, seq.prompt_len, slot_edits(seq))
        self.slots.admit(seq, self._adapter_rows(seq.request.adapter), edited=bool(p.logit_bias or p.min_tokens))

    def _adapter_rows(self, version: AdapterVersion | None) -> AdapterRows | None:
        if version is None:
            return None
        weights = version.weights
        sites = sites_touched(sorted({member for _, member in weights.scaling}))
        return AdapterRows(self.residency.pages_of(version), sites, is_scaled(weights), fused_inputs(weights))

    def _write_slot(
        self, slot: int | None, tokens: list[int], prompt_len: int, edits: tuple[np.ndarray, ...]
    ) -> EngineState:
        assert slot is not None
        token_S, kind_S = np.zeros(self.config.max_model_len, np.int32), np.zeros(self.config.max_model_len, np.int32)
        token_S[: len(tokens)] = tokens
        kind_S[: len(tokens)] = 1
        kind_S[:prompt_len] = 2
        return write_slot(self.state, np.int32(slot), token_S, kind_S, *edits)

    def _copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        source, target = np.zeros(COPIES, np.int32), np.full(COPIES, self.config.num_pages, np.int32)
        source[: len(pairs)], target[: len(pairs)] = zip(*pairs, strict=True)
        self.state = copy_pages(self.state, source, target)

    def _commit_finetune(self, done: InFlight) -> None:
        if done.plan.finetune is not None and self.trainer is not None:
            finite = np.asarray(done.output.finite_B)[self.config.max_num_seqs :]
            self.trainer.commit(done.plan.finetune, done.output, finite, done.plan.chunk_rows)
        elif self.trainer is not None:
            self.trainer.held = False

    def _commit(self, done: InFlight) -> list[News]:
        start = time.perf_counter()
        plan, output = done.plan, done.output
        now = self.clock()
        self.planner.measured(done.load, now - max(done.started, self._last_done), now)
        self._last_done = now
        if plan.index == NO_REQUESTS:
            return []
        chunk_finite = np.asarray(output.finite_B)[done.chunk_slots].tolist()
        count = len(plan.samples)
        finite = np.asarray(output.finite_R)[:count].tolist()
        for i, sample in enumerate(plan.samples):
            if sample.kind == "chunk":
                finite[i] = finite[i] and chunk_finite[sample.segment_index]
        tokens = np.asarray(output.token_R)[:count].tolist()
        prompt = self._prompt_logprobs(plan, output)
        outcomes = self.scheduler.commit(plan, StepResult(tokens=tokens, finite=finite, chunk_finite=chunk_finite), now)
        news = [News(o, self._logprobs(o, output), prompt.pop(id(o.seq), []), _why(o)) for o in outcomes]
        waiting = [segment.seq for segment in plan.chunks if id(segment.seq) in prompt]
        news += [News(Outcome(seq, None, None, None), None, prompt[id(seq)]) for seq in waiting]
        self.host_seconds += time.perf_counter() - start
        return news

    def _logprobs(self, outcome: Outcome, output: StepOutput) -> dict[int, float] | None:
        """The drawn token's log-probability and those of the top N, likeliest first after it."""
        wanted = outcome.seq.request.params.logprobs
        if wanted is None or outcome.token is None:
            return None
        found = {outcome.token: float(np.asarray(output.logprob_R)[outcome.sample])}
        if wanted:
            tokens = np.asarray(output.top_token_RN)[outcome.sample, :wanted].tolist()
            values = np.asarray(output.top_logprob_RN)[outcome.sample, :wanted].tolist()
            found |= {token: value for token, value in zip(tokens, values, strict=True) if token not in found}
        return found

    def _prompt_logprobs(self, plan: StepPlan, output: StepOutput) -> dict[int, list[tuple[int, dict[int, float]]]]:
        """By sequence: (position, log-probabilities) of the prompt tokens that this step's chunks predict."""
        found: dict[int, list[tuple[int, dict[int, float]]]] = {}
        row = 0
        for segment in plan.chunks:
            wanted, prompt = segment.seq.request.params.prompt_logprobs, segment.seq.request.prompt_ids
            if wanted is not None:
                values = np.asarray(output.prompt_logprob_T)
                tops = np.asarray(output.prompt_top_token_TN), np.asarray(output.prompt_top_logprob_TN)
                entries = found.setdefault(id(segment.seq), [])
                for offset in range(min(segment.length, len(prompt) - 1 - segment.start)):
                    position, at = segment.start + offset + 1, row + offset
                    entry = {prompt[position]: float(values[at])}
                    pairs = zip(tops[0][at, :wanted].tolist(), tops[1][at, :wanted].tolist(), strict=True)
                    entry |= {token: value for token, value in pairs if token not in entry}
                    entries.append((position, entry))
            row += -(-segment.length // self.config.row_block) * self.config.row_block
        return found

    # faults

    def _recover(self, error: Exception, plan: StepPlan) -> list[News]:
        """After a failed step: the donated pool is gone. Rebuild it and replay from the tokens the host has read.

        A step with finetune windows is blamed on them first: the requests go alone in the next one.
        """
        windows = plan.finetune is not None
        self.failures += not windows
        logger.exception("step failed (%d in a row%s)", self.failures, ", with finetune windows" if windows else "")
        if isinstance(error, EngineError):
            raise error
        self.in_flight.clear()
        self.planner.forget()
        running = list(self.scheduler.running)
        self.state = self._empty_state()
        self.scheduler.reset()
        if self.trainer is not None:
            self.trainer.recover(plan.finetune)
        self._uploads.clear()
        for version in self.residency.resident():
            self._upload(version, list(self.residency.pages_of(version)))
        if self.failures <= MAX_REPLAYS:
            return []
        lost = [seq for first in running for seq in self.scheduler.abort(first.request.id)]
        for seq in lost:
            seq.finish_reason = "error"
        reason = f"the engine's step failed {self.failures} times in a row"
        self.failures = 0
        return [News(Outcome(seq, None, "error", None), None, [], reason) for seq in lost]

    # adapters

    def prepare(self, weights: AdapterWeights) -> None:
        """Does on the caller's thread what the loop need not: cuts an adapter into bank pages, and compiles the steps
        with scales when the first adapter that has some comes."""
        if self.writer is not None:
            self.enable(scales=is_scaled(weights))
            self.writer.prepare(weights)

    def _upload(self, version: AdapterVersion, pages: list[int]) -> None:
        assert self.writer is not None
        assert self.state.bank is not None
        if isinstance(version.weights, LiveWeights):
            assert self.trainer is not None
            bank, self.writer.scales = self.trainer.versions.upload(
                version, pages, self.state.bank, self.writer.scales, self.params
            )
        else:
            assert isinstance(version.weights, AdapterWeights), version
            bank = self.writer.write(self.state.bank, version.weights, pages, self.params)
        self.state = replace(self.state, bank=bank)


def _why(outcome: Outcome) -> str | None:
    return "the model's numbers are not finite for this request" if outcome.finish_reason == "error" else None
