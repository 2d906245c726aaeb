"""The sections for what a run sends and measures: sampling, coserve, bench and sweep."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from pydantic import BeforeValidator, Field, PlainSerializer, PositiveInt, create_model, model_validator

from jaxserve.config.job import JobOptions
from jaxserve.config.section import Name, Place, Section, refuse_twice
from jaxserve.sampling import SamplingParams


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
    """Adapters that requests are for, or base; by default base, the loaded adapters and those of the jobs, but in
    benchmarks base alone."""
    prompts: Place | None = None
    """JSONL of real prompts, {"messages"} or {"prompt"}; by default random tokens of the requested lengths."""
    burst_factor: Annotated[float, Field(ge=1)] = 1.0
    """Made-up requests come at so many times their rate in a burst; 1 has no bursts."""
    burst_seconds: Annotated[float, Field(gt=0)] = 3.0
    """Length of a burst."""
    burst_period: Annotated[float, Field(gt=0)] = 12.0
    """A burst begins every so many seconds, the first after half of them."""
    progress_seconds: Annotated[float, Field(gt=0)] = 2.0
    """Without a terminal, a line of progress every so many seconds."""
    results_dir: Place | None = None
    """Where report.html, results.json, requests.csv, steps.csv and the adapters go."""

    @model_validator(mode="after")
    def _jobs_differ(self):
        refuse_twice([job.adapter for job in self.jobs], "jobs train adapter")
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

    def params(self, default: SamplingParams | None = None) -> SamplingParams:
        """The default, by default SamplingParams', with what is given in its place."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return dataclasses.replace(default or SamplingParams(), **given)

    @model_validator(mode="after")
    def _ranges(self):
        self.params().validate(vocab_size=2**31)
        return self


class BenchSection(Section):
    trace: Place | None = None
    """CSV of arrival_s, prompt_tokens, output_tokens[, tenant], replayed from its first arrival on; by default requests
    are made up."""
    trace_speed: Annotated[float, Field(gt=0)] = 1.0
    """Replay the trace at so many times its rate."""
    trace_scaling: Literal["stretch", "thin"] = "stretch"
    """How: stretch the times between arrivals, or take a random share of the requests."""
    num_prompts: PositiveInt = 64
    """Requests to send; of a trace, its first ones."""
    request_rate: Annotated[float, Field(gt=0)] | None = None
    """Made-up requests per second; by default all come at once."""
    burstiness: Annotated[float, Field(ge=0.01, le=100)] = 1.0
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
        tuple[Annotated[str, Field(pattern=r"^(ttft|tpot|itl|e2el):[0-9]+(\.[0-9]*)?$")], ...], Field(strict=False)
    ] = ()
    """Objectives a good request meets, in ms, as ttft:500 or tpot:50."""
    against: Literal["none", "transformers", "base", "peft"] = "none"
    """Run the same side by side: requests through transformers' generate, or through the base model without adapters;
    of bench finetune, training through PEFT."""
    repeats: PositiveInt = 1
    """Runs of each side, in turn; the fastest counts."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of made-up requests and adapters."""
    result_file: Place | None = None
    """Where the numbers go as JSON."""
    save_detailed: bool = False
    """Add each request's and each step's numbers to them."""


POLICIES = (
    r"^((coserve|separate):(25|50|75)|coserve|temporal:[1-9]\d*|temporal-dynamic|spatial|(inference|finetune)-only)$"
)


class SweepSection(Section):
    """Of bench coserve and bench flexllm; of bench peers, seconds."""

    policies: Annotated[tuple[Annotated[str, Field(pattern=POLICIES)], ...], Field(strict=False, min_length=1)] = (
        "coserve", "coserve:25", "coserve:50", "coserve:75", "temporal:64", "temporal:128", "temporal:512",
        "temporal-dynamic", "separate:25", "separate:50", "separate:75", "spatial", "inference-only", "finetune-only",
    )  # fmt: skip
    """Ways to share the devices: coserve, coserve:25, :50 or :75 (so many percent of the replicas get the requests and
    co-serve, the others finetune), temporal:N (one sequence is finetuned on after every N steps of requests),
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
    processes: PositiveInt | None = None
    """Processes that simulate side by side; by default one for each processor."""
    simulate: Literal["none", "a100-80gb", "h100", "h200"] = "none"
    """Runs on a virtual clock with this device's roofline; none measures the engine here."""
    matmul_efficiency: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the device's peak that simulated matrix products reach; by default the roofline's own."""
    results_dir: Place | None = None
    """Where report.html, results.json, requests.csv and steps.csv go."""
