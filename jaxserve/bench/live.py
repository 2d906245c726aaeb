"""The engine here, under each way to share: the same requests at the same times, the same examples, the same programs.

``spatial`` is two engines in two processes on the same device. What the engine measured also gives a model of its own
device, on which the simulator runs the same load: how far the two are apart is a part of the result.
"""

import copy
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from jaxserve.assets import locate
from jaxserve.bench.arrivals import rows_at
from jaxserve.bench.coserve_numbers import BASE
from jaxserve.bench.finetune import make_examples
from jaxserve.bench.load import read_prompts, with_prompts
from jaxserve.bench.ran import NOT_OVER, Asked, Ran, Watch
from jaxserve.bench.replay import Replay
from jaxserve.bench.serving import run_load, sampling, warm_up_load
from jaxserve.bench.simulator import FittedDevice, Settings, Simulator
from jaxserve.bench.virtual import simulated
from jaxserve.bench.workload import Workload, make_workload
from jaxserve.config import Config
from jaxserve.engine.sharing import CoServing, sharing
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Dataset
from jaxserve.finetune.job import Job

if TYPE_CHECKING:
    from jaxserve import Engine, FinetuneJob

DRAIN_SECONDS = 30.0  # after the last arrival; a request that is not over by then counts as missed
READY_SECONDS = 600.0  # that a second process may take to load and compile
TRAINED = "trained"  # the adapter of made-up examples
ENDLESS = {
    "max_steps": 10**9, "epochs": None, "schedule": "constant", "warmup_steps": None, "warmup_ratio": None,
    "output_dir": None, "validation_fraction": 0.0, "validation_data": None, "eval_steps": None,
}  # fmt: skip


class Live:
    """An engine, and the runs it made; a Backend."""

    def __init__(self, config: Config):
        self.config = config
        self.engine = make_engine(config)
        self.datasets: dict[str, tuple[FinetuneConfig, Dataset]] = {}  # of the jobs, by adapter
        load = self.workload("warm-up", 1.0, 8.0)
        run_load(config, self.engine, warm_up_load(load, self.engine.config.max_num_seqs))

    def workload(self, name: str, rate: float, seconds: float) -> Workload:
        """The requests; ``name`` is in their tenant's, so that no run finds another one's prompts in the cache."""
        config, engine, bench = self.config, self.engine, self.config.bench
        rows, source = rows_at(config, rate, seconds) if rate else ([], "no requests")
        longest = engine.core.config.max_model_len
        if config.coserve.prompts is not None and rows:
            prompts = read_prompts(locate(config.coserve.prompts), engine.tokenizer)
            load = with_prompts(rows, prompts, source=source, max_model_len=longest, seed=bench.seed)
        else:
            load = make_workload(
                rows,
                source=source,
                vocab_size=engine.model.vocab_size,
                max_model_len=longest,
                shared_prefix_len=bench.shared_prefix_len,
                seed=bench.seed,
            )
        assigned = load.on_adapters(config.coserve.answer_with, bench.lora_assignment, bench.seed)
        requests = (
            replace(r, tenant=f"{name}\0{r.tenant}", adapter=None if r.adapter == BASE else r.adapter)
            for r in assigned.requests
        )
        return replace(assigned, requests=tuple(requests))

    # a Backend

    def run(self, sharing: str, rate: float) -> Ran:
        return self.watched(f"{sharing} at {rate:g}" if rate else sharing, sharing, rate)

    def spatial(self, rate: float) -> tuple[Ran, Ran]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        other = context.Process(target=_finetune_alone, args=(self.config, f"spatial finetuning at {rate:g}", theirs))
        other.start()
        try:
            if not ours.poll(READY_SECONDS):
                raise TimeoutError(f"the second process was not ready after {READY_SECONDS:g} s")
            ours.recv()
            ours.send("go")
            serving = self.watched(f"spatial requests at {rate:g}", "inference-only", rate)
            ours.send("stop")
            training = ours.recv()
            other.join()
        finally:
            other.kill()  # nothing, where it is over
        return serving, training

    def watched(self, name: str, how: str, rate: float, stopped: Callable[[], bool] | None = None) -> Ran:
        """One run.

        Args:
          how: a name of ``engine.sharing``.
          stopped: ends it; by default it ends after the run's seconds, when the requests are over.
        """
        engine, seconds = self.engine, self.config.sweep.seconds
        core, load = engine.core, self.workload(name, rate, seconds)
        jobs = {} if how == "inference-only" else self._start()
        core.planner.sharing = sharing(how)

        def over() -> bool:
            served = not (replay.waiting or replay.alive)
            return replay.now >= seconds and (served or replay.now >= seconds + DRAIN_SECONDS)

        params = sampling(self.config, fixed=frozenset({"max_tokens"}))
        replay = Replay(engine, load, jobs, params, stopped=stopped or over, clock=core.clock)
        before = core.scheduler.counts().preemptions
        try:
            with Watch(core)() as watch:
                run = replay()
        finally:
            core.planner.sharing = CoServing()
            self._end(jobs.values())
        return Ran(
            name=name,
            seconds=seconds,
            requests=[
                _asked(request.tenant, record) for request, record in zip(load.requests, run.served, strict=False)
            ],
            steps=[step._replace(at=step.at - replay.began) for step in watch.steps],
            preemptions=core.scheduler.counts().preemptions - before,
            evictions=watch.evictions,
            duration=run.duration,
            cpu_seconds=run.cpu_seconds,
            losses={adapter: [each.loss for each in steps] for adapter, steps in run.learnt.items()},
        )

    def _start(self) -> "dict[str, FinetuneJob]":
        """Jobs that go on for ever."""
        config, engine, bench = self.config, self.engine, self.config.bench
        shared = {name: getattr(config.job, name) for name in FinetuneConfig.model_fields}
        shared |= {"batch_size": bench.finetune_batch} if not config.coserve.jobs else {}
        if config.coserve.jobs:
            sources = [(job.adapter, locate(job.data), job.settings) for job in config.coserve.jobs]
        else:
            sources = [(TRAINED, [(ids, None) for ids in self.examples()], {})]
        jobs = {}
        for adapter, data, own in sources:
            settings = FinetuneConfig(**shared | own | ENDLESS)
            jobs[adapter] = engine.finetune(data, adapter, settings)
            self.datasets[adapter] = (settings, jobs[adapter]._job.dataset)
        return jobs

    def examples(self) -> list[list[int]]:
        """Token ids of what is trained on where the configuration names no jobs."""
        bench = self.config.bench
        longest = min(bench.finetune_longest, self.engine.core.config.max_model_len)
        shortest = min(bench.finetune_shortest, longest)
        return make_examples(bench.finetune_examples, shortest, longest, self.engine.model.vocab_size, bench.seed)

    def _end(self, jobs: "Iterable[FinetuneJob]") -> None:
        for job in jobs:
            job.cancel()
        while self.engine.has_work():
            self.engine.step()
        known = {info.name for info in self.engine.list_adapters()}
        for job in jobs:
            if job.adapter in known:
                self.engine.unload_adapter(job.adapter)

    # the same on the virtual clock

    def predict(self, how: str, rate: float) -> Ran:
        """What the simulator says about a run, on a device that takes as long as the engine's steps took."""
        core = self.engine.core
        trainer = core.trainer
        assert trainer is not None, "no job has run"
        settings = Settings(
            limits=core.scheduler.config,
            num_pages=core.config.num_pages,
            page_size=core.config.page_size,
            max_grad_rows=core.config.max_grad_rows,
            train_slots=trainer.shape.num_slots,
            acc_pages=trainer.shape.acc_pages,
            objectives=tuple(core.config.objectives.values()),
            finetune_floor=core.config.finetune_floor,
            sharing=how,
        )
        jobs = [Job(name, own, data, start=None) for name, (own, data) in self.datasets.items()]  # pyright: ignore[reportArgumentType]
        device = FittedDevice(copy.deepcopy(core.planner.times))
        simulator = Simulator(settings, device, [] if how == "inference-only" else jobs)
        name = f"{how} at {rate:g}, simulated"
        return simulated(
            name, simulator, self.workload(name, rate, self.config.sweep.seconds).requests, self.config.sweep.seconds
        )


def make_engine(config: Config) -> "Engine":
    """The engine, with room for the jobs where the user left that open."""
    from jaxserve import Engine

    count, lora = max(len(config.coserve.jobs), 1), config.lora
    ranks = [int(job.settings.get("rank", config.job.rank)) for job in config.coserve.jobs] or [config.job.rank]
    room: dict[str, Any] = {
        "max_finetune_jobs": count,
        "max_lora_rank": max([lora.max_lora_rank, *ranks] if "max_lora_rank" in lora.model_fields_set else ranks),
    }
    given = {key for part in (config.engine, lora, config.finetune) for key in part.model_fields_set}
    options = dict(config.engine_config()) | {key: value for key, value in room.items() if key not in given}
    assert config.model.path is not None, "check() was not called"
    engine = Engine.from_pretrained(locate(config.model.path), **options)
    for module in lora.modules:
        engine.load_adapter(module.name, module.path)
    return engine


def _asked(tenant: str, record: Any) -> Asked:
    whole = record.num_outputs == record.output_tokens
    return Asked(
        tenant=tenant.partition("\0")[2],
        output_tokens=record.output_tokens,
        prompt_tokens=record.prompt_tokens,
        start=record.start,
        token_times=record.token_times,
        token_ids=record.token_ids,
        error=None if whole and record.error is None else (record.error or NOT_OVER).replace("stopped", NOT_OVER),
    )


def _finetune_alone(config: Config, name: str, parent: Connection) -> None:
    """The second process: loads, says so, and finetunes from one word of its parent to the next."""
    live = Live(config)
    parent.send("ready")
    parent.recv()
    parent.send(live.watched(name, "finetune-only", 0.0, stopped=parent.poll))


def agreement(measured: Ran, simulated: Ran, goals: Mapping[str, float]) -> dict[str, Any]:
    """How far the simulator is from the engine."""
    from jaxserve.bench.report import share_met

    shares = [share_met(ran.requests, goals) for ran in (measured, simulated)]
    rates = [ran.finetune_rate for ran in (measured, simulated)]
    both = [share for share in shares if share is not None]
    return {
        "run": measured.name,
        "measured_finetune_tokens_per_s": rates[0],
        "simulated_finetune_tokens_per_s": rates[1],
        "finetune_error": rates[1] / rates[0] - 1 if rates[0] else None,
        "measured_attainment": shares[0],
        "simulated_attainment": shares[1],
        "attainment_error": both[1] - both[0] if len(both) == 2 else None,
    }
