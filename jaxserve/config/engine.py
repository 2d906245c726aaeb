"""The options of an engine; ``EngineConfig`` is what it takes."""

from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PlainSerializer, PositiveInt, model_validator

from jaxserve.config.section import Keywords, Name, Place, Section, refuse_twice


class ModelOptions(Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of weights, activations and KV pages; auto is the checkpoint's own."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights made from config.json alone."""
    tokenizer: Place | None = None
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
    """Devices that share each matrix. A CPU is split into as many, which share its cores."""
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

    name: Name
    ttft_ms: Annotated[float, Field(gt=0)] | None = None
    tpot_ms: Annotated[float, Field(gt=0)] | None = None

    def __str__(self) -> str:
        promises = {"ttft": self.ttft_ms, "tpot": self.tpot_ms}
        return f"{self.name}=" + ",".join(
            f"{key}:{_plain(value)}" for key, value in promises.items() if value is not None
        )


def _plain(number: float) -> str:
    """All of its digits, without an exponent."""
    return f"{Decimal(repr(number)).normalize():f}"


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
        refuse_twice([each.name for each in self.slo_classes], "slo_classes name")
        return self


class EngineConfig(Keywords, ModelOptions, EngineOptions, LoraOptions, FinetuneOptions):
    """Keyword arguments of ``Engine.from_pretrained``.

    Raises:
      ConfigError: unknown or wrong fields, all of them at once.
    """
