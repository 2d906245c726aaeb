"""The public engine: text and token ids in, events and results out."""

import dataclasses
import hashlib
import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxserve.adapters.peft_io import load_peft
from jaxserve.adapters.store import AdapterInfo, AdapterStore, AdapterVersion
from jaxserve.adapters.weights import AdapterWeights
from jaxserve.config import EngineConfig
from jaxserve.engine.compiles import use_compilation_cache
from jaxserve.engine.loop import EngineCore
from jaxserve.engine.results import News
from jaxserve.engine.sizes import core_config
from jaxserve.engine.trainer import Trainer
from jaxserve.errors import AdapterError, EngineError, InvalidRequest, ModelError
from jaxserve.files import read_json
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.data import Source
from jaxserve.finetune.session import BatchResult
from jaxserve.finetuning import FinetuneJob, make_job
from jaxserve.models.config import ModelConfig
from jaxserve.models.loader import (
    check_tokenizer,
    dummy_params,
    load_config,
    load_generation_config,
    load_params,
    weights_fingerprint,
)
from jaxserve.outputs import Completion, Event, RequestOutput
from jaxserve.primitives import LOSSES, TrainingCalls
from jaxserve.sampling import SamplingParams
from jaxserve.scheduler.request import Request
from jaxserve.scheduler.request import Sequence as Choice
from jaxserve.text import TextStream
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from sharding import make_mesh

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]


@dataclass
class _Live:
    """A request that is not over."""

    request: Request
    prompt: str | None
    choices: list[Choice]
    streams: list[TextStream]
    output: RequestOutput
    open: set[int] = field(default_factory=set)  # choices not finished
    collect: bool = False  # generate() wants the result


class Engine:
    """Serves a base model and its LoRA adapters with continuous batching.

    ``from_pretrained`` loads and compiles; then either ``generate``, or ``add_request`` and a loop over ``step``.
    Adapters may be loaded and requests added or aborted from other threads while one thread steps.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        mesh: Mesh,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        generation_config: dict[str, Any] | None = None,
        name: str = "base",
        weights: bytes = b"",
    ):
        self.model, self.config, self.tokenizer, self.name = model, config, tokenizer, name
        self.generation_config = generation_config or {}
        self.base_digest = digest = _base_digest(model, weights)
        sizes = core_config(config, model, params, mesh)
        self.core = EngineCore(model, params, mesh, sizes, self._eos_token_ids(), digest)
        self.adapters = AdapterStore(
            model, config.max_cpu_loras, base_names=(name,), base_digest=digest, read=self._read
        )
        self._live: dict[str, _Live] = {}
        self._finished: dict[str, RequestOutput] = {}
        self._aborted: deque[Event] = deque()
        self._jobs: list[FinetuneJob] = []
        self._calls = TrainingCalls(self)
        self._numbers = itertools.count()
        self._seeds = np.random.default_rng(config.seed)
        self._totals = {"requests": 0, "prompt_tokens": 0, "generation_tokens": 0}
        self._warm_up()

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> "Engine":
        """Loads a Hugging Face model directory and compiles every step shape.

        Args:
          path: config.json, safetensors, tokenizer.json, generation_config.json; with ``load_format="dummy"``
            config.json alone is enough.
          options: fields of ``EngineConfig``.

        Raises:
          ConfigError, ModelError: before any big allocation.
        """
        config = EngineConfig(**options)
        use_compilation_cache()
        directory = Path(path)
        model = load_config(directory)
        try:
            mesh = make_mesh(config.tensor_parallel)
        except ValueError as error:
            raise ModelError(str(error)) from None
        dtype = _stored_dtype(directory) if config.dtype == "auto" else config.dtype
        config = config.model_copy(update={"dtype": dtype})
        generation_config = load_generation_config(directory)
        tokenizer = _tokenizer(directory, config)
        if tokenizer is not None:
            check_tokenizer(model, tokenizer)
        if config.load_format == "dummy":
            params = dummy_params(model, mesh, dtype, config.seed)
            weights = f"dummy {config.seed}".encode()
        else:
            params = load_params(directory, model, mesh, dtype)
            weights = weights_fingerprint(directory, model)
        return cls(model, params, mesh, config, tokenizer, generation_config, directory.resolve().name, weights)

    def _eos_token_ids(self) -> tuple[int, ...]:
        """What generation_config.json says, else config.json."""
        eos = self.generation_config.get("eos_token_id", list(self.model.eos_token_ids))
        ids = [eos] if isinstance(eos, int) else list(eos or ())
        return tuple(i for i in ids if isinstance(i, int) and 0 <= i < self.model.vocab_size)

    def _warm_up(self) -> None:
        start = time.perf_counter()
        seconds = self.core.warm_up()
        if self.config.max_finetune_jobs:
            self.prepare_finetuning()
        logger.info("ready: %d programs in %.1f s %s", len(seconds), time.perf_counter() - start, seconds)

    # adapters

    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Loads a PEFT directory under a name, or a new version of it; requests in flight keep theirs.

        The same content again changes nothing. Runs on the caller's thread; the step loop goes on.

        Raises:
          AdapterError: what the directory has that cannot be served, by file and field.
          InvalidRequest: a bad name.
        """
        self._require_lora()
        return self._described(self.adapters.load(name, path))

    def put_adapter(self, name: str, weights: AdapterWeights) -> AdapterInfo:
        """Publishes weights held in memory under a name."""
        self._require_lora()
        self._require_servable(weights)
        self.core.prepare(weights)
        return self._described(self.adapters.put(name, weights))

    def _read(self, path: Path, *args: Any, **options: Any) -> AdapterWeights:
        """Reads a directory for the store on the caller's thread, and again when its weights have left the host."""
        weights = load_peft(path, *args, **options)
        self._require_servable(weights)
        self.core.prepare(weights)
        return weights

    def _require_lora(self) -> None:
        if not self.config.enable_lora:
            raise AdapterError("this engine was started with enable_lora off", "enable_lora")

    def _require_servable(self, weights: AdapterWeights) -> None:
        """Raises AdapterError before anything is published: the name keeps the version it has."""
        if weights.rank > self.config.max_lora_rank:
            raise AdapterError(f"rank {weights.rank} exceeds max_lora_rank {self.config.max_lora_rank}", "r")

    def _described(self, version: AdapterVersion) -> AdapterInfo:
        return next(info for info in self.adapters.list() if info.name == version.name)

    def unload_adapter(self, name: str) -> None:
        """Forgets a name; requests in flight finish on it.

        Raises:
          AdapterNotFound: no such name.
        """
        self.adapters.unload(name)

    def list_adapters(self) -> list[AdapterInfo]:
        return self.adapters.list()

    # requests

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        salt: str = "",
        slo_class: str = "",
    ) -> str:
        """Queues a request and returns its id.

        Args:
          prompt: text (special tokens are added as the tokenizer does) or token ids.
          adapter: name of a loaded adapter; None is the base model. The request keeps the version it starts with.
          priority: lower is served earlier, under scheduling_policy "priority".
          tenant, salt: requests share cached prefixes only within the same tenant and salt.
          slo_class: one of the engine's ``slo_classes``; by default ttft_objective_ms and tpot_objective_ms hold.

        Raises:
          InvalidRequest: what is wrong with it, or which limit it can never meet.
          AdapterNotFound: no such adapter.
        """
        params = params or SamplingParams()
        params.validate(self.model.vocab_size, max_logprobs=self.config.max_logprobs)
        text, ids = self._prompt_ids(prompt)
        objectives = self.core.config.objectives
        if slo_class not in objectives:
            known = ", ".join(name for name in objectives if name) or "none"
            raise InvalidRequest(f"slo_class is {slo_class!r}; known are: {known}", "slo_class")
        version = None if adapter is None or adapter == self.name else self.adapters.acquire(self.adapters.get(adapter))
        try:
            request = Request(
                id=request_id or f"request-{next(self._numbers)}",
                prompt_ids=ids,
                params=self._with_seed(params),
                adapter=version,
                adapter_digest=b"" if version is None else version.digest,
                priority=priority,
                tenant=tenant,
                salt=salt,
                arrival=self.core.clock(),
                objective=objectives[slo_class],
            )
            self._track(request, text, version)
        except BaseException:
            if version is not None:
                self.adapters.release(version)
            raise
        return request.id

    def _track(self, request: Request, text: str | None, version: AdapterVersion | None) -> None:
        params = request.params
        output = RequestOutput(
            request_id=request.id,
            prompt=text,
            prompt_token_ids=list(request.prompt_ids),
            prompt_logprobs=None if params.prompt_logprobs is None else [None for _ in request.prompt_ids],
            outputs=[Completion(index=i, logprobs=None if params.logprobs is None else []) for i in range(params.n)],
            adapter=version and version.name,
            adapter_version=version and version.version,
        )
        live = _Live(request, text, [], [self._stream(params) for _ in range(params.n)], output, set(range(params.n)))
        with self.core.lock:
            if request.id in self._live:
                raise InvalidRequest(
                    f"request id {request.id!r} is in use; it must be unique among live requests", "id"
                )
            live.choices = self.core.add(request)
            self._live[request.id] = live
            self._totals["requests"] += 1
            self._totals["prompt_tokens"] += len(request.prompt_ids)

    def _stream(self, params: SamplingParams) -> TextStream:
        decoder = None if self.tokenizer is None else self.tokenizer.stream(params.skip_special_tokens)
        return TextStream(decoder, params.stops, params.include_stop_str_in_output, params.min_tokens)

    def _with_seed(self, params: SamplingParams) -> SamplingParams:
        if params.seed is not None:
            return params
        return dataclasses.replace(params, seed=int(self._seeds.integers(2**63)))

    def _prompt_ids(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest(
                    "prompt is text, and this model directory has no tokenizer; give token ids", "prompt"
                )
            return prompt, tuple(self._check_ids(self.tokenizer.encode(prompt)))
        return None, tuple(self._check_ids(prompt))

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        """Token ids as ints inside the vocabulary: JAX would read another row for a bad one and say nothing."""
        try:
            whole = np.asarray(ids)
        except (ValueError, OverflowError):
            whole = np.asarray(None)
        if whole.ndim != 1 or (whole.size and whole.dtype.kind not in "iu"):
            raise InvalidRequest(f"prompt is {str(ids)[:64]!r}; it must be a list of token ids", "prompt")
        if whole.size and not 0 <= whole.min() <= whole.max() < self.model.vocab_size:
            bad = whole[(whole < 0) | (whole >= self.model.vocab_size)][0]
            raise InvalidRequest(f"prompt has token id {bad}; ids go from 0 to {self.model.vocab_size - 1}", "prompt")
        return whole.tolist()

    def abort(self, request_id: str) -> bool:
        """Ends a request in any phase; its remaining choices end with finish_reason "abort". False: not alive."""
        with self.core.lock:
            ended = self.core.abort(request_id)
            self._aborted.extend(self._end(seq, "abort") for seq in ended)
        return bool(ended)

    def has_work(self) -> bool:
        """True while a request is alive, or an event of one is still to be fetched."""
        return bool(self._live or self._aborted) or self.core.has_work()

    # the loop

    def step(self) -> list[Event]:
        """Runs one iteration; returns what became known in it."""
        news = self.core.step()
        with self.core.lock:
            aborted = [self._aborted.popleft() for _ in range(len(self._aborted))]
            events = [event for item in news if (event := self._take_in(item)) is not None]
            if self.core.stuck():
                raise EngineError(f"no request can run: {self.stats()}")
        return aborted + events

    def _take_in(self, news: News) -> Event | None:
        seq, token = news.outcome.seq, news.outcome.token
        live = self._live.get(seq.request.id)
        if live is None or seq.index not in live.open:
            return None
        if live.output.prompt_logprobs is not None:
            for position, logprobs in news.prompt_logprobs:
                live.output.prompt_logprobs[position] = logprobs
        if token is None:
            return self._end(seq, "error", error=news.error) if news.outcome.finish_reason else None
        completion = live.output.outputs[seq.index]
        completion.token_ids.append(token)
        self._totals["generation_tokens"] += 1
        if news.logprobs is not None and completion.logprobs is not None:
            completion.logprobs.append(news.logprobs)
        text, stop, reason = self._text(live, seq, token, news.outcome.finish_reason)
        new = {"token_ids": [token], "text": text, "logprobs": [] if news.logprobs is None else [news.logprobs]}
        completion.text += text
        if reason is not None:
            return self._end(seq, reason, stop_reason=stop, **new)
        return self._event(live, seq, **new)

    def _text(
        self, live: _Live, seq: Choice, token: int, reason: str | None
    ) -> tuple[str, str | int | None, str | None]:
        """New text of a token, what stopped the choice, and why it ends, if it does."""
        stream = live.streams[seq.index]
        if reason == "stop":  # a stop token is no part of the text
            return stream.finish(), token, "stop"
        text, hit = stream.push(token)
        if hit is not None:
            self.core.finish(seq, "stop")
            return text, hit, "stop"
        return (text + stream.finish(), None, reason) if reason else (text, None, None)

    def _event(self, live: _Live, seq: Choice, **fields: Any) -> Event:
        output = live.output
        return Event(
            request_id=seq.request.id,
            index=seq.index,
            adapter=output.adapter,
            adapter_version=output.adapter_version,
            **fields,
        )

    def _end(self, seq: Choice, reason: str, *, stop_reason=None, error: str | None = None, **new: Any) -> Event:
        """Closes a choice, and with the last one its request."""
        live = self._live[seq.request.id]
        completion = live.output.outputs[seq.index]
        completion.finish_reason, completion.stop_reason, completion.error = reason, stop_reason, error
        if reason in ("abort", "error"):
            new["text"] = live.streams[seq.index].finish()
            completion.text += new["text"]
        live.open.discard(seq.index)
        event = self._event(live, seq, finish_reason=reason, stop_reason=stop_reason, error=error, **new)
        if not live.open:
            del self._live[seq.request.id]
            live.output.num_cached_tokens = live.choices[0].num_cached
            if live.request.adapter is not None:
                self.adapters.release(live.request.adapter)
            if live.collect:
                self._finished[seq.request.id] = live.output
        return event

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Runs a batch of prompts to the end, in order.

        Args:
          prompts: texts or lists of token ids, or one of them.
          params: one for all, or one each.
          adapter: one for all, or one each; None is the base model.

        Raises:
          InvalidRequest, AdapterNotFound: naming the first bad prompt; nothing is left running.
        """
        every: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        each = zip(every, _spread("params", params, every), _spread("adapter", adapter, every), strict=True)
        todo, ids = deque(each), []
        try:
            while todo or not all(i in self._finished for i in ids):
                while todo and self._queue_has_room(todo[0][1]):
                    prompt, param, name = todo.popleft()
                    ids.append(self.add_request(prompt, param, adapter=name))
                    self._live[ids[-1]].collect = True
                self.step()
        except BaseException:
            for request_id in ids:
                self.abort(request_id)
                self._finished.pop(request_id, None)
            raise
        return [self._finished.pop(i) for i in ids]

    def _queue_has_room(self, params: SamplingParams | None) -> bool:
        """An empty queue has: what does not even fit there is to be refused."""
        waiting = self.core.scheduler.counts().waiting
        return waiting == 0 or waiting + (params.n if params else 1) <= self.config.max_queue

    def chat(
        self, messages: Sequence[dict[str, str]], params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """Renders messages with the model's chat template and generates one answer."""
        if self.tokenizer is None:
            raise InvalidRequest("this model directory has no tokenizer", "messages")
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return self.generate([ids], params, **options)[0]

    # finetuning

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

        After each optimizer step the adapter's new version answers requests from the next step on. On the first
        call the steps with gradient rows are compiled, unless max_finetune_jobs asked for that at start-up; a job's
        own small programs are compiled here, too. With ``output_dir`` the job keeps checkpoints, and goes on from the
        newest one when it is begun again with the same data and settings.

        Args:
          data: a JSONL file (chat messages, prompt and completion, or text), or an iterable of what its lines hold or
            of (token ids, weights) pairs.
          adapter: name under which the adapter is published.
          config: a FinetuneConfig; or give its fields as keywords.
          tenant: who is charged for it.

        Raises:
          ConfigError, DataError, InvalidRequest, AdapterError, CheckpointError: before anything is trained.
        """
        job = make_job(self, data, adapter, config or FinetuneConfig(**fields), tenant)
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
        self._calls.open(adapter, config or FinetuneConfig(**fields), tenant)

    def close_adapter(self, adapter: str) -> None:
        """Ends an adapter's training by calls; its published versions stay."""
        self._calls.close(adapter)

    def forward_backward(
        self,
        adapter: str,
        batch: Iterable[Any],
        loss: str = "cross_entropy",
        *,
        clip: tuple[float, float] = (0.8, 1.2),
        beta: float = 0.1,
        reference: str | None = None,
    ) -> BatchResult:
        """Adds the gradients of a batch to the adapter's; steps the engine, and with it all requests and jobs.

        Args:
          batch: (token ids, weights) pairs, {"input_ids", "weights"} or records as in a JSONL file. For
            importance_sampling and ppo {"input_ids", "weights", "logprobs", "advantages"}; weights, logprobs and
            advantages are one per token, entry t is about predicting token t. For dpo {"chosen", "rejected"}, and
            "reference_logprobs" (two sums) if they are known.
          loss: cross_entropy, importance_sampling, ppo or dpo; see ``jaxserve.primitives``. All are sums over tokens.
          clip: the range of ppo's ratio; beta: of dpo; reference: dpo's reference, an adapter or None for the base.

        Returns: each token's loss and log-probability; of dpo each pair's loss, and accuracy and margin as metrics.

        Raises:
          InvalidRequest: what is wrong with which item; nothing was computed.
        """
        if loss == "dpo":
            return self._calls.dpo(adapter, batch, beta, reference)
        if loss not in LOSSES:
            raise InvalidRequest(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}", "loss")
        return self._calls.forward_backward(adapter, batch, loss, clip)

    def forward(self, adapter: str, batch: Iterable[Any]) -> BatchResult:
        """Losses and log-probabilities of a batch under an open adapter, without gradients and without dropout."""
        return self._calls.forward(adapter, batch)

    def optim_step(self, adapter: str, **overrides: float | None) -> dict[str, Any]:
        """Updates the adapter by the gradients that have been added, and publishes it.

        Args:
          overrides: learning_rate, beta1, beta2, eps, momentum, weight_decay, max_grad_norm, in place of the
            config's.

        Returns: step, applied (False where a gradient was not finite: nothing has changed), gradient_norm,
          learning_rate, adapter_version.
        """
        return self._calls.optim_step(adapter, overrides)

    def sample(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> list[RequestOutput]:
        """``generate`` with the drawn tokens' log-probabilities, which a policy loss asks for."""
        params = params or SamplingParams()
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
        """Puts an open adapter back to where it was saved, and publishes that as its newest version.

        Raises:
          CheckpointError: it is the state of another model or adapter configuration.
        """
        self._calls.load_state(adapter, directory)

    def prepare_finetuning(self, *, scales: bool = False, dropout: bool = False) -> Trainer:
        """Compiles what jobs need, where that has not been done; ``scales`` is for (IA)3 and DoRA."""
        start, seconds = time.perf_counter(), {}
        if self.core.trainer is None:
            seconds = self.core.enable_training(self.adapters, max(self.config.max_finetune_jobs, 1))
        seconds |= self.core.enable(scales=scales, dropout=dropout)
        if seconds:
            logger.info("ready to finetune: %d programs in %.1f s", len(seconds), time.perf_counter() - start)
        assert self.core.trainer is not None
        return self.core.trainer

    def run(self) -> list[Event]:
        """Steps until no request and no job has anything left to do; returns all events."""
        events = []
        while self.has_work():
            events += self.step()
        return events

    def drive(self) -> None:
        """One step on behalf of something that waits; events of requests are kept for the next ``step``."""
        events = self.step()
        with self.core.lock:
            self._aborted.extend(events)

    def close(self) -> None:
        """Stops every job where it is, saves those that have a directory and lets others use it."""
        for job in self._jobs:
            if job.status in ("queued", "running"):
                job.pause()
        if self.core.trainer is not None:
            self.core.trainer.close()

    # numbers

    def stats(self) -> dict[str, Any]:
        """Counters and gauges, of the engine's life so far."""
        return {**self.core.stats(), **self._totals, "adapters": len(self.adapters.list())}


def _base_digest(model: ModelConfig, weights: bytes) -> bytes:
    """Names the base model, whatever dtype it is served in: its description and its weights."""
    described = json.dumps(dataclasses.asdict(model), sort_keys=True, default=str)
    return hashlib.sha256(described.encode() + weights).digest()


def _stored_dtype(directory: Path) -> str:
    """The dtype config.json names; float32 where it names none that can be served."""
    hf = read_json(directory / "config.json")
    named = hf.get("dtype") or hf.get("torch_dtype") or hf.get("text_config", {}).get("dtype")
    return named if named in ("float32", "bfloat16", "float16") else "float32"


def _tokenizer(directory: Path, config: EngineConfig) -> Tokenizer | None:
    """The model's tokenizer; a directory without one serves token ids."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return load_tokenizer(directory) if any((directory / name).exists() for name in names) else None


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))


def _spread(name: str, value: Any, prompts: Sequence[Any]) -> Iterable[Any]:
    """One value per prompt."""
    if value is None or isinstance(value, str | SamplingParams):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise InvalidRequest(f"{name} has {len(value)} entries for {len(prompts)} prompts", name)
    return value
