"""The programs of an engine: a step for each bucket, another one where rows may have scales or dropout, and what comes
after a step, draws of tokens and scores of given ones.

They are declared, compiled side by side, and run on the arrays that the engine has at the time.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.adapters.bank import BankShape
from jaxserve.adapters.scales import Scales, is_scaled
from jaxserve.engine.batch import BatchLayout
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.compiles import tell
from jaxserve.engine.draw import Asks, Drawn, DrawSpec, HeadSpec, Scored, asks_of, draw, head_of, score, slots_of
from jaxserve.engine.gradient import TrainShape, TrainState, stash_alone
from jaxserve.engine.specs import CoreConfig, step_spec
from jaxserve.engine.state import EngineState
from jaxserve.engine.step import StepOutput, StepSpec, step
from jaxserve.models.config import ModelConfig
from jaxserve.scheduler.plan import StepPlan
from sharding import named_sharding

MAX_COMPILERS = 8  # each takes up to two gigabytes for a large model

ProgramKey = tuple[Bucket, bool]  # and whether the program knows the extras
DrawKey = tuple[int, Asks]  # rows, and what they ask for


class Needs(NamedTuple):
    """What adapters and jobs ask of the programs. The extended ones know scales and dropout, which the plain ones cost
    nothing for."""

    scales: bool = False
    dropout: bool = False
    plain: bool = False  # gradient rows with neither

    @property
    def extras(self) -> bool:
        return self.scales or self.dropout


class Arrays(NamedTuple):
    """What an engine has on its devices."""

    params: Any
    state: EngineState  # without the finetuning state
    train: TrainState | None
    scales: Scales | None


class Programs:
    """Specifications by bucket, and what is done with them.

    Args:
      expected: a context in which a thread's compilations are no surprise.
    """

    def __init__(
        self,
        config: CoreConfig,
        model: ModelConfig,
        mesh: Mesh,
        bank: BankShape | None,
        clock: Callable[[], float],
        expected: Callable[[], AbstractContextManager[None]],
    ):
        self._config, self._model, self._mesh, self._bank = config, model, mesh, bank
        self._clock, self._expected = clock, expected
        self.needs = Needs()
        self.train: TrainShape | None = None  # of an engine that finetunes
        self.specs: dict[ProgramKey, StepSpec] = {}
        self.layouts: dict[ProgramKey, BatchLayout] = {}
        self.draws: dict[DrawKey, DrawSpec] = {}
        self._score_spec = HeadSpec(model, mesh, config.max_logprobs)
        self._lowered: set[DrawKey | int] = set()  # draws, and rows of scores, that have been compiled

    def meeting(self, needs: Needs) -> "Programs":
        """Another set of the same programs, for these needs; this one stays as it is."""
        other = copy(self)
        other.needs, other._lowered = needs, set(self._lowered)
        other.specs, other.layouts, other.draws = dict(self.specs), dict(self.layouts), dict(self.draws)
        return other

    def add(self, buckets: Iterable[Bucket]) -> list[ProgramKey]:
        """Declares what the needs ask for; returns the programs that are new. Steps of nothing but requests are always
        there without extras; where nothing is finetuned there is no dropout to know."""
        needs, plain, extended = self.needs, [], []
        for bucket in buckets:
            if needs.plain or not bucket.grad_rows:
                plain.append((bucket, False))
            if needs.scales or (needs.dropout and bucket.finetunes):
                extended.append((bucket, True))
        specs = {key: self._spec(*key) for key in (*plain, *extended)}
        new = [key for key, spec in specs.items() if self.specs.get(key) != spec]
        self.specs |= specs
        self.layouts |= {key: spec.layout for key, spec in specs.items()}
        most = self._config.max_logprobs
        self.draws |= {
            (spec.layout.num_samples, asks): DrawSpec(self._model, self._mesh, most, spec.layout.draw, asks)
            for spec in specs.values()
            for asks in Asks
        }
        return new

    def forget(self) -> None:
        """Takes back what has been declared; before anything is compiled."""
        for declared in (self.specs, self.layouts, self.draws):
            declared.clear()

    def _spec(self, bucket: Bucket, extended: bool) -> StepSpec:
        return step_spec(
            bucket,
            self._config,
            self._model,
            self._mesh,
            self._bank,
            self.train,
            scaled=extended and self.needs.scales,
            dropout=extended and self.needs.dropout,
        )

    def need_extras(self, plan: StepPlan) -> bool:
        """Some row's adapter has scales, or is trained with dropout."""
        if not self.needs.extras:
            return False
        grads, forwards = plan.finetune or ((), ())
        if any(window.seq.lane.scaled or window.seq.dropout for window in (*grads, *forwards)):
            return True
        adapters = {seq.request.adapter for seq in (*(segment.seq for segment in plan.chunks), *plan.decoding)}
        return any(version is not None and is_scaled(version.weights) for version in adapters)

    def compile(self, keys: Iterable[ProgramKey], arrays: Arrays) -> dict[ProgramKey, float]:
        """Compiles programs side by side, each on a thread: the compiler keeps but one core busy. A call finds the
        program that was compiled for its arguments, of which ``arrays`` may be the shapes alone. Returns seconds by
        program."""
        keys, draws = list(keys), [key for key in self.draws if key not in self._lowered]
        scores = {bucket.chunk_rows for bucket, _ in self.layouts if bucket.chunk_rows} - self._lowered
        total, count = len(keys) + len(draws) + len(scores), itertools.count(1)

        def compile_one(lowered: Any) -> float:
            start = self._clock()
            with self._expected():
                lowered.compile()
            tell(next(count), total)
            return self._clock() - start

        with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_COMPILERS)) as pool:
            futures = {key: pool.submit(compile_one, self._lower(key, arrays)) for key in keys}
            after = [pool.submit(compile_one, lowered) for lowered in self._lower_after(draws, scores, arrays)]
            for future in after:
                future.result()
            return {key: future.result() for key, future in futures.items()}

    def _lower(self, key: ProgramKey, arrays: Arrays) -> Any:
        spec = self.specs[key]
        ints, _, floats, _ = spec.layout.empty()
        state, scales = _arguments(spec, arrays)
        return step.lower(arrays.params, state, ints, floats, scales, spec=spec)

    def _lower_after(self, draws: Iterable[DrawKey], scores: Iterable[int], arrays: Arrays) -> Iterator[Any]:
        """What comes after a step: draws, and scores of so many rows."""
        width, dtype = self._model.hidden_size, self._config.dtype
        head = head_of(arrays.params, self._model)

        def hidden(rows: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, width), np.dtype(dtype), sharding=named_sharding(self._mesh, ()))

        for key in draws:
            spec = self.draws[key]
            buffers = np.zeros(spec.layout.num_ints, np.int32), np.zeros(spec.layout.num_floats, np.float32)
            yield draw.lower(head, *slots_of(arrays.state), hidden(key[0]), *buffers, spec=spec)
        for rows in scores:
            yield score.lower(head, hidden(rows), np.zeros(rows, np.int32), spec=self._score_spec)
        self._lowered |= {*draws, *scores}

    def run(
        self, key: ProgramKey, arrays: Arrays, ints: np.ndarray, floats: np.ndarray
    ) -> tuple[EngineState, TrainState | None, StepOutput]:
        """One step on the device; takes the state, and the finetuning state of a step with gradient rows. Returns the
        state, the finetuning state where it was taken, and the output, from which nothing is drawn yet."""
        spec = self.specs[key]
        state, scales = _arguments(spec, arrays)
        state, output = step(arrays.params, state, ints, floats, scales, spec=spec)
        train = state.train
        if train is not None and arrays.train is not None:
            if not spec.layout.bucket.grad_rows:
                train = replace(arrays.train, stash=train.stash)
            elif not spec.scaled:
                train = replace(train, scale_lanes=arrays.train.scale_lanes)
        return replace(state, train=None), train, output

    def draw(
        self, key: ProgramKey, arrays: Arrays, hidden_RD: jax.Array, ints: np.ndarray, floats: np.ndarray
    ) -> tuple[EngineState, Drawn]:
        """Draws a token for each of a step's rows that draw; takes the state."""
        layout, state = self.layouts[key].draw, arrays.state
        ints, floats = ints[: layout.num_ints], floats[: layout.num_floats]
        spec = self.draws[layout.num_samples, asks_of(layout.flags(ints))]
        head = head_of(arrays.params, self._model)
        last_token_B, count_BV, drawn = draw(head, *slots_of(state), hidden_RD, ints, floats, spec=spec)
        return replace(state, last_token_B=last_token_B, count_BV=count_BV), drawn

    def score(self, arrays: Arrays, hidden_TD: jax.Array, target_T: np.ndarray) -> Scored:
        """Log-probabilities of tokens that are given, one after each chunk row of a step."""
        return score(head_of(arrays.params, self._model), hidden_TD, target_T, spec=self._score_spec)


def _arguments(spec: StepSpec, arrays: Arrays) -> tuple[EngineState, Scales | None]:
    """The state that a program takes, and scales. Sums stay out of programs that add nothing to them, as those of
    scales do out of programs that know none."""
    bucket, state = spec.layout.bucket, arrays.state
    train = arrays.train if bucket.finetunes else None
    if train is not None:
        if not bucket.grad_rows:
            train = stash_alone(train)
        state = replace(state, train=train if spec.scaled else replace(train, scale_lanes=None))
    return state, arrays.scales if spec.scaled else None
