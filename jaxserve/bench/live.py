"""The engine here, under each way to share: the same requests at the same times, the same examples, the same programs.

``spatial`` is two engines in two processes on the same device. What the engine measured also gives a model of its own
device, on which the simulator runs the same load: how far the two are apart is a part of the result.
"""

import copy
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from jaxserve.assets import locate
from jaxserve.bench.arrivals import rows_at
from jaxserve.bench.engine import load_engine, room_for, stage
from jaxserve.bench.finetune import make_examples
from jaxserve.bench.load import make_load
from jaxserve.bench.ran import NOT_OVER, Asked, Ran, Watch, drain_seconds, run_name
from jaxserve.bench.replay import STOPPED, Replay, ServedRequest
from jaxserve.bench.report import share_met
from jaxserve.bench.serving import rows_of, run_load, sampling, warm_up_load
from jaxserve.bench.simulator import TRAINED, FittedDevice, Settings, Simulator, endless_jobs
from jaxserve.bench.virtual import simulated
from jaxserve.bench.workload import BenchRequest, Row, Workload
from jaxserve.config import Config
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.planner import Planned
from jaxserve.engine.sharing import CoServing, sharing
from jaxserve.engine.times import StepLoad, StepTimes
from jaxserve.errors import EngineError
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Dataset
from jaxserve.finetune.job import Job

if TYPE_CHECKING:
    from jaxserve import FinetuneJob

READY_SECONDS = 600.0  # that a second process may take to load and compile


class MeasuredDevice(FittedDevice):
    """An engine's model of its steps, set right for each bucket by what the steps of a run took.

    Args:
      loads, seconds: of each step.
    """

    def __init__(self, times: StepTimes, loads: Sequence[StepLoad], seconds: Sequence[float]):
        super().__init__(times)
        sums: dict[Bucket, tuple[float, float]] = {}
        for load, measured in zip(loads, seconds, strict=True):
            done, told = sums.get(load.bucket, (0.0, 0.0))
            sums[load.bucket] = done + measured, told + times.predict(load)
        self.ratios = {bucket: done / told for bucket, (done, told) in sums.items()}

    def seconds(self, planned: Planned) -> float:
        return super().seconds(planned) * self.ratios.get(planned.load.bucket, 1.0)


class Live:
    """An engine, and the runs it made; a Backend."""

    def __init__(self, config: Config):
        self.config = config
        self.jobs = endless_jobs(config)
        settings = list(self.jobs.values())
        with stage("compiling the step's shapes"):
            self.engine = load_engine(config, room_for(config, settings), settings)
        self.datasets: dict[str, tuple[FinetuneConfig, Dataset]] = {}  # of the jobs, by adapter
        self.steps: dict[str, tuple[StepTimes, list[StepLoad], list[float]]] = {}  # by run: its device
        load = self._load(*rows_of(config))
        run_load(config, self.engine, warm_up_load(load, self.engine.config.max_num_seqs))

    def workload(self, name: str, rate: float, seconds: float) -> Workload:
        """The requests; ``name`` is in their tenant's, so that no run finds another one's prompts in the cache."""
        load = self._load(*(rows_at(self.config, rate, seconds) if rate else ([], "no requests")))
        return replace(load, requests=tuple(replace(r, tenant=f"{name}\0{r.tenant}") for r in load.requests))

    def _load(self, rows: Sequence[Row], source: str) -> Workload:
        engine, config = self.engine, self.config
        return make_load(
            config,
            rows,
            source,
            config.coserve.answer_with,
            vocab_size=engine.model.vocab_size,
            max_model_len=engine.core.config.max_model_len,
            tokenizer=engine.tokenizer,
        )

    # a Backend

    def run(self, sharing: str, rate: float) -> Ran:
        return self.watched(run_name(sharing, rate), sharing, rate)

    def spatial(self, rate: float) -> tuple[Ran, Ran]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        other = context.Process(target=_finetune_alone, args=(self.config, f"spatial finetuning at {rate:g}", theirs))
        other.start()
        theirs.close()  # or its end would not be seen here
        try:
            if not ours.poll(READY_SECONDS):
                raise EngineError(f"the second process was not ready after {READY_SECONDS:g} s")
            ours.recv()
            ours.send("go")
            serving = self.watched(f"spatial requests at {rate:g}", "inference-only", rate)
            ours.send("stop")
            training = ours.recv()
            other.join()
        except (EOFError, ConnectionError):
            raise EngineError("the second process has ended; it said why above") from None
        finally:
            other.kill()  # nothing, where it is over
        return serving, training

    def watched(self, name: str, how: str, rate: float, may_end: Callable[[], bool] = lambda: True) -> Ran:
        """One run.

        Args:
          how: a name of ``engine.sharing``.
          may_end: asked once the run's seconds and its requests are over.
        """
        engine, seconds = self.engine, self.config.sweep.seconds
        core, load = engine.core, self.workload(name, rate, seconds)
        end = seconds + drain_seconds(core.config.objectives[""], load.requests)
        jobs = {} if how == "inference-only" else self._start()
        core.planner.sharing = sharing(how)

        def over() -> bool:
            served = not (replay.waiting or replay.alive)
            return replay.now >= seconds and (served or replay.now >= end) and may_end()

        params = sampling(self.config)
        replay = Replay(engine, load, jobs, params, stopped=over, clock=core.clock)
        before = core.scheduler.counts().preemptions
        try:
            with Watch(core)() as watch:
                run = replay()
        finally:
            core.planner.sharing = CoServing()
        try:
            check_trained(name, jobs)
        finally:
            self._end(jobs.values())
        self.steps[name] = copy.deepcopy(core.planner.times), watch.loads, [step.seconds for step in watch.steps]
        return Ran(
            name=name,
            seconds=seconds,
            requests=asked(load.requests, run.served),
            clipped=load.num_clipped,
            steps=[step._replace(at=step.at - replay.began) for step in watch.steps],
            preemptions=core.scheduler.counts().preemptions - before,
            evictions=watch.evictions,
            duration=run.duration,
            cpu_seconds=run.cpu_seconds,
            losses={adapter: [each.loss for each in steps] for adapter, steps in run.learnt.items()},
        )

    def _start(self) -> "dict[str, FinetuneJob]":
        """Jobs that go on for ever."""
        config, engine = self.config, self.engine
        sources: dict[str, Any] = {job.adapter: locate(job.data) for job in config.coserve.jobs}
        sources = sources or {TRAINED: [(ids, None) for ids in self.examples()]}
        jobs = {}
        for adapter, settings in self.jobs.items():
            jobs[adapter] = engine.finetune(sources[adapter], adapter, settings)
            self.datasets[adapter] = (settings, jobs[adapter]._job.dataset)
        return jobs

    def examples(self) -> list[list[int]]:
        """Token ids of what is trained on where the configuration names no jobs."""
        bench = self.config.bench
        longest = min(bench.finetune_longest, self.engine.core.config.max_example_len)
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
        """What the simulator says about a run, on a device whose steps take as long as those of the run did."""
        core = self.engine.core
        trainer = core.trainer
        assert trainer is not None, "no job has run"
        settings = Settings(
            limits=core.scheduler.config,
            num_pages=core.config.num_pages,
            page_size=core.config.page_size,
            enable_prefix_caching=core.config.enable_prefix_caching,
            max_grad_rows=core.config.max_grad_rows,
            train_slots=trainer.shape.num_slots,
            acc_pages=trainer.shape.acc_pages,
            stash_blocks=trainer.shape.stash_blocks,
            objectives=tuple(core.config.objectives.values()),
            finetune_floor=core.config.finetune_floor,
            sharing=how,
        )
        jobs = [Job(name, own, data, start=None) for name, (own, data) in self.datasets.items()]  # pyright: ignore[reportArgumentType]
        times, loads, seconds = self.steps[run_name(how, rate)]
        device = MeasuredDevice(copy.deepcopy(times), loads, seconds)
        alone = how == "inference-only"  # on the programs of an engine that finetunes, as it was measured
        simulator = Simulator(settings, device, [] if alone else jobs, buckets=core.planner.buckets)
        name = f"{how} at {rate:g}, simulated"
        seconds = self.config.sweep.seconds
        return simulated(name, simulator, self.workload(name, rate, seconds), seconds)


def check_trained(run: str, jobs: "Mapping[str, FinetuneJob]") -> None:
    """Raises EngineError for a job that failed on the way: what was finetuned is no measure of anything."""
    for adapter, job in jobs.items():
        if job.status == "failed":
            raise EngineError(f"{run}: the job of adapter {adapter!r} failed: {job.error}")


def asked(requests: Sequence[BenchRequest], served: Sequence[ServedRequest]) -> list[Asked]:
    """What came of each; where the queue had no room until the run ended, the last ones were never sent."""
    found = []
    for request, record in zip_longest(requests, served):
        one = Asked.of(replace(request, tenant=request.tenant.partition("\0")[2]))
        if record is not None:
            one.start, one.token_times, one.token_ids = record.start, record.token_times, record.token_ids
            one.error = NOT_OVER if record.error == STOPPED else record.error
        found.append(one)
    return found


def _finetune_alone(config: Config, name: str, parent: Connection) -> None:
    """The second process: loads, says so, and finetunes from one word of its parent to the next."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    live = Live(config)
    live._end(live._start().values())  # compiles what jobs need
    parent.send("ready")
    parent.recv()
    parent.send(live.watched(name, "finetune-only", 0.0, may_end=parent.poll))


def agreement(measured: Ran, simulated: Ran, goals: Mapping[str, float]) -> dict[str, Any]:
    """How far the simulator is from the engine."""
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
