"""Replicas on the virtual clock: what fits into a named device's memory, how long its steps take, who shares it.

Two processes on one device (``spatial``) are a model of their own, in favour of sharing: while both have a step under
way, each has half of the multiprocessors, and so half of the device's arithmetic, and of the memory's bandwidth what
the other leaves, half of it at least; a process alone has all. Caches are not fought over, and switching costs nothing.
Each process has its own copy of the weights.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from jaxserve.bench import roofline
from jaxserve.bench.arrivals import rows_at
from jaxserve.bench.engine import model_path
from jaxserve.bench.load import make_load
from jaxserve.bench.ran import DRAIN_SECONDS, NOT_OVER, Asked, Ran, StepRow, drain_seconds, run_name
from jaxserve.bench.roofline import ALL_LINEAR, kv_bytes, weight_bytes
from jaxserve.bench.runner import GREEDY
from jaxserve.bench.serving import sampling
from jaxserve.bench.simulator import Device, RooflineDevice, Settings, Simulator, endless_job, endless_jobs
from jaxserve.bench.workload import NOBODY, Row, Workload
from jaxserve.config import Config
from jaxserve.engine.activations import STASH_SHARE, activation_bytes, stash_bytes, stash_tokens, window_remat
from jaxserve.engine.planner import NOTHING, Planned
from jaxserve.engine.sizes import check_length, objectives
from jaxserve.errors import ConfigError
from jaxserve.finetune.job import Job
from jaxserve.finetune.windows import rounded
from jaxserve.models.config import ModelConfig
from jaxserve.models.loader import load_config
from jaxserve.models.params import check_finetuning_tp, check_tp
from jaxserve.scheduler.scheduler import SchedulerConfig
from jaxserve.tokenizer import Tokenizer, find_tokenizer

RESERVE_BYTES = 2 << 30  # of each device: runtime, buffers of steps without gradient rows
MAX_LENGTH = 8192  # of a sequence, where the configuration says nothing
ROW_BLOCK = 64
NUM_EXAMPLES = 512  # of made-up data; they come again
SHARE = 0.5  # of a device's multiprocessors that each of two processes has


def unsimulated(config: Config) -> list[str]:
    """A line for each setting that a simulated device knows nothing of."""
    wrong = []
    if config.model.dtype == "float32":
        wrong.append("model.dtype float32: a simulated device computes with operands of 16 bits")
    for adapter, job in endless_jobs(config).items():
        where = f"coserve.jobs, {adapter}" if config.coserve.jobs else "job"
        if job.method not in ("lora", "rslora"):
            wrong.append(f"{where}: method {job.method}; in a simulation, lora or rslora")
        if job.target_modules != config.job.target_modules:
            wrong.append(f"{where}: in a simulation all jobs have job.target_modules")
    if sampling(config) != GREEDY:
        wrong.append("sampling: nothing is drawn in a simulation, whose answers are as long as the load says")
    return wrong


def targets_of(config: Config) -> tuple[str, ...]:
    """The linear layers that adapters change.

    Raises:
      ConfigError: a pattern, which stands for names only beside a model's weights.
    """
    given = config.job.target_modules
    if given is None or given == "all-linear":
        return ALL_LINEAR
    names = (given,) if isinstance(given, str) else given
    if not set(names) <= set(ALL_LINEAR):
        raise ConfigError([f"job.target_modules {given!r}: in a simulation, names out of {', '.join(ALL_LINEAR)}"])
    return names


def settings_of(config: Config, model: ModelConfig, device: roofline.Device, sharing: str, copies: int = 1) -> Settings:
    """The sizes of an engine on this device.

    Args:
      copies: of the weights that the device's memory holds.

    Raises:
      ConfigError: no room for the pages of one sequence, or one longer than the model was made for.
    """
    engine, finetune, shards = config.engine, config.finetune, config.engine.tensor_parallel
    longest = longest_of(config, model)
    rows = max(finetune.finetune_window // ROW_BLOCK, 1) * ROW_BLOCK
    accumulators = 2 * longest * kv_bytes(model, roofline.WIDE, shards)
    weights = copies * weight_bytes(model, 2, shards)
    budget = int(device.memory * engine.gpu_memory_utilization)
    each, room = stash_bytes(model, tensor_parallel=shards), (budget - weights) // STASH_SHARE
    stash = stash_tokens(finetune.finetune_stash_tokens, finetune.finetune_remat, longest, room, each)
    stash = rounded(stash, ROW_BLOCK)
    used = weights + RESERVE_BYTES + accumulators + stash * each
    remat = window_remat(stash, finetune.finetune_remat)
    used += activation_bytes(model, rows, remat, tensor_parallel=shards)
    free = budget - used
    fitting = free // (engine.block_size * kv_bytes(model, 2, shards))
    if fitting * engine.block_size < longest:
        raise ConfigError(
            [
                f"{device.name}: {used / 1e9:.1f} GB for {copies} x weights, activations and accumulators leave "
                f"{max(free, 0) / 1e9:.1f} GB for pages, less than one sequence of {longest} tokens needs"
            ]
        )
    pages = min(fitting, engine.num_kv_pages or fitting)
    if pages * engine.block_size < longest:
        said = f"engine.num_kv_pages {pages}: {pages * engine.block_size} tokens"
        raise ConfigError([f"{said}, less than one sequence of {longest} tokens needs"])
    return Settings(
        limits=SchedulerConfig(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=max(engine.max_num_batched_tokens, ROW_BLOCK),
            max_model_len=longest,
            row_block=ROW_BLOCK,
            policy=engine.scheduling_policy,
            enable_chunked_prefill=engine.enable_chunked_prefill,
        ),
        num_pages=pages,
        page_size=engine.block_size,
        enable_prefix_caching=engine.enable_prefix_caching,
        max_grad_rows=rows,
        stash_blocks=stash // ROW_BLOCK,
        objectives=tuple(objectives(config.engine_config()).values()),
        finetune_floor=finetune.finetune_floor,
        sharing=sharing,
    )


def longest_of(config: Config, model: ModelConfig) -> int:
    """Tokens of a sequence at most.

    Raises:
      ConfigError: more than the model was made for.
    """
    longest = config.model.max_model_len or min(MAX_LENGTH, model.max_position_embeddings)
    check_length(longest, model)
    return longest


class SharedDevice(RooflineDevice):
    """A device that two processes may share."""

    def shared(self, parts: Sequence[roofline.Work], other: float) -> float:
        """Seconds beside another process.

        Args:
          other: share of the bandwidth that it asks for.
        """
        half = replace(
            self.device, flops=self.device.flops * SHARE, bandwidth=self.device.bandwidth * max(SHARE, 1 - other)
        )
        return roofline.seconds(parts, half, self.efficiency) + self.host_seconds

    def traffic(self, parts: Sequence[roofline.Work]) -> float:
        """Seconds that moving a step's bytes takes with all of the bandwidth."""
        return sum(part.bytes for part in parts) / (self.device.bandwidth * self.efficiency.bandwidth)


class _Measured:
    """A device that adds up its traffic and its time beside another process, to see what share of the bandwidth it asks
    for."""

    def __init__(self, device: SharedDevice, other: float = 0.0, is_shared: bool = False):
        self.device, self.other, self.is_shared = device, other, is_shared
        self.traffic = self.busy = 0.0

    def seconds(self, planned: Planned) -> float:
        parts = self.device.parts(planned)
        beside = self.device.shared(parts, self.other)
        if planned.plan is not NOTHING:  # calibration
            self.traffic, self.busy = self.traffic + self.device.traffic(parts), self.busy + beside
        return beside if self.is_shared else self.device.alone(parts)

    @property
    def bandwidth(self) -> float:
        return min(self.traffic / self.busy, 1.0) if self.busy else 0.0


class BesideRequests:
    """The device as finetuning has it beside a process that serves: whole where that one is idle, shared where it is
    busy. Steps follow each other without gaps.

    Args:
      busy: (start, end) of the other's steps in order; other: the share of the bandwidth that it asks for.
    """

    def __init__(self, device: SharedDevice, busy: Sequence[tuple[float, float]], other: float):
        self.device, self.other = device, other
        self._edges = _stretches(busy)
        self._at = 0.0

    def seconds(self, planned: Planned) -> float:
        parts = self.device.parts(planned)
        alone = self.device.alone(parts)
        if planned.plan is NOTHING:  # calibration
            return alone
        start, left = self._at, 1.0  # of the step's work
        beside = self.device.shared(parts, self.other)
        while left > 0:
            end, is_busy = self._stretch()
            pace = beside if is_busy else alone
            taken = min(left * pace, end - self._at)
            left = 0.0 if taken == left * pace else left - taken / pace
            self._at += taken
        return self._at - start

    def _stretch(self) -> tuple[float, bool]:
        """End of the stretch that begins now, and whether the other process is busy in it."""
        while self._edges and self._edges[0][1] <= self._at:
            self._edges.popleft()
        if not self._edges:
            return math.inf, False
        start, end = self._edges[0]
        return (end, True) if start <= self._at else (start, False)


def _stretches(busy: Sequence[tuple[float, float]]) -> deque[tuple[float, float]]:
    """Those that touch put together."""
    merged: deque[tuple[float, float]] = deque()
    for start, end in busy:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


@dataclass(frozen=True, kw_only=True)
class Virtual:
    """Simulated replicas of a model on a named device."""

    config: Config
    model: ModelConfig
    tokenizer: Tokenizer | None = None  # for real prompts

    @classmethod
    def of(cls, config: Config) -> "Virtual":
        """Of the model that the configuration names.

        Raises:
          ModelError, InvalidRequest: a model that an engine of so many devices would not take.
        """
        path = Path(model_path(config))
        tokenizer = None if config.coserve.prompts is None else find_tokenizer(path, config.model.tokenizer)
        model, shards = load_config(path), config.engine.tensor_parallel
        check_tp(model, shards)
        check_finetuning_tp(model, shards)
        return cls(config=config, model=model, tokenizer=tokenizer)

    @property
    def device(self) -> roofline.Device:
        return roofline.DEVICES[self.config.sweep.simulate]

    @property
    def efficiency(self) -> roofline.Efficiency:
        given = self.config.sweep.matmul_efficiency
        return roofline.EXPECTED if given is None else replace(roofline.EXPECTED, matmul=given)

    def make_device(self, settings: Settings) -> SharedDevice:
        config = self.config
        return SharedDevice(
            self.model,
            self.device,
            self.efficiency,
            tensor_parallel=config.engine.tensor_parallel,
            rank=config.job.rank,
            job_ranks={adapter: job.rank for adapter, job in endless_jobs(config).items()},
            targets=targets_of(config),
            remat=window_remat(settings.stash_blocks, config.finetune.finetune_remat),
        )

    def assumptions(self) -> list[str]:
        """What the numbers rest on, in words."""
        device, used, config = self.device, self.efficiency, self.config
        jobs = endless_jobs(config).values()
        settings = settings_of(config, self.model, device, "coserve")
        remat = window_remat(settings.stash_blocks, config.finetune.finetune_remat)
        activations = f"activations of {settings.max_grad_rows} gradient rows (remat {remat})"
        if remat is None:
            activations = f"activations of {settings.stash_blocks * ROW_BLOCK} tokens between forward and backward"
        return [
            f"Simulated: {device.name}, {config.engine.tensor_parallel} per replica; the engine's own scheduler, "
            "pages, latency budget and finetune windows on a virtual clock, no arrays.",
            f"Of the data sheet's {device.flops / 1e12:.0f} TFLOP/s matrix products reach {used.matmul:.0%}, "
            f"attention {used.attention:.0%} and its backward "
            f"{used.attention_backward:.0%}; of "
            f"{device.bandwidth / 1e12:.2f} TB/s memory {used.bandwidth:.0%}, "
            f"of {device.link / 1e9:.0f} GB/s links {used.link:.0%}; {used.launch * 1e6:.1f} us per kernel. The parts "
            "of a step follow each other. The host's work hides behind the device's.",
            f"{settings.num_pages} KV pages of {settings.page_size} tokens: {config.engine.gpu_memory_utilization:.0%} "
            f"of {device.memory / 1e9:.0f} GB without weights, {activations}, and float32 sums of K and V gradients of "
            "two sequences.",
            f"Adapters of rank {_each(job.rank for job in jobs)} on {', '.join(targets_of(config))}; optimizer steps "
            "take no time. Examples of {} to {} tokens, {} to a batch.".format(
                *self._example_lengths, _each(job.batch_size for job in jobs)
            ),
            "Spatial: while both processes have a step under way each has half of the arithmetic and what bandwidth "
            "the other leaves, half at least; each has its own copy of the weights.",
            f"Requests go to the {config.sweep.replicas} replica(s) in turn. One that is not over {DRAIN_SECONDS:g} s "
            "after the last arrival, or as long as the objectives of the longest allow, has missed its own.",
        ]

    @property
    def _example_lengths(self) -> tuple[int, int]:
        """Tokens of the shortest example and of the longest."""
        bench = self.config.bench
        stash = rounded(self.config.finetune.finetune_stash_tokens or bench.finetune_longest, ROW_BLOCK)
        longest = min(bench.finetune_longest, stash, longest_of(self.config, self.model))
        return min(bench.finetune_shortest, longest), longest

    def jobs(self) -> list[Job]:
        rng = np.random.default_rng(self.config.bench.seed)
        lengths = rng.integers(*self._example_lengths, NUM_EXAMPLES, endpoint=True).tolist()
        return [endless_job(name, lengths, **dict(job)) for name, job in endless_jobs(self.config).items()]

    # a Backend

    def run(self, sharing: str, rate: float) -> Ran:
        return self._all(sharing, rate)[0]

    def spatial(self, rate: float) -> tuple[Ran, Ran]:
        serving, training = self._all("spatial", rate)
        return serving, training

    def _all(self, kind: str, rate: float) -> tuple[Ran, ...]:
        replicas = range(self.config.sweep.replicas)
        return self.joined(kind, rate, [self.replica(kind, rate, replica) for replica in replicas])

    def joined(self, kind: str, rate: float, replicas: Sequence[tuple[Ran, ...]]) -> tuple[Ran, ...]:
        """What ``run`` (one) and ``spatial`` (two) return, of what each replica did."""
        names = [run_name(kind, rate)]
        if kind == "spatial":
            names = [f"spatial requests at {rate:g}", f"spatial finetuning at {rate:g}"]
        runs = zip(names, zip(*replicas, strict=True), strict=True)
        return tuple(_joined(name, self.config.sweep.seconds, parts) for name, parts in runs)

    def replica(self, kind: str, rate: float, number: int) -> tuple[Ran, ...]:
        """One replica's part in ``run`` of a way to share, or in ``spatial``. It does not depend on the others."""
        load = self._load(rate, number)
        if kind == "spatial":
            return self._spatial(load, number)
        settings = settings_of(self.config, self.model, self.device, kind)
        return (self._replica(settings, self.make_device(settings), load, number),)

    def _spatial(self, load: Workload, number: int) -> tuple[Ran, Ran]:
        plain = settings_of(self.config, self.model, self.device, "inference-only", copies=2)
        device, tuning = self.make_device(plain), replace(plain, sharing="finetune-only")
        asking = _Measured(device, self._bandwidth_of_finetuning, is_shared=True)
        served = self._replica(plain, asking, load, number)
        rest = BesideRequests(device, [(step.at, step.end) for step in served.steps], asking.bandwidth)
        return served, self._replica(tuning, rest, NOBODY, number)

    @cached_property
    def _bandwidth_of_finetuning(self) -> float:
        """The share of it that finetuning asks for when it is alone."""
        plain = settings_of(self.config, self.model, self.device, "finetune-only", copies=2)
        probe = _Measured(self.make_device(plain))
        self._replica(plain, probe, NOBODY, 0)
        return probe.bandwidth

    @cached_property
    def _rows(self) -> Callable[[float], list[Row]]:
        """Of all replicas together, at so many requests per second."""
        return lru_cache(lambda rate: rows_at(self.config, rate, self.config.sweep.seconds)[0] if rate else [])

    def _load(self, rate: float, replica: int) -> Workload:
        config, replicas = self.config, self.config.sweep.replicas
        return make_load(
            config,
            self._rows(rate * replicas)[replica::replicas],
            "",
            config.coserve.answer_with,
            vocab_size=self.model.vocab_size,
            max_model_len=longest_of(config, self.model),
            tokenizer=self.tokenizer,
            seed=config.bench.seed + replica,
        )

    def _replica(self, settings: Settings, device: Device, load: Workload, replica: int) -> Ran:
        jobs = [] if settings.sharing == "inference-only" else self.jobs()
        return simulated("", Simulator(settings, device, jobs, replica=replica), load, self.config.sweep.seconds)


def simulated(name: str, simulator: Simulator, load: Workload, seconds: float) -> Ran:
    """One simulator's run: for so long, and then until the requests are over."""
    coming, cpu = sorted(load.requests, key=lambda request: request.arrival_s), time.process_time()
    end = seconds + drain_seconds(simulator.settings.objectives[0], coming)
    run = simulator(coming, seconds)
    while len(run.requests) < len(coming) or simulator.scheduler.has_requests:
        if simulator.now >= end:
            break
        run = simulator(coming[len(run.requests) :], max(simulator.now, seconds) + 1.0)
    asked = [
        Asked(
            replica=simulator.replica,
            tenant=request.tenant,
            output_tokens=request.output_tokens,
            prompt_tokens=record.prompt_tokens,
            start=record.start,
            token_times=record.token_times,
            error=None if len(record.token_times) == request.output_tokens else NOT_OVER,
        )
        for request, record in zip(coming, run.requests, strict=False)
    ]
    return Ran(
        name=name,
        seconds=seconds,
        requests=asked,
        clipped=load.num_clipped,
        steps=run.steps,
        preemptions=run.preemptions,
        evictions=run.evictions,
        cpu_seconds=time.process_time() - cpu,
    )


def _each(values: Iterable[int]) -> str:
    """Different numbers in words."""
    return ", ".join(dict.fromkeys(map(str, values)))


def _joined(name: str, seconds: float, replicas: Sequence[Ran]) -> Ran:
    steps: list[StepRow] = [step for ran in replicas for step in ran.steps]
    return Ran(
        name=name,
        seconds=seconds,
        replicas=len(replicas),
        requests=[request for ran in replicas for request in ran.requests],
        clipped=sum(ran.clipped for ran in replicas),
        steps=steps,
        preemptions=sum(ran.preemptions for ran in replicas),
        evictions=sum(ran.evictions for ran in replicas),
        cpu_seconds=sum(ran.cpu_seconds for ran in replicas),
    )
