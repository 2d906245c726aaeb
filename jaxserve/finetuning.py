"""Finetuning jobs as users see them: made from data and settings, watched, paused, saved."""

import os
from collections.abc import Collection
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.adapters import dora, ia3, lora
from jaxserve.adapters.fields import CONFIG_FILE
from jaxserve.adapters.method import empty_adapter, method_of
from jaxserve.adapters.peft_io import load_peft, save_peft
from jaxserve.adapters.targets import sparing_vision
from jaxserve.adapters.weights import AdapterWeights
from jaxserve.engine.activations import DEFAULT_REMAT
from jaxserve.engine.lanes import weights_of
from jaxserve.engine.trainer import Trainer
from jaxserve.errors import AdapterError, AdapterNotFound, ConfigError, InvalidRequest
from jaxserve.files import checked_directory
from jaxserve.finetune.checkpoint import CheckpointWriter, load_latest
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Dataset, Source, load_dataset
from jaxserve.finetune.durable import OnEvent
from jaxserve.finetune.errors import CheckpointError, DataError
from jaxserve.finetune.folder import ADAPTER, CHECKPOINTS, JobFolder
from jaxserve.finetune.job import Job, JobEvent
from jaxserve.models.config import ModelConfig

if TYPE_CHECKING:
    from jaxserve.training import TrainingEngine


def make_job(engine: "TrainingEngine", data: Source, adapter: str, config: FinetuneConfig, tenant: str) -> Job:
    """Reads the data, makes or loads the adapter's start and queues the job.

    Raises:
      ConfigError, DataError, InvalidRequest, AdapterError, CheckpointError: before anything is trained.
    """
    _check_name(engine, adapter)
    dataset, validation = _datasets(engine, data, config)
    start = make_start(engine, adapter, config)
    trainer = engine.prepare_finetuning(scales=bool(start.vectors), dropout=config.dropout > 0)
    job = Job(adapter, config, dataset, start, validation=validation, tenant=tenant)
    found: dict[str, None] = {}  # what its directory has that is no good checkpoint

    def told(kind: str, message: str) -> None:
        if job.events():
            job.note("warning", message)
        else:
            found[message] = None

    folder = _folder(engine, adapter, config, dataset, tenant, told)
    try:
        with engine.core.compiles.preparing():
            training = trainer.prepare(job, folder)
        job.announce()
        for message in found:
            job.note("warning", message)
        with engine.core.lock:
            trainer.submit(training)
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    return job


def _datasets(engine: "TrainingEngine", data: Source, config: FinetuneConfig) -> tuple[Dataset, Dataset | None]:
    def load(source: Source) -> Dataset:
        return load_dataset(
            source,
            engine.tokenizer,
            max_length=engine.core.config.max_example_len,
            vocab_size=engine.model.vocab_size,
            config=config,
        )

    dataset = load(data)
    if config.validation_data is not None:
        try:
            return dataset, load(config.validation_data)
        except DataError as error:
            raise error.within("validation_data") from None
    if config.validation_fraction > 0:
        return dataset.split(config.validation_fraction, config.seed)
    return dataset, None


def _folder(
    engine: "TrainingEngine", adapter: str, config: FinetuneConfig, dataset: Dataset, tenant: str, on_event: OnEvent
) -> JobFolder | None:
    if config.output_dir is None:
        return None
    identity = {
        "adapter": adapter,
        "tenant": tenant,
        "dtype": engine.config.dtype,
        "base_model": engine.base_digest.hex(),
        "data": dataset.digest,
        "config": config.digest(),
    }
    return JobFolder(config.output_dir, identity, config.save_total_limit, on_event)


def _check_name(engine: "TrainingEngine", adapter: str) -> None:
    engine.adapters.check_name(adapter)
    if engine.core.trainer is not None:
        engine.core.trainer.check_free(adapter)


def make_start(engine: "TrainingEngine", adapter: str, config: FinetuneConfig) -> AdapterWeights:
    """What the adapter is before the first step. Raises ConfigError, InvalidRequest, AdapterError."""
    _check_name(engine, adapter)
    compiled = engine.core.config.window_remat or DEFAULT_REMAT  # which is what a stash keeps
    if config.remat not in (None, compiled):
        raise ConfigError([f"remat is {config.remat!r}; this engine's steps are compiled with {compiled!r}"])
    weights = _start(engine, config)
    _check_fit(weights, config, engine.config.max_lora_rank)
    start = replace(weights, base_digest=engine.base_digest)
    start.digest  # noqa: B018  computed here, for the caller: the loop would stand still for it
    return start


def check_start(config: FinetuneConfig, model: ModelConfig, max_lora_rank: int, loaded: Collection[str]) -> None:
    """Refuses what ``make_start`` would, as far as it can be told before a model is loaded.

    Args:
      loaded: names of the adapters that will be there.

    Raises:
      AdapterError: targets that the model does not have, a start that is not there or does not fit.
      ConfigError: dropout where the start has none.
      InvalidRequest: too large a rank.
    """
    if config.start in loaded:
        return
    if config.start != "init":
        place = _peft_directory(Path(config.start))
        if place is not None:
            _check_fit(load_peft(place, model), config, max_lora_rank)
        elif not Path(config.start).is_dir():
            raise _no_start(config.start)
        return
    described = config.adapter_config()
    method_of(described).shapes(described, model)
    if config.method != "ia3":
        _check_rank(config.rank, max_lora_rank)


def check_folder(config: FinetuneConfig, adapter: str) -> None:
    """Refuses an output_dir that ``make_job`` would, as far as it can be told before a model is loaded; makes it.

    Raises:
      CheckpointMismatch, CheckpointError: as ``JobFolder``.
    """
    if config.output_dir is not None:
        known = {"adapter": adapter, "config": config.digest()}
        CheckpointWriter(Path(config.output_dir) / CHECKPOINTS, known).close()


def _check_fit(start: AdapterWeights, config: FinetuneConfig, max_rank: int) -> None:
    """Whether an adapter can be trained from here on as the job says; its method is not the config's."""
    if start.method == ia3.NAME and config.dropout > 0:
        raise ConfigError([f"dropout {config.dropout} with start {config.start!r}, an ia3 adapter, which has none"])
    _check_rank(start.rank, max_rank)


def _check_rank(rank: int, limit: int) -> None:
    if rank > limit:
        raise InvalidRequest(f"rank is {rank}; max_lora_rank is {limit}", "rank")


def _no_start(start: str) -> AdapterError:
    return AdapterError(f"start {start!r}: no adapter of that name, and no adapter or checkpoint there", "start")


def _peft_directory(path: Path) -> Path | None:
    """The adapter in a PEFT directory or in that of a job."""
    return next((place for place in (path, path / ADAPTER) if os.path.exists(place / CONFIG_FILE)), None)


def _start(engine: "TrainingEngine", config: FinetuneConfig) -> AdapterWeights:
    if config.start != "init":
        return _known(engine, config.start)
    described, rng = sparing_vision(config.adapter_config(), engine.model), np.random.default_rng(config.seed)
    if config.method == "ia3":
        return ia3.initial(described, engine.model)
    if config.method == "dora":
        return dora.initial(described, engine.model, rng, engine.core.base_lengths())
    return lora.initial(described, engine.model, rng)


def _known(engine: "TrainingEngine", start: str) -> AdapterWeights:
    """A loaded adapter by its name, else a PEFT directory, a job's directory, or one of checkpoints."""
    try:
        return engine.adapters.get(start).weights.fetched
    except AdapterNotFound:
        return _from_directory(engine, Path(start))


def _from_directory(engine: "TrainingEngine", path: Path) -> AdapterWeights:
    place = _peft_directory(path)
    if place is not None:
        return load_peft(place, engine.model, base_digest=engine.base_digest)
    expect = {"base_model": engine.base_digest.hex()}
    checkpoint = load_latest(path / CHECKPOINTS, expect=expect) or load_latest(path, expect=expect)
    if checkpoint is None:
        raise _no_start(str(path))
    masters: dict[str, dict[str, np.ndarray]] = {}
    for name, array in checkpoint.state.items():
        if name.startswith("masters/"):
            _, member, leaf = name.split("/")
            masters.setdefault(member, {})[leaf] = array
    known = checkpoint.identity | checkpoint.meta  # a saved state has it in its identity
    return weights_of(masters, empty_adapter(known["adapter_config"], engine.model))


class FinetuneJob:
    """A handle on a finetuning job."""

    def __init__(self, engine: "TrainingEngine", job: Job):
        self._engine, self._job = engine, job

    @property
    def id(self) -> str:
        return self._job.id

    @property
    def adapter(self) -> str:
        return self._job.adapter

    @property
    def status(self) -> str:
        """queued, running, paused, succeeded, failed or cancelled."""
        return self._job.status.value

    @property
    def error(self) -> str | None:
        return self._job.error

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._job.step

    @property
    def total_steps(self) -> int:
        return self._job.total_steps

    @property
    def losses(self) -> list[float]:
        """Mean loss per trained token of each optimizer step so far."""
        return list(self._job.losses)

    @property
    def validation_losses(self) -> list[tuple[int, float]]:
        """(step, mean loss per token of the validation data after that step); step 0 is before the first."""
        return list(self._job.validation_losses)

    @property
    def trained_tokens(self) -> int:
        return self._job.trained_tokens

    def events(self, after: int = -1) -> list[JobEvent]:
        """Progress so far: events with a number above ``after``."""
        if not isinstance(after, Integral):
            raise InvalidRequest(f"after is {str(after)[:64]!r}; it must be the number of an event", "after")
        return self._job.events(int(after))

    def wait(self) -> "FinetuneJob":
        """Steps the engine until the job is over, or paused by anybody; requests in flight are served along the way."""
        while not self._job.done and self.status != "paused":
            self._engine.drive()
        self._settle()
        return self

    def pause(self) -> None:
        """Stops the job within a step or two; ``resume`` goes on as if nothing had been.

        Raises:
          EngineError: it is over, or paused.
        """
        with self._engine.core.lock:
            self._trainer.pause(self._job)

    def resume(self) -> None:
        """Lets a paused job go on.

        Raises:
          EngineError: it is not paused, open adapters have every lane, or ``Engine.close`` gave its directory away.
        """
        with self._engine.core.lock:
            self._trainer.resume(self._job)

    def cancel(self) -> None:
        """Ends the job; versions it published stay. A job that is over stays as it is."""
        with self._engine.core.lock:
            self._trainer.cancel(self._job)
        self._settle()

    def checkpoint(self) -> None:
        """Saves the job as it is after the last step that was read, and waits until it is on the disk.

        Raises:
          CheckpointError: the disk refused.
        """
        for _ in range(2):  # the first may be of an earlier step
            with self._engine.core.lock:
                saving = self._trainer.checkpoint(self._job)
            if saving is not None:
                saving.result()

    def save(self, directory: str | Path) -> Path:
        """Writes what the job has learnt, as a PEFT directory, whatever the adapter's name stands for by now.

        Raises:
          AdapterNotFound: the job is over, and its adapter was unloaded or has made place for another.
          CheckpointError: the disk refused.
        """
        place = checked_directory(directory)
        with self._engine.core.lock:
            masters = self._trainer.learnt(self._job)
        weights = self._published() if masters is None else weights_of(masters, self._job.start)
        try:
            save_peft(weights, place)
        except OSError as error:
            raise CheckpointError(
                f"adapter {self.adapter!r} was not written: {error}", "storage", error.errno
            ) from error
        return place

    def _published(self) -> AdapterWeights:
        """The version that the job has left."""
        found = self._engine.adapters.get(self.adapter)
        if found.version != self._job.version:
            raise AdapterNotFound(f"adapter {self.adapter!r} is at version {found.version}, not one of this job's")
        return found.weights.fetched

    @property
    def _trainer(self) -> Trainer:
        assert self._engine.core.trainer is not None
        return self._engine.core.trainer

    def _settle(self) -> None:
        """Another process, or job, may use the directory from here on."""
        folder = self._job.folder
        if folder is not None and self._job.done:
            folder.wait_closed()

    def __repr__(self) -> str:
        return repr(self._job)
