"""The engine's loop: plan, pack, dispatch; read the step before, commit. Token ids in, token ids out.

The loop runs one step ahead: step n + 1 goes to the device before the host has read what step n drew, so the host's
work hides behind the device's. A sequence that turns out to have ended at step n has one wasted row in step n + 1.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from operator import or_
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.adapters.residency import Residency
from jaxserve.adapters.scales import ScalesShape, is_scaled
from jaxserve.adapters.store import AdapterStore, AdapterVersion
from jaxserve.adapters.weights import AdapterWeights, Key
from jaxserve.engine.bank_writer import BankWriter
from jaxserve.engine.batch import PROMPT_LOGPROBS
from jaxserve.engine.buckets import Buckets
from jaxserve.engine.compiles import CompileCounter
from jaxserve.engine.gradient import TrainShape, empty_scale_lanes, empty_train_state, sums_alone
from jaxserve.engine.job_programs import DeviceShapes, shapes_of
from jaxserve.engine.lane_sums import LaneSums
from jaxserve.engine.lanes import SITE_OF, adapter_lengths
from jaxserve.engine.pack import Edits, Packer, Slots, adapter_rows, check_edits, slot_edits, slot_tokens
from jaxserve.engine.planner import Planned, Planner
from jaxserve.engine.programs import Arrays, Needs, ProgramKey, Programs
from jaxserve.engine.recovery import Recovery
from jaxserve.engine.results import News, read_news, read_tokens
from jaxserve.engine.sharing import sharing
from jaxserve.engine.specs import TRAIN_SLOTS, CoreConfig, train_shape
from jaxserve.engine.state import EngineState, copy_pages, empty_state, write_slot
from jaxserve.engine.step import StepOutput
from jaxserve.engine.times import StepLoad
from jaxserve.engine.trainer import Trainer
from jaxserve.errors import InvalidRequest
from jaxserve.finetune.live import LiveWeights
from jaxserve.finetune.windows import FinetunePlan
from jaxserve.kvcache.pages import PagePool
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import check_finetuning_tp
from jaxserve.scheduler.plan import NO_REQUESTS, StepPlan
from jaxserve.scheduler.request import Request, Sequence
from jaxserve.scheduler.scheduler import Scheduler, SchedulerConfig
from jaxserve.scheduler.slo import LatencyBudget

TIMED_RUNS = 3  # of each program at start-up: others may be busy in one of them
TIMED_SECONDS = 1.0  # in which a program is run again: of a longer one, a hiccup is a small part
COPIES = 16  # page copies per device call
DISK_SECONDS = 0.05  # waited for at a time when jobs wait for nothing but the disk


class InFlight(NamedTuple):
    """A step the device has and the host has not read."""

    plan: StepPlan
    load: StepLoad
    output: StepOutput
    chunk_slots: list[int]  # as they were then: by the time the step is read, a sequence may have lost its slot
    started: float


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
        self.bank = config.bank(model, mesh.size)
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
        self.compiles = CompileCounter()
        self.programs = Programs(config, model, mesh, self.bank, clock, self.compiles.preparing)
        self.specs = self.programs.specs
        self.slots = Slots(config.max_num_seqs, config.pages_per_seq, TRAIN_SLOTS)
        self.packer = Packer(
            self.slots,
            self.programs.layouts,
            config.row_block,
            config.num_pages,
            config.page_size,
            model.vocab_size,
            config.bank_pages,
        )
        self.in_flight: deque[InFlight] = deque()
        self.num_steps = 0
        self.host_seconds = 0.0
        self._idle = False
        self.on_accelerator = mesh.devices.flat[0].platform != "cpu"
        self.trainer: Trainer | None = None
        budget = LatencyBudget(tuple(config.objectives.values()), config.finetune_floor)
        buckets = Buckets.make(limits.max_chunk_rows, config.max_num_seqs, config.row_block)
        self.planner = Planner(
            self.scheduler, buckets, config.max_model_len, budget, sharing(config.sharing), self.programs.need_extras
        )
        self.recovery = Recovery(self.scheduler, self.planner, self._rebuild)
        self._last_done = 0.0
        self.lock = threading.RLock()
        self._enabling = threading.Lock()  # held while programs are made ready beside the loop; before ``lock``
        self.programs.add(buckets)

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

    def _try_all(self, keys: Iterable[ProgramKey]) -> dict[str, float]:
        """Compiles programs and runs each a few times on nothing; the shortest run after the first is its time.
        Returns the seconds that each took to compile."""
        seconds = {}
        for (bucket, extended), compiling in self.programs.compile(keys, self._shapes()).items():
            ints, _, floats, _ = self.specs[bucket, extended].layout.empty()
            times = []
            while len(times) < 2 or (len(times) <= TIMED_RUNS and sum(times[1:]) < TIMED_SECONDS):
                with self.lock:  # for no longer: the loop may be serving
                    start = self.clock()
                    jax.block_until_ready(self._run((bucket, extended), ints, floats, draws=True))
                    times.append(self.clock() - start)
            with self.lock:
                self.planner.times.calibrate(bucket, extended, min(times[1:]))
            seconds[f"{bucket} extended" if extended else str(bucket)] = compiling
        return seconds

    def _arrays(self) -> Arrays:
        train = self.trainer.sums.state if self.trainer is not None else None
        return Arrays(self.params, self.state, train, self.writer.scales if self.writer is not None else None)

    def _shapes(self) -> Any:
        """The same with shapes in place of the arrays, some of which the next step takes."""
        with self.lock:
            return shapes_of(self._arrays())

    def _run(
        self,
        key: ProgramKey,
        ints: np.ndarray,
        floats: np.ndarray,
        draws: bool,
        target_T: np.ndarray | None = None,
    ) -> StepOutput:
        """One step on the device, and what is drawn and scored after it."""
        self.state, train, output = self.programs.run(key, self._arrays(), ints, floats)
        if train is not None:
            assert self.trainer is not None
            self.trainer.sums.state = train
        drawn = scored = None
        if draws:
            assert output.hidden_RD is not None
            self.state, drawn = self.programs.draw(key, self._arrays(), output.hidden_RD, ints, floats)
        if target_T is not None:
            assert output.chunk_hidden_TD is not None
            scored = self.programs.score(self._arrays(), output.chunk_hidden_TD, target_T)
        return replace(output, hidden_RD=None, chunk_hidden_TD=None, drawn=drawn, scored=scored)

    def enable_training(self, store: AdapterStore, lanes: int) -> dict[str, float]:
        """Makes room for finetuning jobs, and compiles the steps that change with it; before ``warm_up``, that does.
        What jobs need beyond is for ``enable``. Returns seconds by program."""
        c = self.config
        if self.bank is None:
            raise InvalidRequest("finetuning needs enable_lora: an adapter is trained where adapters are served")
        check_finetuning_tp(self.model, self.mesh.size)
        with self._enabling, self.compiles.preparing():
            if self.trainer is not None:
                return {}
            trainer = self._make_trainer(store, train_shape(c, lanes))
            shape, rows = trainer.sums.shape, trainer.queue.max_window
            buckets = Buckets.make(
                self.scheduler.config.max_chunk_rows, c.max_num_seqs, c.row_block, rows, shape.stash_blocks > 0
            )
            if self.compiles.ready:
                self._compile_training_ahead(trainer, buckets)
            with self.lock:
                self.trainer = self.planner.finetuning = trainer
                self.programs.train = self.packer.train = shape
                self.scheduler.reclaim = trainer.queue.give_way
                self.planner.set_buckets(buckets)
                if not self.compiles.ready:
                    self.programs.forget()  # buckets without a stash have no use any more
                new = self.programs.add(buckets)
            return self._try_all(new) if self.compiles.ready else {}

    def _make_trainer(self, store: AdapterStore, shape: TrainShape) -> Trainer:
        c = self.config
        assert self.bank is not None
        empty = partial(empty_train_state, shape, self.bank, self.model, self.mesh, c.page_size, c.dtype)
        trainer = Trainer(
            self.model,
            self.mesh,
            LaneSums(shape, self.bank, self.mesh, empty, self._device_shapes),
            self.pool,
            self.residency,
            store,
            row_block=c.row_block,
            max_window=c.max_grad_rows // c.row_block * c.row_block,
            clock=self.clock,
        )
        if self.programs.needs.scales:
            trainer.sums.enable_scales()
        return trainer

    def _compile_training_ahead(self, trainer: Trainer, buckets: Buckets) -> None:
        """Compiles from shapes, on the caller's thread, what ``enable_training`` then finds compiled."""
        programs = self.programs.meeting(self.programs.needs)
        programs.train = trainer.sums.shape
        programs.compile(programs.add(buckets), self._shapes()._replace(train=shapes_of(trainer.sums.state)))

    def _device_shapes(self) -> DeviceShapes:
        assert self.trainer is not None
        assert self.writer is not None
        train = sums_alone(self.trainer.sums.state)
        return DeviceShapes(
            self.mesh,
            self.writer.shape,
            *map(shapes_of, (train, self.state.bank, self.writer.scales, self.params)),
        )

    def enable(self, asked: Needs) -> dict[str, float]:
        """Compiles the programs that are asked for the first time; before ``warm_up``, that does. Returns seconds by
        program."""
        if self._with(asked) == self.programs.needs:  # a reload may ask, in the loop
            return {}
        with self._enabling, self.compiles.preparing():
            had, needs = self.programs.needs, self._with(asked)
            if self.writer is None or needs == had:
                return {}
            if self.compiles.ready:
                self._compile_ahead(self.writer, needs)
            with self.lock:
                if needs.scales and not had.scales:
                    self.writer.enable_scales()
                    self._warm_up_writer()
                    if self.trainer is not None:
                        self.trainer.sums.enable_scales()
                self.programs.needs = needs
                new = self.programs.add(self.planner.buckets)
            return self._try_all(new) if self.compiles.ready else {}

    def _with(self, asked: Needs) -> Needs:
        return Needs(*map(or_, self.programs.needs, asked))

    def _compile_ahead(self, writer: BankWriter, needs: Needs) -> None:
        """Compiles from shapes, on the caller's thread, what ``enable`` then finds compiled: the loop serves on."""
        programs, arrays = self.programs.meeting(needs), self._shapes()
        if needs.scales and arrays.scales is None:
            arrays = arrays._replace(scales=shapes_of(ScalesShape(writer.shape).empty(self.mesh)))
            writer.compile_scales(arrays.scales, arrays.state.bank, arrays.params)
            if programs.train is not None and arrays.train is not None:
                lanes = empty_scale_lanes(programs.train, writer.shape, self.mesh)
                train = replace(arrays.train, scale_lanes=shapes_of(lanes))
                arrays = arrays._replace(train=train)
                if self.trainer is not None:
                    device = replace(self._device_shapes(), train=sums_alone(train), scales=arrays.scales)
                    self.trainer.sums.compile_ahead(device)
        programs.compile(programs.add(self.planner.buckets), arrays)

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
                    return self.recovery.failed(error, planned.plan)
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
                return self.recovery.failed(error, oldest.plan)
        with self.lock:
            try:
                self._commit_finetune(oldest)
            except Exception as error:
                return self.recovery.failed(error, oldest.plan)
            self.in_flight.popleft()
            self.recovery.succeeded()
            return self.commit(oldest)

    def _dispatch(self, planned: Planned) -> InFlight:
        plan, load = planned.plan, planned.load
        while self._uploads:
            self._upload(*self._uploads.popleft())
        for seq in plan.started:
            self._admit(seq)
        for start in range(0, len(plan.page_copies), COPIES):
            self._copy(plan.page_copies[start : start + COPIES])
        packed = self.packer.pack(plan, load.bucket, load.extended)
        key, fields = (load.bucket, load.extended), packed.fields
        targets = fields["target_T"] if fields["flags"][PROMPT_LOGPROBS] else None
        output = self._run(key, packed.ints, packed.floats, plan.num_samples > 0, targets)
        if self.trainer is not None:
            self.trainer.after_dispatch()
        if self.on_accelerator:
            output.finite_B.copy_to_host_async()
            if output.drawn is not None:
                for array in (output.drawn.token_R, output.drawn.logprob_R, output.drawn.finite_R):
                    array.copy_to_host_async()
        self.num_steps += 1
        chunk_slots = [segment.seq.slot for segment in plan.chunks if segment.seq.slot is not None]
        return InFlight(plan, load, output, chunk_slots, self.clock())

    def _admit(self, seq: Sequence) -> None:
        """Gives a sequence that starts, or starts again, its slot's parameters."""
        p = seq.request.params
        special = bool(p.logit_bias or p.min_tokens or p.uses_penalties)
        if special:
            self.state = self._write_slot(seq.slot, seq.tokens, seq.prompt_len, slot_edits(seq))
        version = seq.request.adapter
        rows = None if version is None else adapter_rows(version.weights, self.residency.pages_of(version))
        self.slots.admit(seq, rows, edited=bool(p.logit_bias or p.min_tokens))

    def _write_slot(self, slot: int | None, tokens: list[int], prompt_len: int, edits: Edits) -> EngineState:
        assert slot is not None
        token_S, kind_S = slot_tokens(tokens, prompt_len, self.config.max_model_len)
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

    def commit(self, done: InFlight) -> list[News]:
        """Takes in what a step did for its requests."""
        start = time.perf_counter()
        plan, output = done.plan, done.output
        now = self.clock()
        self.planner.measured(done.load, now - max(done.started, self._last_done), now)
        self._last_done = now
        if plan.index == NO_REQUESTS:
            return []
        outcomes = self.scheduler.commit(plan, read_tokens(plan, output, done.chunk_slots), now)
        news = read_news(plan, output, outcomes, self.config.row_block)
        self.host_seconds += time.perf_counter() - start
        return news

    def _rebuild(self, windows: FinetunePlan | None) -> None:
        """The device's side with nothing in it but the adapters, after a step failed that had these windows."""
        self.in_flight.clear()
        self.state = self._empty_state()
        if self.trainer is not None:
            self.trainer.recover(windows)
        self._uploads.clear()
        for version in self.residency.resident():
            self._upload(version, list(self.residency.pages_of(version)))

    # adapters

    def prepare(self, weights: AdapterWeights) -> None:
        """Does on the caller's thread what the loop need not: cuts an adapter into bank pages, and compiles the steps
        with scales when the first adapter that has some comes."""
        if self.writer is not None:
            self.enable(Needs(scales=is_scaled(weights)))
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
