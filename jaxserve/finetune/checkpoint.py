"""Checkpoints of a job: its arrays through orbax, everything else as JSON, in a directory that is whole or absent.

State is a pytree of arrays (masters, moments, gradient accumulators, counters), the rest is JSON (data cursor, seeds,
losses). Arrays come back bit for bit, floats of the JSON too.
"""

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxserve import faults
from jaxserve.finetune.durable import OnEvent, StepStore, ignore_event, newest, write_file
from jaxserve.finetune.errors import CheckpointMismatch

STATE, JOB = "state", "job.json"


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax's threads log what goes wrong with their whole stacks, one after another; it is raised here as well."""
    return "_SignalingThread" not in record.getMessage()


logging.getLogger("absl").addFilter(_is_news)


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after ``step`` optimizer steps."""

    step: int
    state: Any  # as ``like``, of numpy arrays; a dict by leaf name where ``like`` was None
    meta: dict[str, Any]
    identity: dict[str, Any]
    path: Path


class CheckpointWriter:
    """Saves the checkpoints of one job; one writer per directory.

    Args:
      identity: JSON values that a job must share with a checkpoint to go on from it: job, base model, data set,
        configuration digests.
      keep: newest checkpoints that stay.
      on_event: called with (kind, message), from the thread that saves.

    Raises:
      CheckpointMismatch: there are checkpoints of something else.
      CheckpointError: ``busy``, ``newer_format``, or ``storage``: the directory cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: Mapping[str, Any],
        keep: int = 2,
        on_event: OnEvent = ignore_event,
    ):
        self._identity = dict(identity)
        self._store = StepStore(directory, keep, on_event)
        self._saver = ThreadPoolExecutor(1, "checkpoint")
        try:
            last = newest(self._store.root)
            if last is not None:
                _check_identity(_read_job(last.path)["identity"], self._identity, last.step)
        except BaseException:
            self.close()
            raise

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> Path:
        """Saves and returns when it is on the disk.

        Raises:
          CheckpointError: ``storage``: it is not, and older ones are still there.
        """
        return self.start_save(step, state, meta).result()

    def start_save(self, step: int, state: Any, meta: Mapping[str, Any]) -> Future[Path]:
        """Saves in the background, in turn. Arrays on a device come to the host there: they must not be donated."""
        named = {n: x if isinstance(x, jax.Array) else np.array(x) for n, x in _named_leaves(state).items()}
        leaves = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named.items()}
        job = {"identity": self._identity, "meta": dict(meta), "leaves": leaves}
        content = json.dumps(job, allow_nan=False).encode()

        def fill(path: Path) -> None:
            _fill(path, content, {name: np.asarray(leaf) for name, leaf in named.items()})

        return self._saver.submit(self._store.save, step, fill)

    def finish(self) -> None:
        """Waits for saves in the background; there are no more."""
        self._saver.shutdown()

    def close(self) -> None:
        """Waits for saves in the background and lets others write."""
        self.finish()
        self._store.close()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def load_latest(
    directory: str | os.PathLike[str],
    *,
    like: Any = None,
    expect: Mapping[str, Any] | None = None,
    on_event: OnEvent = ignore_event,
) -> Checkpoint | None:
    """The newest whole checkpoint below ``directory``; None where there is none. Nothing is written or removed.

    Args:
      like: a pytree of arrays or jax.ShapeDtypeStruct that the state must match leaf by leaf.
      expect: entries of the identity that the checkpoint must have.
      on_event: called with (kind, message) for every damaged one that is passed over and every unknown name.

    Raises:
      CheckpointMismatch: of another job, model, data set or configuration, or with other leaves.
      CheckpointError: ``newer_format``, or ``storage``: not readable.
    """
    found = newest(directory, on_event)
    if found is None:
        return None
    job = _read_job(found.path)
    _check_identity(job["identity"], expect or {}, found.step)
    state = _read_state(found.path, job["leaves"])
    if like is not None:
        state = _arranged(state, like, found.step)
    return Checkpoint(found.step, state, job["meta"], job["identity"], found.path)


def _fill(path: Path, job: bytes, arrays: Mapping[str, np.ndarray]) -> None:
    write_file(path / JOB, job)
    faults.hit("ckpt.mid_files")
    # orbax refuses arrays that hold nothing; their shape is all there is to know
    ocp.save(str(path / STATE), {name: array for name, array in arrays.items() if array.size})


def _read_job(path: Path) -> dict[str, Any]:
    return json.loads((path / JOB).read_bytes())


def _read_state(path: Path, leaves: Mapping[str, tuple[str, list[int]]]) -> dict[str, np.ndarray]:
    stored = ocp.load(str(path.absolute() / STATE))  # orbax takes no other
    state = {}
    for name, (dtype, shape) in leaves.items():
        array = stored[name] if 0 not in shape else np.empty(shape, dtype)
        assert (str(array.dtype), list(array.shape)) == (dtype, shape), name
        state[name] = array
    return state


def _named_leaves(tree: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    assert len(named) == len(paths), "two leaves of the state have one name"
    return named


def _arranged(state: Mapping[str, np.ndarray], like: Any, step: int) -> Any:
    wanted = {name: (str(leaf.dtype), tuple(leaf.shape)) for name, leaf in _named_leaves(like).items()}
    found = {name: (str(array.dtype), array.shape) for name, array in state.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        there, here = _leaf(found.get(name)), _leaf(wanted.get(name))
        raise CheckpointMismatch(f"checkpoint {step}: {name} is {there}, this job has {here}{more}", wrong)
    return jax.tree.unflatten(jax.tree.structure(like), [state[name] for name in wanted])


def _leaf(leaf: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if leaf is None else f"{leaf[0]} {list(leaf[1])}"


def _check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], step: int) -> None:
    wrong = [name for name, value in wanted.items() if found.get(name) != value]
    if wrong:
        shown = ", ".join(f"{name} is {_short(found.get(name))}, not {_short(wanted[name])}" for name in wrong)
        raise CheckpointMismatch(f"checkpoint {step} belongs to something else: {shown}", wrong)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else text[:17] + "..."
