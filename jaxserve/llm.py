"""The public engine: text and token ids in, events and results out; training comes with ``TrainingEngine``."""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxserve.adapters.peft_io import check_base, check_fit, load_peft
from jaxserve.adapters.scales import SCALED_METHODS
from jaxserve.adapters.store import AdapterInfo, AdapterStore
from jaxserve.adapters.weights import AdapterWeights, Weights
from jaxserve.config import EngineConfig
from jaxserve.engine.compiles import use_compilation_cache
from jaxserve.engine.loop import EngineCore
from jaxserve.engine.results import News
from jaxserve.engine.sizes import core_config
from jaxserve.errors import AdapterError, EngineError, InvalidRequest, ModelError
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.interrupts import deferred_interrupts
from jaxserve.live import LiveRequest
from jaxserve.models.config import Fields, ModelConfig
from jaxserve.models.loader import (
    check_tokenizer,
    dummy_params,
    load_config,
    load_generation_config,
    load_params,
    stored_dtype,
    weights_fingerprint,
)
from jaxserve.models.params import check_finetuning_tp, check_tp
from jaxserve.outputs import Event, RequestOutput
from jaxserve.prompts import Prompt, as_list, prompt_ids, require, spread, template_variables
from jaxserve.sampling import SamplingParams, default_params
from jaxserve.scheduler.request import Request
from jaxserve.tokenizer import Tokenizer, find_tokenizer
from jaxserve.training import TrainingEngine
from sharding import make_mesh

logger = logging.getLogger(__name__)


class Engine(TrainingEngine):
    """Serves a base model and its LoRA adapters with continuous batching.

    ``from_pretrained`` loads and compiles; then either ``generate``, or ``add_request`` and a loop over ``step``.
    Every method may be called from any thread. Steps are made one at a time; the events that ``step`` returns are those
    of all requests, and each is returned once, so one thread should be the one that fetches them.
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
        jobs: Sequence[FinetuneConfig] = (),
    ):
        super().__init__()
        self.model, self.config, self.tokenizer, self.name = model, config, tokenizer, name
        self.generation_config = generation_config or {}
        self.default_params = default_params(self.generation_config)
        self.base_digest = digest = _base_digest(model, weights)
        sizes = core_config(config, model, params, mesh)
        self.core = EngineCore(model, params, mesh, sizes, self._eos_token_ids(), digest)
        self.adapters = AdapterStore(
            model, config.max_cpu_loras, base_names=(name,), base_digest=digest, read=self._read
        )
        self._live: dict[str, LiveRequest] = {}
        self._finished: dict[str, RequestOutput] = {}
        self._events: deque[Event] = deque()  # that no ``step`` has returned
        self._stepping, self._next = threading.Lock(), threading.Lock()
        self._numbers = itertools.count()
        self._seeds = np.random.default_rng(config.seed)
        self._totals = {"requests": 0, "prompt_tokens": 0, "generation_tokens": 0}
        self._warm_up(jobs)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        jobs: Iterable[FinetuneConfig] = (),
        **options: Any,
    ) -> "Engine":
        """Loads a Hugging Face model directory and compiles every step shape.

        Args:
          path: config.json, safetensors, tokenizer.json, generation_config.json; with ``load_format="dummy"``
            config.json alone is enough.
          adapters: PEFT directories to load, by name.
          jobs: settings of those that ``max_finetune_jobs`` makes room for: what they need is compiled, and by default
            what LoRA without dropout does; jobs that need more compile it when they come.
          options: fields of ``EngineConfig``.

        Raises:
          ConfigError, ModelError, AdapterError, InvalidRequest: before any big allocation, but an adapter of another
            base model, which is found before any step shape is compiled.
        """
        require("jobs", jobs, Iterable, "a list of FinetuneConfig")
        config, jobs = EngineConfig(**options), tuple(jobs)
        for job in jobs:
            if not isinstance(job, FinetuneConfig):
                raise InvalidRequest(f"jobs has {job!r}; each must be a FinetuneConfig", "jobs")
        if jobs and not config.max_finetune_jobs:
            raise InvalidRequest(f"jobs has {len(jobs)} settings; max_finetune_jobs is 0, must be at least 1", "jobs")
        use_compilation_cache()
        if not isinstance(path, str | os.PathLike):
            raise ModelError(f"model path is {str(path)[:64]!r}; it must be that of a directory")
        if not isinstance(adapters, Mapping | None):
            raise AdapterError(f"adapters is {str(adapters)[:64]!r}; it must be a table of names and paths", "adapters")
        directory = Path(path)
        model = load_config(directory)
        check_tp(model, config.tensor_parallel)  # a CPU is split once: not for what no engine comes of
        if config.max_finetune_jobs:
            check_finetuning_tp(model, config.tensor_parallel)
        try:
            mesh = make_mesh(config.tensor_parallel)
        except ValueError as error:
            raise ModelError(str(error)) from None
        dtype = stored_dtype(directory) if config.dtype == "auto" else config.dtype
        config = config.model_copy(update={"dtype": dtype})
        generation_config = load_generation_config(directory)
        default_params(generation_config)
        tokenizer = find_tokenizer(directory, config.tokenizer)
        if tokenizer is not None:
            check_tokenizer(model, tokenizer)
        name, adapters = directory.resolve().name, adapters or {}
        _check_adapters(adapters, model, config, name)
        if config.load_format == "dummy":
            params = dummy_params(model, mesh, dtype, config.seed)
            weights = f"dummy {config.seed}".encode()
        else:
            params = load_params(directory, model, mesh, dtype)
            weights = weights_fingerprint(directory, model)
        _check_adapters(adapters, model, config, name, _base_digest(model, weights))
        engine = cls(model, params, mesh, config, tokenizer, generation_config, name, weights, jobs)
        for adapter, place in adapters.items():
            engine.load_adapter(adapter, place)
        return engine

    def _eos_token_ids(self) -> tuple[int, ...]:
        """What generation_config.json says, else config.json, else the tokenizer."""
        ids = Fields(self.generation_config, "generation_config.json").ids("eos_token_id") or self.model.eos_token_ids
        if not ids and self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids = (self.tokenizer.eos_token_id,)
        return tuple(i for i in ids if i < self.model.vocab_size)

    def _warm_up(self, jobs: Sequence[FinetuneConfig]) -> None:
        start = time.perf_counter()
        if self.config.max_finetune_jobs:
            for job in jobs or (FinetuneConfig(),):
                is_scaled = job.start == "init" and job.method in SCALED_METHODS
                self.prepare_finetuning(scales=is_scaled, dropout=job.dropout > 0)
        seconds = self.core.warm_up()
        logger.info("ready: %d programs in %.1f s %s", len(seconds), time.perf_counter() - start, seconds)

    # adapters

    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Loads a PEFT directory under a name, or a new version of it; requests in flight keep theirs.

        The same content again changes nothing. Runs on the caller's thread; the step loop goes on.

        Raises:
          AdapterError: what the directory has that cannot be served, by file and field.
          InvalidRequest: a bad name.
        """
        _require_lora(self.config)
        return self.adapters.info(self.adapters.load(name, path))

    def put_adapter(self, name: str, weights: Weights) -> AdapterInfo:
        """Publishes weights held in memory under a name, as they are now.

        Raises:
          AdapterError: they are of another model, or of a rank above max_lora_rank.
          InvalidRequest: a bad name, or no weights.
        """
        _require_lora(self.config)
        require("weights", weights, Weights, "those of an adapter")
        held = weights.fetched  # those of an adapter that is being trained are on the device
        check_base(held.base_digest, self.base_digest)
        check_fit(held, self.model)
        _require_servable(held, self.config)
        self.core.prepare(held)
        return self.adapters.info(self.adapters.put(name, held))

    def _read(self, path: Path, *args: Any, **options: Any) -> AdapterWeights:
        """Reads a directory for the store on the caller's thread, and again when its weights have left the host."""
        weights = load_peft(path, *args, **options)
        _require_servable(weights, self.config)
        self.core.prepare(weights)
        return weights

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
          params: by default ``default_params``, what the model's generation_config.json recommends.
          adapter: name of a loaded adapter; None is the base model. The request keeps the version it starts with.
          priority: lower is served earlier, under scheduling_policy "priority".
          tenant, salt: requests share cached prefixes only within the same tenant and salt.
          slo_class: one of the engine's ``slo_classes``; by default ttft_objective_ms and tpot_objective_ms hold.

        Raises:
          InvalidRequest: what is wrong with it, or which limit it can never meet.
          AdapterNotFound: no such adapter.
        """
        params = self.default_params if params is None else params
        texts = {"request_id": request_id or "", "adapter": "" if adapter is None else adapter}
        _check_options(priority, params, **texts, tenant=tenant, salt=salt, slo_class=slo_class)
        params.validate(self.model.vocab_size, max_logprobs=self.config.max_logprobs)
        text, ids = prompt_ids(prompt, self.tokenizer, self.model.vocab_size)
        objectives = self.core.config.objectives
        if slo_class not in objectives:
            known = ", ".join(name for name in objectives if name) or "none"
            raise InvalidRequest(f"slo_class is {slo_class!r}; known are: {known}", "slo_class")
        version = None if adapter is None or adapter == self.name else self.adapters.acquire(self.adapters.get(adapter))
        try:
            with self.core.lock:  # an id that is free stays so
                request = Request(
                    id=request_id or self._free_id(),
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
                self._track(request, text)
        except BaseException:
            if version is not None:
                self.adapters.release(version)
            raise
        return request.id

    def _free_id(self) -> str:
        """Callers may have given such ids themselves."""
        return next(id for number in self._numbers if (id := f"request-{number}") not in self._live)

    def _track(self, request: Request, text: str | None) -> None:
        live = LiveRequest.make(request, text, self.tokenizer)
        with self.core.lock:
            if request.id in self._live:
                raise InvalidRequest(
                    f"request id {request.id!r} is in use; it must be unique among live requests", "id"
                )
            live.choices = self.core.add(request)
            self._live[request.id] = live
            self._totals["requests"] += 1
            self._totals["prompt_tokens"] += len(request.prompt_ids)

    def _with_seed(self, params: SamplingParams) -> SamplingParams:
        if params.seed is not None:
            return params
        return dataclasses.replace(params, seed=int(self._seeds.integers(2**63)))

    def abort(self, request_id: str) -> bool:
        """Ends a request in any phase; its remaining choices end with finish_reason "abort". False: not alive."""
        require("request_id", request_id, str, "a string")
        with self.core.lock:
            ended = self.core.abort(request_id)
            for seq in ended:
                live = self._live[seq.request.id]
                event = live.end(seq.index, "abort")
                if not live.collect:
                    self._events.append(event)
                self._forget_if_over(live)
        return bool(ended)

    def has_work(self) -> bool:
        """True while a request is alive, or an event of one is still to be fetched."""
        with self.core.lock:
            return bool(self._live or self._events) or self.core.has_work()

    # the loop

    def step(self) -> list[Event]:
        """Runs one iteration; returns what became known in it, and what nobody has fetched of earlier ones."""
        self.drive()
        with self.core.lock:
            return [self._events.popleft() for _ in range(len(self._events))]

    def drive(self) -> None:
        """One step on behalf of something that waits; events of requests are kept for the next ``step``."""
        with self._turn():
            news = self.core.step()
            with self.core.lock:
                self._events.extend(event for item in news if (event := self._take_in(item)) is not None)
                if self.core.stuck():
                    raise EngineError(f"no request can run: {self.stats()}")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Nobody else steps meanwhile, and Ctrl-C waits. Who waits for a turn has the next one: a thread that steps
        without end would take the lock back before another one wakes up."""
        with self._next:
            self._stepping.acquire()
        try:
            with deferred_interrupts():
                yield
        finally:
            self._stepping.release()

    def _take_in(self, news: News) -> Event | None:
        seq, token = news.outcome.seq, news.outcome.token
        live = self._live.get(seq.request.id)
        if live is None or seq.index not in live.open or live.choices[seq.index] is not seq:
            return None  # its id may be another request's by now
        self._totals["generation_tokens"] += token is not None
        event = live.take(news)
        if event is not None and isinstance(event.stop_reason, str):
            self.core.finish(seq, "stop")
        self._forget_if_over(live)
        return None if live.collect else event

    def _forget_if_over(self, live: LiveRequest) -> None:
        if live.open:
            return
        del self._live[live.request.id]
        if live.request.adapter is not None:
            self.adapters.release(live.request.adapter)
        if live.collect:
            self._finished[live.request.id] = live.output

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Runs a batch of prompts to the end, in order; the next ``step`` has what other requests said meanwhile.

        Args:
          prompts: texts or lists of token ids, or one of them.
          params: one for all, or one each; by default as in ``add_request``.
          adapter: one for all, or one each; None is the base model.

        Raises:
          InvalidRequest, AdapterNotFound: naming the first bad prompt; nothing is left running.
        """
        every = as_list(prompts)
        each = spread("params", params, every, SamplingParams), spread("adapter", adapter, every, str)
        todo, ids = deque(zip(every, *each, strict=True)), []
        try:
            while todo or not all(i in self._finished for i in ids):
                while todo and self.queue_has_room(todo[0][1]):
                    prompt, param, name = todo[0]
                    try:
                        with self._turn():
                            ids.append(self.add_request(prompt, param, adapter=name))
                            self._live[ids[-1]].collect = True
                    except InvalidRequest as error:
                        if error.param != "max_queue" or (param or self.default_params).n > self.config.max_queue:
                            raise
                        break  # other threads' requests took the room
                    todo.popleft()
                self.drive()
        except BaseException:
            for request_id in ids:
                self.abort(request_id)
                self._finished.pop(request_id, None)
            raise
        return [self._finished.pop(i) for i in ids]

    def queue_has_room(self, params: SamplingParams | None = None) -> bool:
        """Whether a request need not wait to be added. An empty queue has: what does not fit there is to be refused."""
        waiting = self.core.scheduler.counts().waiting
        return waiting == 0 or waiting + (params.n if params else 1) <= self.config.max_queue

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> RequestOutput:
        """Renders messages with the model's chat template and generates one answer.

        Args:
          messages: {"role", "content", ...}; a content is text, or a list of {"type": "text", "text": ...}. Arguments
            of tool calls that are JSON in a string are shown as objects.
          tools: descriptions of functions, for templates that show them.
          chat_template_kwargs: further names for the template, as ``enable_thinking``.
          options: as of ``generate``.

        Raises:
          InvalidRequest: what is wrong with them; no chat template, or one that refuses these messages.
        """
        if self.tokenizer is None:
            raise InvalidRequest("this model directory has no tokenizer", "messages")
        require("messages", messages, Sequence, "a list of messages")
        require("tools", tools, Sequence | None, "a list of tools")
        variables = template_variables(chat_template_kwargs)
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools, **variables)
        return self.generate([ids], params, **options)[0]

    def run(self) -> list[Event]:
        """Steps until no request and no job has anything left to do; returns all events."""
        events = []
        while self.has_work():
            events += self.step()
        return events

    # numbers

    def stats(self) -> dict[str, Any]:
        """Counters and gauges, of the engine's life so far."""
        return {**self.core.stats(), **self._totals, "adapters": len(self.adapters.list())}


def _check_options(priority: Any, params: Any, **texts: Any) -> None:
    """Refuses what could not be compared or hashed in the middle of the scheduler's work."""
    require("priority", priority, Integral, "an integer")
    require("params", params, SamplingParams, "a SamplingParams")
    for name, text in texts.items():
        require(name, text, str, "a string")


def _require_lora(config: EngineConfig) -> None:
    if not config.enable_lora:
        raise AdapterError("this engine was started with enable_lora off", "enable_lora")


def _require_servable(weights: AdapterWeights, config: EngineConfig) -> None:
    """Raises AdapterError before anything is published: the name keeps the version it has."""
    if weights.rank > config.max_lora_rank:
        raise AdapterError(f"rank {weights.rank} exceeds max_lora_rank {config.max_lora_rank}", "r")


def _check_adapters(
    adapters: Mapping[str, str | Path],
    model: ModelConfig,
    config: EngineConfig,
    base_name: str,
    base_digest: bytes | None = None,
) -> None:
    """Raises what ``load_adapter`` would: a typing error should not cost a compilation."""

    def read(*args: Any, **options: Any) -> AdapterWeights:
        weights = load_peft(*args, **options)
        _require_servable(weights, config)
        return weights

    store = AdapterStore(model, config.max_cpu_loras, base_names=(base_name,), base_digest=base_digest, read=read)
    for name, path in adapters.items():
        _require_lora(config)
        store.load(name, path)


def _base_digest(model: ModelConfig, weights: bytes) -> bytes:
    """Names the base model, whatever dtype it is served in: its description and its weights."""
    described = json.dumps(dataclasses.asdict(model), sort_keys=True, default=str)
    return hashlib.sha256(described.encode() + weights).digest()
