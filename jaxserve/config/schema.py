"""The sections of a configuration and their defaults; ``EngineConfig`` is what the engine takes."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

from jaxserve.config.messages import problems
from jaxserve.errors import ConfigError
from jaxserve.sampling import SamplingParams


class Section(BaseModel):
    """Frozen; unknown keys, lax conversions ("16" for 16) and non-finite numbers are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Keywords(Section):
    """Taken as keyword arguments.

    Raises:
      ConfigError: unknown or wrong fields, all of them at once.
    """

    def __init__(self, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError([p.line() for p in problems(error, type(self))]) from None


class ModelOptions(Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of weights, activations and KV pages; auto is the checkpoint's own."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights made from config.json alone."""
    tokenizer: str | None = None
    """Directory of the tokenizer; by default the model's."""
    max_model_len: PositiveInt | None = None
    """Most tokens of prompt and output together; by default what the model was made for."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of dummy weights and of requests that bring none."""


class EngineOptions(Section):
    max_num_seqs: PositiveInt = 64
    """Most sequences that run at once."""
    max_num_batched_tokens: PositiveInt = 2048
    """Most rows of one step, prompt chunks and decodes together."""
    block_size: Annotated[int, Field(ge=1, le=1024)] = 64
    """Tokens per KV page."""
    num_kv_pages: PositiveInt | None = None
    """KV pages; by default what gpu_memory_utilization leaves room for."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of the device's memory that weights, adapters and KV pages may take."""
    enable_prefix_caching: bool = True
    """Reuse the KV pages of a prompt's known beginning."""
    enable_chunked_prefill: bool = True
    """Split long prompts over several steps."""
    scheduling_policy: Literal["fcfs", "priority", "fair"] = "fcfs"
    """Order of the waiting requests: as they come, smallest priority first, or the tenant first who got least."""
    tensor_parallel: PositiveInt = 1
    """Devices that share each matrix."""
    max_logprobs: Annotated[int, Field(ge=0, le=128)] = 20
    """Most log-probabilities a request may ask for per token."""
    max_queue: PositiveInt = 1024
    """Most requests that wait; more are refused."""

    @model_validator(mode="after")
    def _every_sequence_gets_a_row(self):
        if self.max_num_batched_tokens < self.max_num_seqs:
            rows, sequences = self.max_num_batched_tokens, self.max_num_seqs
            raise ValueError(f"max_num_batched_tokens {rows} is below max_num_seqs {sequences}")
        return self


class LoraOptions(Section):
    enable_lora: bool = True
    """Keep room for adapters beside the base model."""
    max_loras: PositiveInt = 8
    """Adapters on the device at once."""
    max_lora_rank: Annotated[int, Field(ge=1, le=512)] = 64
    """Largest rank of an adapter."""
    max_cpu_loras: PositiveInt = 256
    """Adapters in host memory at once."""

    @model_validator(mode="after")
    def _host_holds_what_the_device_holds(self):
        if self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras {self.max_cpu_loras} is below max_loras {self.max_loras}")
        return self


class SloClass(NamedTuple):
    """What a class of requests is promised."""

    name: str
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __str__(self) -> str:
        promises = {"ttft": self.ttft_ms, "tpot": self.tpot_ms}
        return f"{self.name}=" + ",".join(f"{key}:{value:g}" for key, value in promises.items() if value is not None)


def _slo_class(value: Any) -> Any:
    """``name=ttft:500,tpot:50`` to an SloClass."""
    if not isinstance(value, str):
        return value
    name, _, promises = value.partition("=")
    found: dict[str, float] = {}
    for promise in promises.split(","):
        key, _, number = promise.partition(":")
        if (
            key not in ("ttft", "tpot")
            or key in found
            or not number.replace(".", "", 1).isdecimal()
            or not float(number)
        ):
            raise ValueError("a class is written name=ttft:500,tpot:50, in ms, one of the two or both")
        found[key] = float(number)
    if not name:
        raise ValueError("a class has a name before its =")
    return SloClass(name, found.get("ttft"), found.get("tpot"))


def _once(names: Sequence[str], said: str) -> None:
    """Raises ValueError, "{said} 'name' twice", where a name comes twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{said} {twice[0]!r} twice")


class FinetuneOptions(Section):
    max_finetune_jobs: Annotated[int, Field(ge=0, le=64)] = 0
    """Jobs that train at once, prepared for at start-up; 0 prepares for one job when the first one comes."""
    finetune_window: Annotated[int, Field(ge=16, le=1 << 16)] = 256
    """Most gradient rows of a step: tokens whose backward runs in it."""
    finetune_remat: Literal["none", "elementwise", "attention", "full"] | None = None
    """Without a stash, what a backward computes again rather than keeps: nothing; what lies between matrix products,
    which is the default; all but attention; or all. Keeping more takes more memory for each gradient row."""
    finetune_stash_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens whose activations may wait on the device for their backward: examples, of at most so many tokens, run
    forward once, and no product is computed again. 0 keeps none: windows of long examples run forward twice, which
    takes less memory. Unless finetune_remat is given, the default is room for two examples of full length, or for one,
    where a quarter of the memory that weights leave holds it; on an accelerator only if max_finetune_jobs asks for
    jobs."""
    tpot_objective_ms: Annotated[float, Field(gt=0)] | None = None
    """Mean time per output token that finetuning, and others' prompts, must leave to running requests; none lets them
    take all they can."""
    ttft_objective_ms: Annotated[float, Field(gt=0)] | None = None
    """Time to the first token that finetuning must leave to requests that come or wait."""
    slo_classes: Annotated[
        tuple[Annotated[SloClass, BeforeValidator(_slo_class), PlainSerializer(str)], ...], Field(strict=False)
    ] = ()
    """Both for requests that name a class, as name=ttft:500,tpot:50."""
    finetune_floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the device's time that finetuning gets whatever the objectives say."""

    @model_validator(mode="after")
    def _one_way_to_keep(self):
        if self.finetune_stash_tokens and self.finetune_remat is not None:
            raise ValueError(
                f"finetune_remat {self.finetune_remat!r} is for windows without a stash; finetune_stash_tokens is "
                f"{self.finetune_stash_tokens}, it must be 0 or left out"
            )
        return self

    @model_validator(mode="after")
    def _classes_differ(self):
        _once([each.name for each in self.slo_classes], "slo_classes name")
        return self


Name = Annotated[str, Field(min_length=1)]
Names = tuple[Name, ...]
Share = Annotated[float, Field(ge=0, lt=1)]


class JobOptions(Section):
    """The settings of a finetuning job; ``finetune.config`` says which of them agree with each other."""

    method: Literal["lora", "rslora", "dora", "ia3"] = "lora"
    """PEFT method."""
    rank: Annotated[int, Field(ge=1, le=256)] = 16
    """Rank of every module's update; ia3 has none."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    """The update is scaled by alpha / rank, in rslora by alpha / sqrt(rank)."""
    target_modules: Name | Annotated[Names, Field(strict=False, min_length=1, max_length=4096)] | None = None
    """Module names, a pattern or all-linear; by default all-linear, and k_proj, v_proj, down_proj for ia3."""
    feedforward_modules: Name | Annotated[Names, Field(strict=False, max_length=4096)] | None = None
    """Of ia3: modules whose input is scaled, not their output; by default down_proj where it is a target."""
    dropout: Share = 0.0
    """Share of an update's inputs dropped while training."""

    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    """Update rule."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Peak of the schedule."""
    beta1: Share = 0.9
    """Of adamw, adam and lion."""
    beta2: Share | None = None
    """Of adamw and adam, by default 0.999, and of lion, by default 0.99."""
    eps: Annotated[float, Field(gt=0, le=1)] | None = None
    """Added to a denominator: by default 1e-8, and 1e-30 for adafactor."""
    momentum: Share = 0.9
    """Of sgd."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the adapter taken off per step, times the learning rate; decoupled from the gradient."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the adapter's whole gradient; none does not clip."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: kept, or brought down to zero at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the learning rate rises from zero."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a share of all steps."""

    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Examples per optimizer step."""
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Passes over the data, by default one."""
    max_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Optimizer steps, in place of epochs."""
    window: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """Tokens that one backward pass covers; by default the engine's most."""
    remat: Literal["none", "elementwise", "attention", "full"] | None = None
    """What a backward pass computes again rather than keep: what the engine's steps do, which all jobs share."""
    deterministic: bool = False
    """Cut windows by the example alone, so that load or a restart changes no bit."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapter's start, the order of the data, the validation split and dropout."""

    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that are learnt: the assistant's (the completion), or all."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Most tokens of an example; by default what the engine takes."""
    on_long: Literal["refuse", "truncate"] = "refuse"
    """What is done with a longer example; what is cut is counted and reported."""
    shuffle: bool = True
    """Another order of the data in every epoch."""
    packing: bool = True
    """Put several short examples into one window."""
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the data kept from training, to measure the loss on."""
    validation_data: str | None = None
    """A file for that in its place."""
    eval_steps: PositiveInt | None = None
    """Measure every so many steps; by default after each epoch."""

    output_dir: str | None = None
    """Where checkpoints go; none keeps none."""
    save_steps: PositiveInt = 100
    """A checkpoint every so many steps, and one at the end."""
    save_total_limit: PositiveInt = 2
    """Newest checkpoints that are kept."""
    start: Annotated[str, Field(min_length=1)] = "init"
    """init for a new adapter, or the name or directory of one to go on from, or a directory of checkpoints."""


class EngineConfig(Keywords, ModelOptions, EngineOptions, LoraOptions, FinetuneOptions):
    """Keyword arguments of ``Engine.from_pretrained``.

    Raises:
      ConfigError: unknown or wrong fields, all of them at once.
    """


class LoraModule(NamedTuple):
    """An adapter to load at start-up."""

    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name}={self.path}"


def _lora_module(value: Any) -> Any:
    """``name=path``, or vLLM's JSON object {"name": ..., "path": ...}, to a LoraModule."""
    if not isinstance(value, str):
        return value
    if value.startswith("{"):
        fields = json.loads(value)
        name, path = fields.get("name"), fields.get("path")
    else:
        name, _, path = value.partition("=")
    if not (isinstance(name, str) and isinstance(path, str) and name and path) or "=" in name:
        raise ValueError("an adapter is written name=path")
    return LoraModule(name, path)


class ModelSection(ModelOptions):
    path: str | None = None
    """Directory of the model; demo:storyteller comes with the package."""


class LoraSection(LoraOptions):
    modules: Annotated[
        tuple[Annotated[LoraModule, BeforeValidator(_lora_module), PlainSerializer(str)], ...], Field(strict=False)
    ] = ()
    """Adapters to load at start-up, as name=path."""

    @model_validator(mode="after")
    def _names_differ(self):
        _once([module.name for module in self.modules], "modules name")
        return self


class JobSection(JobOptions):
    adapter: Name | None = None
    """Name of the adapter that is trained."""
    data: Name | None = None
    """Training data, JSONL; demo:pirate and demo:cards come with the package."""


class JobEntry(NamedTuple):
    """A job to run: an adapter, its data, and where it differs from section job."""

    adapter: str
    data: str
    settings: dict[str, Any]


def _job_entry(value: Any) -> Any:
    """``adapter=data``, or an object {"adapter": ..., "data": ..., and keys of section job}, to a JobEntry."""
    if isinstance(value, JobEntry):
        return value
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    if isinstance(value, str):
        adapter, _, data = value.partition("=")
        value = {"adapter": adapter, "data": data}
    if not isinstance(value, Mapping) or not all(_is_name(value.get(key)) for key in ("adapter", "data")):
        raise ValueError("a job is written adapter=data, or as an object with adapter and data")
    settings = {key: setting for key, setting in value.items() if key not in ("adapter", "data")}
    unknown = [key for key in settings if key not in JobOptions.model_fields]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in the job of adapter {value['adapter']!r}")
    return JobEntry(value["adapter"], value["data"], settings)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _plain_job_entry(entry: JobEntry) -> Any:
    """The shortest way to write it."""
    if not entry.settings:
        return f"{entry.adapter}={entry.data}"
    return {"adapter": entry.adapter, "data": entry.data, **entry.settings}


class CoserveSection(Section):
    jobs: Annotated[
        tuple[Annotated[JobEntry, BeforeValidator(_job_entry), PlainSerializer(_plain_job_entry)], ...],
        Field(strict=False),
    ] = ()
    """Jobs that run beside the requests, as adapter=data, or as an object that may change settings of section job."""
    answer_with: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Adapters that requests are for, or base; by default base, the loaded adapters and those of the jobs."""
    prompts: str | None = None
    """JSONL of real prompts, {"messages"} or {"prompt"}; by default random tokens of the requested lengths."""
    burst_factor: Annotated[float, Field(ge=1)] = 1.0
    """Made-up requests come at so many times their rate in a burst; 1 has no bursts."""
    burst_seconds: Annotated[float, Field(gt=0)] = 3.0
    """Length of a burst."""
    burst_period: Annotated[float, Field(gt=0)] = 12.0
    """A burst begins every so many seconds, the first after half of them."""
    progress_seconds: Annotated[float, Field(gt=0)] = 2.0
    """Without a terminal, a line of progress every so many seconds."""
    results_dir: str | None = None
    """Where report.html, results.json, requests.csv, steps.csv and the adapters go."""

    @model_validator(mode="after")
    def _jobs_differ(self):
        _once([job.adapter for job in self.jobs], "jobs train adapter")
        if self.burst_factor > 1 and self.burst_seconds > self.burst_period:
            raise ValueError(f"burst_seconds {self.burst_seconds:g} exceeds burst_period {self.burst_period:g}")
        return self


_SAMPLING_TYPES = get_type_hints(SamplingParams)
_SAMPLING_HELP = {
    "max_tokens": "Most tokens of an answer; none is up to the model's length.",
    "temperature": "0 always takes the likeliest token.",
    "top_k": "Draw from so many of the likeliest tokens; 0 is all.",
    "top_p": "Draw from the likeliest tokens that make up this share.",
    "min_p": "Draw from tokens at least this likely, relative to the likeliest.",
    "repetition_penalty": "Divides the logits of tokens seen before; 1 is off.",
    "presence_penalty": "Taken from the logits of tokens of the answer.",
    "frequency_penalty": "The same, once for each time.",
    "logit_bias": "Token id to what is added to its logit.",
    "seed": "The same seed gives the same tokens.",
    "n": "Answers per prompt.",
    "stop": "Text that ends an answer, or a list of texts.",
    "stop_token_ids": "Tokens that end an answer.",
    "min_tokens": "No end before so many tokens.",
    "ignore_eos": "Go on after the model's end token.",
    "logprobs": "Log-probabilities of so many likeliest tokens, per token.",
    "prompt_logprobs": "The same for the prompt.",
    "include_stop_str_in_output": "Keep the text that ended the answer.",
    "skip_special_tokens": "Leave control tokens out of the text.",
}
_SAMPLING_FIELDS: dict[str, Any] = {
    field.name: (_SAMPLING_TYPES[field.name], Field(field.default, description=_SAMPLING_HELP[field.name]))
    for field in dataclasses.fields(SamplingParams)
}


class SamplingSection(create_model("_SamplingFields", __base__=Section, **_SAMPLING_FIELDS)):
    """The fields of SamplingParams: what requests of the command line ask for."""

    def params(self) -> SamplingParams:
        return SamplingParams(**dict(self))

    @model_validator(mode="after")
    def _ranges(self):
        self.params().validate(vocab_size=2**31)
        return self


class BenchSection(Section):
    trace: str | None = None
    """CSV of arrival_s, prompt_tokens, output_tokens[, tenant]; by default requests are made up."""
    trace_speed: Annotated[float, Field(gt=0)] = 1.0
    """Replay the trace at so many times its rate."""
    trace_scaling: Literal["stretch", "thin"] = "stretch"
    """How: stretch the times between arrivals, or take a random share of the requests."""
    num_prompts: PositiveInt = 64
    """Requests to send; of a trace, its first ones."""
    request_rate: Annotated[float, Field(gt=0)] | None = None
    """Made-up requests per second; by default all come at once."""
    burstiness: Annotated[float, Field(gt=0)] = 1.0
    """Shape of the gamma distribution of made-up gaps; 1 is Poisson, less is burstier."""
    random_input_len: PositiveInt = 128
    """Mean prompt tokens of a made-up request."""
    random_output_len: PositiveInt = 64
    """Mean output tokens of a made-up request."""
    random_range_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Made-up lengths are uniform within this share around their mean."""
    shared_prefix_len: Annotated[int, Field(ge=0)] = 0
    """First tokens that all prompts of a tenant have in common."""
    max_concurrency: PositiveInt | None = None
    """Most requests in flight."""
    num_adapters: Annotated[int, Field(ge=0)] = 0
    """Random adapters made for the run."""
    adapter_rank: PositiveInt = 16
    """Their rank."""
    finetune_examples: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    """Of bench finetune: examples that are trained on, once each."""
    finetune_batch: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Examples per optimizer step."""
    finetune_shortest: Annotated[int, Field(ge=2)] = 64
    """Tokens of the shortest example."""
    finetune_longest: Annotated[int, Field(ge=2)] = 512
    """Tokens of the longest one; never more than max_model_len."""
    adapter_targets: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """The linear layers they change, by short name (q_proj, down_proj, ...); by default all."""
    lora_assignment: Literal["round-robin", "random", "tenant"] = "round-robin"
    """Who gets which adapter: in turn, at random, or one for each tenant."""
    goodput: Annotated[
        tuple[Annotated[str, Field(pattern=r"^(ttft|tpot|itl|e2el):[0-9.]+$")], ...], Field(strict=False)
    ] = ()
    """Objectives a good request meets, in ms, as ttft:500 or tpot:50."""
    against: Literal["none", "transformers", "base", "peft"] = "none"
    """Run the same requests side by side through transformers' generate, or through the base model without adapters."""
    repeats: PositiveInt = 1
    """Runs of each side, in turn; the fastest counts."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of made-up requests and adapters."""
    result_file: str | None = None
    """Where the numbers go as JSON."""
    save_detailed: bool = False
    """Add each request's and each step's numbers to them."""


POLICIES = r"^(coserve|temporal:[1-9]\d*|temporal-dynamic|separate:(25|50|75)|spatial|inference-only|finetune-only)$"


class SweepSection(Section):
    """Of bench coserve and bench flexllm; of bench peers, seconds."""

    policies: Annotated[tuple[Annotated[str, Field(pattern=POLICIES)], ...], Field(strict=False, min_length=1)] = (
        "coserve", "temporal:64", "temporal:128", "temporal:512", "temporal-dynamic", "separate:25", "separate:50",
        "separate:75", "spatial", "inference-only", "finetune-only",
    )  # fmt: skip
    """Ways to share the devices: coserve, temporal:N (one sequence is finetuned on after every N steps of requests),
    temporal-dynamic (only when there are no requests), separate:25, :50 or :75 (so many percent of the replicas serve,
    the others finetune), spatial (two processes on each device), inference-only, finetune-only."""
    rates: Annotated[
        tuple[Annotated[float, Field(gt=0, strict=False)], ...], Field(strict=False, min_length=1)
    ] = (1.0, 2.0, 3.0, 4.0, 5.0)  # fmt: skip
    """Requests per second and replica."""
    seconds: Annotated[float, Field(gt=0)] = 60.0
    """Length of a run: requests come, and finetune tokens count, for so long."""
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    """Simulated replicas; requests go to them in turn."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Processes that simulate side by side; by default one for each processor."""
    simulate: Literal["none", "a100-80gb", "h100", "h200"] = "none"
    """Runs on a virtual clock with this device's roofline; none measures the engine here."""
    matmul_efficiency: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the device's peak that simulated matrix products reach; by default the roofline's own."""
    results_dir: str | None = None
    """Where report.html, results.json, requests.csv and steps.csv go."""


class Config(Section):
    """A whole run. The sections are the top-level keys of a file."""

    model: ModelSection = ModelSection()
    engine: EngineOptions = EngineOptions()
    lora: LoraSection = LoraSection()
    finetune: FinetuneOptions = FinetuneOptions()
    job: JobSection = JobSection()
    coserve: CoserveSection = CoserveSection()
    sampling: SamplingSection = SamplingSection()
    bench: BenchSection = BenchSection()
    sweep: SweepSection = SweepSection()

    def engine_config(self) -> EngineConfig:
        """The part that ``Engine.from_pretrained`` takes."""
        merged: Mapping[str, Any] = {**dict(self.model), **dict(self.engine), **dict(self.lora), **dict(self.finetune)}
        return EngineConfig(**{name: merged[name] for name in EngineConfig.model_fields})
