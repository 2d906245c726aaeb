"""The half of an engine that trains adapters: jobs over a data set, and calls for loops of one's own."""

import dataclasses
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxserve.adapters.store import AdapterStore
from jaxserve.config import EngineConfig
from jaxserve.engine.loop import EngineCore
from jaxserve.engine.programs import Needs
from jaxserve.engine.trainer import Trainer
from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Source
from jaxserve.finetune.session import BatchResult
from jaxserve.finetuning import FinetuneJob, make_job
from jaxserve.models.config import ModelConfig
from jaxserve.outputs import RequestOutput
from jaxserve.primitives import DPO_BETA, LOSSES, PPO_CLIP, TrainingCalls
from jaxserve.prompts import Prompt, require
from jaxserve.sampling import SamplingParams
from jaxserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class TrainingEngine(ABC):
    """Trains beside an engine's requests; what it needs of the half that serves them is declared here."""

    model: ModelConfig
    config: EngineConfig
    tokenizer: Tokenizer | None
    core: EngineCore
    adapters: AdapterStore
    base_digest: bytes

    def __init__(self):
        self._jobs: list[FinetuneJob] = []
        self._calls = TrainingCalls(self)

    @abstractmethod
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Runs a batch of prompts to the end, in order."""

    @abstractmethod
    def drive(self) -> None:
        """One step on behalf of something that waits."""

    # jobs

    def finetune(
        self,
        data: Source,
        adapter: str,
        config: FinetuneConfig | None = None,
        *,
        tenant: str = "",
        **fields: Any,
    ) -> FinetuneJob:
        """Queues a job that trains an adapter while requests are served; ``step`` moves both on.

        After each optimizer step the adapter's new version answers requests from the next step on. The first job, and
        the first with dropout or of another method, has its steps with gradient rows compiled here, unless that was
        done at start-up (max_finetune_jobs, ``from_pretrained``'s jobs); a job's own small programs are compiled here,
        too. With ``output_dir`` the job keeps checkpoints, and goes on from the newest one when it is begun again with
        the same data and settings.

        Args:
          data: a JSONL file (chat messages, prompt and completion, or text), or an iterable of what its lines hold or
            of (token ids, weights) pairs.
          adapter: name under which the adapter is published.
          config: a FinetuneConfig; or give its fields as keywords.
          tenant: who is charged for it.

        Raises:
          ConfigError, DataError, InvalidRequest, AdapterError, CheckpointError: before anything is trained.
        """
        require("tenant", tenant, str, "a string")
        self._calls.check_room()
        job = make_job(self, data, adapter, _config(config, fields), tenant)
        self._jobs.append(FinetuneJob(self, job))
        return self._jobs[-1]

    def jobs(self) -> list[FinetuneJob]:
        """All jobs of this engine's life, in the order they came."""
        return list(self._jobs)

    # training by calls

    def open_adapter(
        self, adapter: str, config: FinetuneConfig | None = None, *, tenant: str = "", **fields: Any
    ) -> None:
        """Makes an adapter that ``forward_backward`` and ``optim_step`` train; it takes one of max_finetune_jobs.

        Args:
          config: method, rank, targets, start, optimizer, learning rate, dropout and window of a FinetuneConfig; or
            give its fields as keywords. What is about data and schedules is not used.

        Raises:
          ConfigError, InvalidRequest, AdapterError.
        """
        require("tenant", tenant, str, "a string")
        self._calls.open(adapter, _config(config, fields), tenant)

    def close_adapter(self, adapter: str) -> None:
        """Ends an adapter's training by calls; its published versions stay."""
        self._calls.close(adapter)

    def forward_backward(
        self,
        adapter: str,
        batch: Iterable[Any],
        loss: str = "cross_entropy",
        *,
        clip: tuple[float, float] | None = None,
        beta: float | None = None,
        reference: str | None = None,
    ) -> BatchResult:
        """Adds the gradients of a batch to the adapter's; steps the engine, and with it all requests and jobs. Where
        Ctrl-C ends that, nothing is added.

        Args:
          batch: (token ids, weights) pairs, {"input_ids", "weights"} or records as in a JSONL file. For
            importance_sampling and ppo {"input_ids", "weights", "logprobs", "advantages"}; weights, logprobs and
            advantages are one per token, entry t is about predicting token t. For dpo {"chosen", "rejected"}, and
            "reference_logprobs" (two sums) if they are known.
          loss: cross_entropy, importance_sampling, ppo or dpo; see ``jaxserve.primitives``. All are sums over tokens.
          clip: the range of ppo's ratio, by default (0.8, 1.2); beta: of dpo, by default 0.1; reference: dpo's
            reference, an adapter or None for the base. A loss that has no such thing refuses it.

        Returns: each token's loss and log-probability; of dpo each pair's loss, and accuracy and margin as metrics.

        Raises:
          InvalidRequest: what is wrong with which item; nothing was computed.
        """
        if loss not in LOSSES:
            raise InvalidRequest(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}", "loss")
        for name, value, owner in (("clip", clip, "ppo"), ("beta", beta, "dpo"), ("reference", reference, "dpo")):
            if value is not None and loss != owner:
                raise InvalidRequest(f"{name} is {value!r}; loss {loss} has none, it is of {owner}", name)
        if loss == "dpo":
            return self._calls.dpo(adapter, batch, DPO_BETA if beta is None else beta, reference)
        return self._calls.forward_backward(adapter, batch, loss, PPO_CLIP if clip is None else clip)

    def forward(self, adapter: str, batch: Iterable[Any]) -> BatchResult:
        """Losses and log-probabilities of a batch under an open adapter, without gradients and without dropout."""
        return self._calls.forward(adapter, batch)

    def optim_step(self, adapter: str, **overrides: float | None) -> dict[str, Any]:
        """Updates the adapter by the gradients that have been added, and publishes it.

        Args:
          overrides: learning_rate, beta1, beta2, eps, momentum, weight_decay, max_grad_norm, in place of the
            config's, which None stands for; with max_grad_norm inf nothing is clipped.

        Returns: step, applied (False where a gradient was not finite: nothing has changed), gradient_norm,
          learning_rate, adapter_version.
        """
        return self._calls.optim_step(adapter, overrides)

    def sample(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> list[RequestOutput]:
        """``generate`` with the drawn tokens' log-probabilities, which a policy loss asks for. Without params they are
        drawn from the distribution that these are of, whatever generation_config.json recommends."""
        params = SamplingParams() if params is None else params
        require("params", params, SamplingParams, "a SamplingParams")
        if params.logprobs is None:
            params = dataclasses.replace(params, logprobs=0)
        return self.generate(prompts, params, adapter=adapter)

    def save_state(self, adapter: str, directory: str | Path) -> None:
        """Saves an open adapter with its optimizer's state and the gradients added so far.

        Raises:
          CheckpointError: the disk refused, or the directory has the state of something else.
        """
        self._calls.save_state(adapter, directory)

    def load_state(self, adapter: str, directory: str | Path) -> None:
        """Puts an open adapter back to where it was saved, by an engine on any number of devices, and publishes that
        as its newest version.

        Raises:
          CheckpointError: it is the state of another model or adapter configuration.
          InvalidRequest: there is none.
        """
        self._calls.load_state(adapter, directory)

    # for both

    def prepare_finetuning(self, *, scales: bool = False, dropout: bool = False) -> Trainer:
        """Compiles what jobs need, where that has not been done; ``scales`` is for (IA)3 and DoRA."""
        start, seconds = time.perf_counter(), {}
        if self.core.trainer is None:
            seconds = self.core.enable_training(self.adapters, max(self.config.max_finetune_jobs, 1))
        seconds |= self.core.enable(Needs(scales, dropout, plain=not (scales or dropout)))
        if seconds:
            logger.info("ready to finetune: %d programs in %.1f s", len(seconds), time.perf_counter() - start)
        assert self.core.trainer is not None
        return self.core.trainer

    def close(self) -> None:
        """Stops every job where it is, saves those that have a directory and lets others use it."""
        with self.core.lock:  # else one might end between the question and the pause
            for job in self._jobs:
                if job.status in ("queued", "running"):
                    job.pause()
        if self.core.trainer is not None:
            self.core.trainer.close()


def _config(config: FinetuneConfig | None, fields: dict[str, Any]) -> FinetuneConfig:
    """One or the other: fields beside a config would be taken for its exceptions."""
    if config is None:
        return FinetuneConfig(**fields)
    require("config", config, FinetuneConfig, "a FinetuneConfig")
    if fields:
        raise ConfigError([f"{name} and config exclude each other" for name in fields])
    return config
