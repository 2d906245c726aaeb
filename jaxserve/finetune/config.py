"""The settings of one finetuning job."""

import hashlib
import json
import math
from typing import Any

from pydantic import field_validator, model_validator

from jaxserve.adapters import ia3, lora
from jaxserve.adapters.patterns import Budget, Pattern, PatternError
from jaxserve.config.job import JobOptions
from jaxserve.config.section import Keywords

_IA3_TARGETS = ("k_proj", "v_proj", "down_proj")  # PEFT's own choice for decoders
_IA3_FEEDFORWARD = ("down_proj",)
# what may change while a job is stopped: nothing a loss or an adapter depends on
_HOUSEKEEPING = frozenset({"output_dir", "save_steps", "save_total_limit", "eval_steps", "validation_data", "start"})


class FinetuneConfig(Keywords, JobOptions):
    """How an adapter is trained. Frozen.

    Raises:
      ConfigError: unknown or wrong fields, all of them at once.
    """

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
