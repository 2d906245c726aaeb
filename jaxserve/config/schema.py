"""A whole configuration: its sections and their defaults."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from jaxserve.config.engine import EngineConfig, EngineOptions, FinetuneOptions, LoraOptions, ModelOptions
from jaxserve.config.job import JobOptions
from jaxserve.config.runs import BenchSection, CoserveSection, SamplingSection, SweepSection
from jaxserve.config.section import Name, Place, Section, refuse_twice


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
    path: Place | None = None
    """Directory of the model; demo:storyteller comes with the package."""


class LoraSection(LoraOptions):
    modules: Annotated[
        tuple[Annotated[LoraModule, BeforeValidator(_lora_module), PlainSerializer(str)], ...], Field(strict=False)
    ] = ()
    """Adapters to load at start-up, as name=path."""

    @model_validator(mode="after")
    def _names_differ(self):
        refuse_twice([module.name for module in self.modules], "modules name")
        return self


class JobSection(JobOptions):
    adapter: Name | None = None
    """Name of the adapter that is trained."""
    data: Place | None = None
    """Training data, JSONL; demo:pirate and demo:cards come with the package."""


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
