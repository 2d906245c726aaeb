"""Runs of simulated replicas in several processes at once: each is the same as alone, and they come in order."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache

from jaxserve.bench.policies import Backend, Runs
from jaxserve.bench.processes import spawned
from jaxserve.bench.ran import Ran
from jaxserve.bench.virtual import Virtual
from jaxserve.config import Config


class Pool:
    """Processes that simulate replicas; a context manager.

    Args:
      processes: None: one for each processor. With one, all is simulated here.
    """

    def __init__(self, processes: int | None = None):
        self.processes = processes or os.cpu_count() or 1
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """Ends the processes, whatever they simulate."""
        if self._executor is not None:
            for process in multiprocessing.active_children():
                process.terminate()

    def submit(self, function: Callable[..., tuple[Ran, ...]], *args: object) -> "Future[tuple[Ran, ...]]":
        if self._executor is None:  # as late as this: what needs no runs starts no processes
            self._executor = spawned(self.processes)
        return self._executor.submit(function, *args)

    def backend(self, virtual: Virtual, cells: Sequence[tuple[str, float]]) -> Backend:
        """``virtual``, with the runs of these cells (policy, rate) begun."""
        return Ahead(virtual, self, cells) if self.processes > 1 else virtual


class Ahead:
    """A Backend whose runs other processes make ahead, replica by replica."""

    def __init__(self, virtual: Virtual, pool: Pool, cells: Iterable[tuple[str, float]]):
        self._virtual, text = virtual, virtual.config.model_dump_json()
        replicas = range(virtual.config.sweep.replicas)
        self._coming = {
            call: [pool.submit(_simulate, text, *call, replica) for replica in replicas] for call in calls_of(cells)
        }

    def run(self, sharing: str, rate: float) -> Ran:
        return self._joined(sharing, rate)[0]

    def spatial(self, rate: float) -> tuple[Ran, Ran]:
        serving, training = self._joined("spatial", rate)
        return serving, training

    def _joined(self, kind: str, rate: float) -> tuple[Ran, ...]:
        return self._virtual.joined(kind, rate, [future.result() for future in self._coming[kind, rate]])


def calls_of(cells: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """(kind, rate) of every run that cells (policy, rate) are made of, each once, in the order of their need."""
    recorder = _Recorder()
    runs = Runs(recorder)
    for policy, rate in cells:
        runs.cell(policy, rate)
    return recorder.calls


class _Recorder:
    """A Backend that notes what it is asked for."""

    def __init__(self):
        self.calls: list[tuple[str, float]] = []

    def run(self, sharing: str, rate: float) -> Ran:
        self.calls.append((sharing, rate))
        return Ran(name=sharing, seconds=1.0)

    def spatial(self, rate: float) -> tuple[Ran, Ran]:
        nothing = self.run("spatial", rate)
        return nothing, nothing


def _simulate(config: str, kind: str, rate: float, replica: int) -> tuple[Ran, ...]:
    return _virtual(config).replica(kind, rate, replica)


@lru_cache
def _virtual(config: str) -> Virtual:
    return Virtual.of(Config.model_validate_json(config))


def work_of(runs: Iterable[Ran], processes: int, seconds: float) -> str:
    """What was simulated and how fast, in words.

    Args:
      seconds: of wall clock.
    """
    runs = list(runs)
    steps, used = sum(len(ran.steps) for ran in runs), sum(ran.cpu_seconds for ran in runs)
    pace = steps / used if used else 0.0
    return (
        f"simulated: {len(runs)} runs, {steps} steps, {used:.1f} s of processor time in {processes} process(es), "
        f"{pace:.0f} steps per second of it; {seconds:.1f} s in all, {steps / seconds:.0f} steps/s"
    )
