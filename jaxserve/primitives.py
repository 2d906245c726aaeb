"""Training by calls: forward_backward and optim_step on an adapter, for loops of one's own.

An adapter is opened with ``Engine.open_adapter``; then every call adds gradients, and an optimizer step takes them and
publishes the version that the next request is answered by. Requests and jobs go on beside it.

Losses, summed over the tokens of a batch (w weight, p log-probability, q that under the policy that drew the token,
A advantage):

    cross_entropy        -w p
    importance_sampling  -w exp(p - q) A
    ppo                  -w min(r A, clip(r) A), r = exp(p - q)    (Schulman et al. 2017, eq. 7)
    dpo                  -log sigmoid(beta ((p_c - p_r) - (q_c - q_r))), p and q sums over the chosen and the rejected
                         answer, q under a reference model            (Rafailov et al. 2023, eq. 7); without dropout
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.config.job import BELOW_1, LEAST, MOST
from jaxserve.engine.job_programs import Hyper, hyper_arrays
from jaxserve.engine.trainer import Trainer
from jaxserve.errors import InvalidRequest
from jaxserve.files import checked_directory
from jaxserve.finetune.checkpoint import CheckpointWriter, load_latest
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import load_dataset
from jaxserve.finetune.examples import Example
from jaxserve.finetune.job import JobStatus, Loss, Purpose
from jaxserve.finetune.session import ENDLESS, BatchResult, Session
from jaxserve.finetuning import make_start
from jaxserve.interrupts import deferred_interrupts
from jaxserve.prompts import require
from jaxserve.sampling import SamplingParams
from pallas_kernels.cross_entropy import CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO

if TYPE_CHECKING:
    from jaxserve.training import TrainingEngine

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "dpo")
PPO_CLIP, DPO_BETA = (0.8, 1.2), 0.1
_KINDS = {"cross_entropy": CROSS_ENTROPY, "importance_sampling": IMPORTANCE_SAMPLING, "ppo": PPO}
_SHARES = ("beta1", "beta2", "momentum")
_DIVISORS = ("eps", "max_grad_norm")  # where a gradient is 0
MAX_SHOWN = 3  # things in a directory that are no saved state
_OVERRIDES = ("learning_rate", "beta1", "beta2", "eps", "momentum", "weight_decay", "max_grad_norm")


class TrainingCalls:
    """The open adapters of one engine."""

    def __init__(self, engine: "TrainingEngine"):
        self.engine = engine
        self.sessions: dict[str, Session] = {}

    def open(self, name: str, config: FinetuneConfig, tenant: str) -> None:
        """Makes an adapter and gives it a lane; publishes its start."""
        engine = self.engine
        start = make_start(engine, name, config)
        trainer = engine.prepare_finetuning(scales=bool(start.vectors), dropout=config.dropout > 0)
        session = Session(name, config, start, tenant)
        with engine.core.compiles.preparing():
            training = trainer.prepare(session, None)
        with engine.core.lock:
            self.check_room()
            trainer.submit(training)
            self.sessions[name] = session
        session.announce()
        try:
            while session.status is not JobStatus.RUNNING:
                if session.done:
                    raise InvalidRequest(f"adapter {name!r} was not opened: {_end_of(session)}", "adapter")
                engine.drive()
        except BaseException:
            with engine.core.lock:
                trainer.cancel(session)
                self.sessions.pop(name, None)
            raise

    def check_room(self) -> None:
        """Raises InvalidRequest where open adapters have every lane."""
        trainer = self.engine.core.trainer
        if trainer is not None and not trainer.has_room:
            raise InvalidRequest(trainer.full, "max_finetune_jobs")

    def close(self, name: str) -> None:
        """Gives the lane back; published versions stay."""
        session = self.of(name)
        with self.engine.core.lock:
            self.trainer.cancel(session)
            del self.sessions[name]

    @property
    def trainer(self) -> Trainer:
        assert self.engine.core.trainer is not None
        return self.engine.core.trainer

    def of(self, name: str) -> Session:
        if not isinstance(name, str) or name not in self.sessions:
            raise InvalidRequest(f"adapter {name!r} is not open for training; open_adapter opens it", "adapter")
        return self.sessions[name]

    @contextmanager
    def at_rest(self, name: str) -> Iterator[Session]:
        """The session while nothing of it is under way: a failed step takes batches back that were summed already. No
        thread hands in another batch, and none steps the engine, meanwhile."""
        session = self.of(name)
        while True:
            with deferred_interrupts(), self.engine.core.lock:
                if not self.trainer.is_under_way(session):
                    if session.done:
                        raise InvalidRequest(f"training of adapter {name!r} has ended: {_end_of(session)}", "adapter")
                    yield session
                    return
            self.engine.drive()

    # batches

    def run(self, name: str, examples: Sequence[Example], purpose: Purpose, loss: Loss) -> BatchResult:
        """Hands a batch in and steps the engine until it is read; where that is interrupted, nothing of it stays."""
        session = self.of(name)
        with self.engine.core.lock:
            batch = session.hand_in(examples, purpose, loss)
        try:
            while (result := session.result(batch)) is None:
                if session.done:
                    raise InvalidRequest(f"training of adapter {name!r} has ended: {_end_of(session)}", "adapter")
                self.engine.drive()
        except BaseException:
            with self.engine.core.lock:
                self.trainer.take_back(session, batch)
            raise
        return result

    def forward_backward(self, name: str, batch: Iterable[Any], loss: str, clip: tuple[float, float]) -> BatchResult:
        kind = _KINDS[loss]
        examples = self.examples(batch, policy=kind != CROSS_ENTROPY)
        if not _is_clip(clip):
            raise InvalidRequest(f"clip is {clip!r}; it must be (low, high) with 0 < low <= 1 <= high", "clip")
        return self.run(name, examples, Purpose.ACCUMULATE, Loss(kind, (float(clip[0]), float(clip[1]))))

    def forward(self, name: str, batch: Iterable[Any]) -> BatchResult:
        return self.run(name, self.examples(batch, policy=False), Purpose.FORWARD, Loss())

    def dpo(self, name: str, batch: Iterable[Any], beta: float, reference: str | None) -> BatchResult:
        """One forward for the sums, then cross entropy whose weights are the loss's slope; both without dropout."""
        if not _is_number(beta) or not 0 < beta < np.inf:
            raise InvalidRequest(f"beta is {beta!r}; it must be a number above 0", "beta")
        if reference is not None:
            require("reference", reference, str, "the name of an adapter, or None for the base model")
        pairs = _items(batch)
        for number, pair in enumerate(pairs):
            if not isinstance(pair, Mapping) or not {"chosen", "rejected"} <= pair.keys() <= _PAIR_KEYS:
                raise InvalidRequest(
                    f"batch[{number}] must have chosen and rejected, and may have reference_logprobs, two numbers",
                    "batch",
                )
        examples = [
            self._example(pair[side], f"batch[{number}]: {side}", number, policy=False)
            for number, pair in enumerate(pairs)
            for side in ("chosen", "rejected")
        ]
        reference_P2 = self._reference(pairs, examples, reference)
        found = self.run(name, examples, Purpose.FORWARD, Loss())
        policy_P2 = _sums(examples, found.logprobs)
        margin_P = beta * ((policy_P2 - reference_P2) @ np.array([1.0, -1.0]))
        slope_P = beta * np.exp(-np.logaddexp(0, margin_P))  # -dloss / d(p_c - p_r)
        weighted = [
            Example(e.token_ids, (e.weights * s).astype(np.float32), e.index)
            for e, s in zip(examples, np.stack([slope_P, -slope_P], 1).reshape(-1), strict=True)
        ]
        logprobs = self.run(name, weighted, Purpose.ACCUMULATE, Loss(dropout=False)).logprobs
        loss_P = np.logaddexp(0, -margin_P)
        metrics = {"accuracy": float((margin_P > 0).mean()), "margin": float(margin_P.mean() / beta)}
        return BatchResult([np.array([loss], np.float32) for loss in loss_P], logprobs, metrics)

    def _reference(self, pairs: list, examples: list[Example], reference: str | None) -> np.ndarray:
        """Sums of log-probabilities under the reference, [P, 2]: given with the pair, or computed."""
        given = [_two_sums(pair.get("reference_logprobs"), number) for number, pair in enumerate(pairs)]
        missing = [at for at, value in enumerate(given) if value is None]
        wanted = [examples[2 * at + side] for at in missing for side in (0, 1)]
        most = self.engine.core.config.max_model_len - 1  # a request draws a token after its prompt
        for at, each in zip(np.repeat(missing, 2), wanted, strict=True):
            if each.num_tokens > most:
                raise InvalidRequest(
                    f"batch[{at}]: {each.num_tokens} tokens, at most {most} (max_model_len - 1) without "
                    "reference_logprobs",
                    "batch",
                )
        found = _sums(wanted, self.logprobs([e.token_ids for e in wanted], reference)) if wanted else np.zeros((0, 2))
        sums = np.zeros((len(pairs), 2))
        sums[missing] = found
        for at, value in enumerate(given):
            if value is not None:
                sums[at] = value
        return sums

    def logprobs(self, token_ids: Sequence[Any], adapter: str | None) -> list[np.ndarray]:
        """Each token's log-probability given those before it, [S] float32 with 0 first, by serving it as a prompt."""
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = self.engine.generate([list(map(int, ids)) for ids in token_ids], params, adapter=adapter)
        found = []
        for output in outputs:
            entries = zip(output.prompt_logprobs or (), output.prompt_token_ids, strict=True)
            found.append(np.array([0.0 if entry is None else entry[token] for entry, token in entries], np.float32))
        return found

    def examples(self, batch: Iterable[Any], policy: bool) -> list[Example]:
        """Checked examples: (ids, weights), {input_ids, weights[, logprobs, advantages]}, or records as in a file.

        Raises:
          InvalidRequest: which item is wrong, and how.
        """
        return [self._example(item, f"batch[{n}]", n, policy) for n, item in enumerate(_items(batch))]

    def _example(self, item: Any, place: str, number: int, policy: bool) -> Example:
        engine = self.engine
        limit, extra = engine.core.config.max_example_len, {}
        if isinstance(item, Mapping) and "input_ids" in item:
            item = dict(item)
            extra = {key: item.pop(key) for key in ("logprobs", "advantages") if key in item}
        if policy and extra.keys() != {"logprobs", "advantages"}:
            raise InvalidRequest(f"{place} must have input_ids, logprobs and advantages for this loss", "batch")
        try:
            (whole,) = load_dataset(
                [item], engine.tokenizer, max_length=limit, vocab_size=engine.model.vocab_size, weightless=True
            ).examples
            if whole.num_tokens < 2:
                raise ValueError("fewer than two tokens: nothing is predicted")
            arrays = {
                "sampled_logprobs": _floats(extra, "logprobs", whole.num_tokens),
                "advantages": _floats(extra, "advantages", whole.num_tokens),
            }
        except ValueError as error:
            message = str(error).removeprefix("example 0: ")
            raise InvalidRequest(f"{place}: {message}", "batch") from None
        return Example(whole.token_ids, whole.weights, number, **arrays)

    # optimizer steps and state

    def optim_step(self, name: str, overrides: Mapping[str, float | None]) -> dict[str, Any]:
        unknown = sorted(overrides.keys() - set(_OVERRIDES))
        if unknown:
            raise InvalidRequest(f"optim_step has no {unknown[0]!r}; there are {', '.join(_OVERRIDES)}", unknown[0])
        with self.at_rest(name) as session:
            hyper = _hyper(session.config, overrides)
            norm, applied = self.trainer.sessions.optim_step(session, hyper)
            return {
                "step": session.step,
                "applied": applied,
                "gradient_norm": norm,
                "learning_rate": float(hyper["learning_rate"]),
                "adapter_version": session.version,
            }

    def save_state(self, name: str, directory: Any) -> None:
        directory = checked_directory(directory)
        with CheckpointWriter(directory, self._identity(self.of(name)), keep=1) as writer:
            with self.at_rest(name) as session:
                state = self.trainer.sessions.state_of(session)
                meta = {"step": session.step, "calls": session.num_batches}
            found = load_latest(directory)
            writer.save(0 if found is None else found.step + 1, state, meta)

    def load_state(self, name: str, directory: Any) -> None:
        directory = checked_directory(directory)
        with self.at_rest(name) as session:
            like, passed_over = self.trainer.sessions.state_of(session), []
            found = load_latest(
                directory, like=like, expect=self._identity(session), on_event=lambda *what: passed_over.append(what)
            )
            if found is None:
                why = [f"; {each}" for _, each in sorted(passed_over)]  # damaged ones before unknown names
                why[MAX_SHOWN:] = [f"; and {len(why) - MAX_SHOWN} more"] if len(why) > MAX_SHOWN else []
                raise InvalidRequest(f"there is no saved state in {str(directory)!r}{''.join(why)}", "directory")
            self.trainer.sessions.set_state(session, found.state, **found.meta)

    def _identity(self, session: Session) -> dict[str, Any]:
        return {"base_model": self.engine.base_digest.hex(), "adapter_config": dict(session.start.config)}


_PAIR_KEYS = frozenset({"chosen", "rejected", "reference_logprobs"})


def _end_of(session: Session) -> str:
    return session.error or "it was closed"


def _sums(examples: Sequence[Example], logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """Weighted sums of log-probabilities, by pairs: [P, 2]."""
    sums = [float((e.weights.astype(np.float64) * p).sum()) for e, p in zip(examples, logprobs, strict=True)]
    return np.array(sums).reshape(-1, 2)


def _items(batch: Any) -> list[Any]:
    """The examples of a batch, which has some."""
    if not isinstance(batch, Iterable) or isinstance(batch, str | bytes | Mapping):
        raise InvalidRequest(f"batch is a {type(batch).__name__}; it must be a list of examples", "batch")
    items = list(batch)
    if not items:
        raise InvalidRequest("batch is empty; it must have at least one example", "batch")
    return items


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_clip(clip: Any) -> bool:
    if not isinstance(clip, Sequence) or len(clip) != 2 or not all(map(_is_number, clip)):
        return False
    low, high = map(float, clip)
    return 0 < low <= 1 <= high < np.inf


def _two_sums(value: Any, number: int) -> np.ndarray | None:
    """A pair's reference_logprobs, [2]; None where they are to be computed."""
    if value is None:
        return None
    try:
        sums = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        sums = np.zeros(0)
    if sums.shape != (2,) or not np.isfinite(sums).all():
        raise InvalidRequest(
            f"batch[{number}]: reference_logprobs must be two finite numbers, of chosen and of rejected", "batch"
        )
    return sums


def _floats(extra: Mapping[str, Any], name: str, length: int) -> np.ndarray | None:
    if name not in extra:
        return None
    try:
        values = np.asarray(extra[name], np.float32)
    except (TypeError, ValueError):
        values = np.zeros(0)
    if values.shape != (length,) or not np.isfinite(values[1:]).all():
        raise ValueError(f"{name} must be {length} finite numbers, one per token; the first is not used")
    return np.concatenate([np.zeros(1, np.float32), values[1:]])


def _hyper(config: FinetuneConfig, overrides: Mapping[str, float | None]) -> Hyper:
    hyper = hyper_arrays(config, ENDLESS, 0) | {"learning_rate": np.float32(config.learning_rate)}
    for name, value in overrides.items():
        if value is None:
            continue
        least, most = LEAST if name in _DIVISORS else 0, BELOW_1 if name in _SHARES else MOST
        unclipped = name == "max_grad_norm" and _is_number(value) and value == np.inf
        if not unclipped and not (_is_number(value) and least <= value <= most):
            limit = "below 1" if name in _SHARES else f"at most {most:.3g}"
            limit += ", or inf for no clipping" if name == "max_grad_norm" else ""
            raise InvalidRequest(f"{name} is {value!r}; it must be a number from {least:.3g}, {limit}", name)
        hyper[name] = np.float32(value)
    return hyper
