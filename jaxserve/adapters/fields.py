"""Checks adapter_config.json key by key, from a table per method.

A key is honoured, or known not to change what a served adapter computes, or refused by name: an adapter that quietly
does something else than it was trained to do is the worst answer.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 512
MAX_ALPHA = 1e6
MAX_NAMES = 4096  # entries of one list or pattern table


@dataclass(frozen=True)
class Field:
    """Which values of one key are accepted, and how to say so."""

    accepts: Callable[[Any], bool]
    wants: str
    required: bool = False


def show(value: Any, limit: int = 80) -> str:
    """``repr`` of something untrusted, short enough for one line."""
    text = repr(value[: limit + 1] if isinstance(value, (str, list)) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def config_error(key: str, value: Any, wants: str) -> AdapterError:
    """The refusal of one key of adapter_config.json."""
    return AdapterError(f"{CONFIG_FILE}: {key} is {show(value)}, must be {wants}", key)


def check(config: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Raises AdapterError for the first key that ``fields`` does not accept or does not know, or that is missing."""
    for key, value in config.items():
        if key not in fields:
            if not _nothing(value):
                raise config_error(
                    show(key)[1:-1], value, "absent or null: the key is not known, it may change the maths"
                )
        elif not fields[key].accepts(value):
            raise config_error(key, value, fields[key].wants)
    for key, known in fields.items():
        if known.required and key not in config:
            raise AdapterError(f"{CONFIG_FILE}: {key} is missing, must be {known.wants}", key)


def _nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return is_integer(value) and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < abs(value) <= MAX_ALPHA and math.isfinite(value)


def _is_names(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and 0 < len(value) <= MAX_NAMES and all(isinstance(name, str) for name in value)


def _is_layers(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, list) and len(value) <= MAX_NAMES and all(map(is_integer, value)))


def _table_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        _nothing(value) or (isinstance(value, dict) and len(value) <= MAX_NAMES and all(map(accepts, value.values())))
    )


ANY = Field(lambda value: True, "anything")
UNUSED = Field(_nothing, "null: it is not supported")
FALSE = Field(lambda value: value is False or value is None, "false: it is not supported")
FLAG = Field(lambda value: value is None or isinstance(value, bool), "true or false")
NAMES = Field(_is_names, "a list of module names, a pattern or 'all-linear'", required=True)
SOME_NAMES = Field(lambda value: _nothing(value) or _is_names(value), "null, a list of module names or a pattern")

COMMON = {
    "peft_type": ANY,  # chose the table
    "task_type": Field(lambda value: value in (None, "CAUSAL_LM"), "'CAUSAL_LM' or null"),
    "target_modules": NAMES,
    "exclude_modules": SOME_NAMES,
    "fan_in_fan_out": FALSE,
    "modules_to_save": UNUSED,
    # where it came from
    "auto_mapping": ANY,
    "base_model_name_or_path": ANY,
    "inference_mode": ANY,
    "peft_version": ANY,
    "revision": ANY,
}

# Other initialisations take something out of the base weights as well, which an adapter alone cannot bring along.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_IN_ANY_CASE = ("gaussian", "mica")  # to PEFT


def _is_init(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _IN_ANY_CASE:
        return True
    return isinstance(value, (bool, str, type(None))) and value in _INITS


LORA = COMMON | {
    "r": Field(_is_rank, f"an integer from 1 to {MAX_RANK}", required=True),
    "lora_alpha": Field(_is_alpha, f"a number other than 0, at most {MAX_ALPHA:.0f} in size", required=True),
    "rank_pattern": Field(_table_of(_is_rank), f"a table of patterns to integers from 1 to {MAX_RANK}"),
    "alpha_pattern": Field(
        _table_of(_is_alpha), f"a table of patterns to numbers other than 0, at most {MAX_ALPHA:.0f}"
    ),
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "layers_to_transform": Field(lambda v: v is None or _is_layers(v), "null, a layer index or a list of them"),
    "layers_pattern": SOME_NAMES,
    "bias": Field(lambda value: value in ("none", None), "'none': trained biases are not supported"),
    "init_lora_weights": Field(
        _is_init,
        f"one of {_INITS}: others are not PEFT's, or change the base weights too; convert the adapter to plain LoRA "
        "when saving it",
    ),
    # other maths
    "alora_invocation_tokens": UNUSED,
    "arrow_config": UNUSED,
    "kasa_config": UNUSED,
    "layer_replication": UNUSED,
    "lora_bias": FALSE,
    "megatron_config": UNUSED,
    "monteclora_config": UNUSED,
    "target_parameters": UNUSED,
    "trainable_token_indices": UNUSED,
    "use_bdlora": UNUSED,
    "use_qalora": FALSE,
    "velora_config": UNUSED,
    # of training, or of something refused above
    "corda_config": ANY,
    "ensure_weight_tying": ANY,
    "eva_config": ANY,
    "loftq_config": ANY,
    "lora_dropout": ANY,
    "lora_ga_config": ANY,
    "megatron_core": ANY,
    "qalora_group_size": ANY,
    "runtime_config": ANY,
}

IA3 = COMMON | {
    "feedforward_modules": Field(
        lambda v: v == [] or _is_names(v), "a list of module names or a pattern", required=True
    ),
    "init_ia3_weights": ANY,
}
