"""The settings of one finetuning job."""

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from jaxserve.adapters import ia3, lora
from jaxserve.adapters.fields import MAX_ALPHA, MAX_RANK
from jaxserve.adapters.patterns import Budget, Pattern, PatternError
from jaxserve.config.messages import problems
from jaxserve.config.schema import Section
from jaxserve.errors import ConfigError

Name = Annotated[str, Field(min_length=1)]
Names = tuple[Name, ...]
Share = Annotated[float, Field(ge=0, lt=1)]

_IA3_TARGETS = ("k_proj", "v_proj", "down_proj")  # PEFT's own choice for decoders
_IA3_FEEDFORWARD = ("down_proj",)
# what may change while a job is stopped: nothing a loss or an adapter depends on
_HOUSEKEEPING = frozenset({"output_dir", "save_steps", "save_total_limit", "eval_steps", "validation_data", "start"})


class FinetuneConfig(Section):
    """How an adapter is trained. Frozen.

    Raises:
      ConfigError: unknown or wrong fields, all of them at once.
    """

    method: Literal["lora", "rslora", "dora", "ia3"] = "lora"
    """PEFT method."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 16
    """Rank of every module's update; ia3 has none."""
    alpha: Annotated[float, Field(gt=0, le=MAX_ALPHA)] = 32.0
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
    remat: Literal["none", "attention", "full"] | None = None
    """What a backward pass computes again rather than keep: what the engine's steps do, which all jobs share."""
    deterministic: bool = False
    """Cut windows by the example alone, so that load or a restart changes no bit."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapter's start, the order of the data, the validation split and dropout."""

    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that are learnt: the assistant's (the completion), or all."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Most tokens of an example; by default the model's."""
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

    def __init__(self, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError([p.line() for p in problems(error, type(self))]) from None

    @field_validator("target_modules", "feedforward_modules")
    @classmethod
    def _is_a_pattern(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                Pattern(value, Budget())
            except PatternError as error:
                raise ValueError(f"not a pattern: {error}") from None
        return value

    @model_validator(mode="after")
    def _fields_agree(self):
        wrong = [text for holds, text in self._disagreements() if holds]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _disagreements(self) -> list[tuple[bool, str]]:
        targets, inputs = self.target_modules, self.feedforward_modules
        outside = isinstance(targets, tuple) and isinstance(inputs, tuple) and not set(inputs) <= set(targets)
        return [
            (self.epochs is not None and self.max_steps is not None, _both("epochs", "max_steps")),
            (self.warmup_steps is not None and self.warmup_ratio is not None, _both("warmup_steps", "warmup_ratio")),
            (
                self.validation_fraction > 0 and self.validation_data is not None,
                _both("validation_fraction", "validation_data"),
            ),
            (
                self.optimizer == "adam" and self.weight_decay > 0,
                f"weight_decay {self.weight_decay} with optimizer adam, use adamw",
            ),
            (self.method == "ia3" and self.dropout > 0, f"dropout {self.dropout} with method ia3, which has none"),
            (self.method != "ia3" and inputs is not None, f"feedforward_modules with method {self.method}, ia3 alone"),
            (outside, f"feedforward_modules {inputs} are not among target_modules {targets}"),
        ]

    def total_steps(self, num_examples: int) -> int:
        """Optimizer steps of the whole job; the last batch of an epoch may be smaller."""
        return self.max_steps or (self.epochs or 1) * math.ceil(num_examples / self.batch_size)

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps over which the learning rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(total_steps * (self.warmup_ratio or 0.0))

    def adapter_config(self) -> dict[str, Any]:
        """The adapter_config.json of the adapter that is trained."""
        if self.method == "ia3":
            return self._ia3_config()
        targets = self.target_modules or "all-linear"
        return lora.new_config(
            rank=self.rank,
            alpha=int(self.alpha) if self.alpha.is_integer() else self.alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_rslora=self.method == "rslora",
            use_dora=self.method == "dora",
            lora_dropout=self.dropout,
        )

    def _ia3_config(self) -> dict[str, Any]:
        targets, inputs = self.target_modules or _IA3_TARGETS, self.feedforward_modules
        if inputs is None:
            inputs = _IA3_FEEDFORWARD if isinstance(targets, str) else tuple(set(targets) & set(_IA3_FEEDFORWARD))
        return ia3.new_config(
            target_modules=targets if isinstance(targets, str) else list(targets),
            feedforward_modules=inputs if isinstance(inputs, str) else list(inputs),
        )

    def digest(self) -> str:
        """sha256 (hex) of every field that losses or the adapter depend on: a job is resumed under an equal one."""
        fields = self.model_dump(mode="json", exclude=set(_HOUSEKEEPING))
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _both(one: str, other: str) -> str:
    return f"{one} and {other} exclude each other"
