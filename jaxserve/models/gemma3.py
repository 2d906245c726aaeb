"""Gemma 3, text only: five local layers to one global, each kind with its own rope; q and k normed.

Accepts the text model and the language half of the multimodal one (``text_config``).
"""

from typing import Any

from jaxserve.errors import ModelError
from jaxserve.models.config import (
    Fields,
    LayerConfig,
    ModelConfig,
    RopeConfig,
    dimensions,
    layer_windows,
    sliding_window,
    token_ids,
)
from jaxserve.models.gemma2 import DEFAULTS, gemma
from jaxserve.models.rope import parse_rope

# the multimodal halves of a checkpoint, which a text server has no use for
IGNORED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
# the decoder's name in the multimodal model: now, before transformers 4.52, and in Gemma3ForCausalLM
MODULE_ROOTS = ("model.language_model", "language_model.model", "model")


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    fields = Fields(hf)
    return _from_text(fields, fields, "Gemma3ForCausalLM")


def from_hf_multimodal(hf: dict[str, Any]) -> ModelConfig:
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise ModelError("config.json: text_config is missing")
    outer = Fields(hf)
    config = _from_text(Fields(text, "config.json: text_config"), outer, "Gemma3ForConditionalGeneration")
    outer.refuse_unread()
    return config


def _from_text(fields: Fields, outer: Fields, architecture: str) -> ModelConfig:
    sizes = dimensions(
        fields, **DEFAULTS, vocab_size=262_208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        max_position_embeddings=131_072,
    )  # fmt: skip
    num_layers = sizes["num_layers"]
    every = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    pattern = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)]
    windows = layer_windows(fields, num_layers, sliding_window(fields), pattern)
    local, full = _ropes(fields, sizes["max_position_embeddings"])
    config = ModelConfig(
        model_type="gemma3_text",
        architecture=architecture,
        **sizes,
        **token_ids(outer, fields),
        **gemma(fields, sizes),
        layers=tuple(LayerConfig(window=window, rope=local if window else full) for window in windows),
        tie_word_embeddings=outer.flag("tie_word_embeddings", True),
        # transformers' multimodal model has no such cap, whatever its text_config says: left unread, it is refused
        logits_softcap=fields.number("final_logit_softcapping", None) if fields is outer else None,
        qk_norm=True,
        unembedded_tokens=("<image_soft_token>",),
    )
    fields.refuse_unread()
    return config


def _ropes(fields: Fields, max_position: int) -> tuple[RopeConfig, RopeConfig]:
    """The rope of local and of global layers, from the nested new form or the flat old one."""
    nested = fields.get("rope_parameters", {})
    if not isinstance(nested, dict) or not all(isinstance(value, (dict, type(None))) for value in nested.values()):
        raise ModelError(f"{fields.where}: rope_parameters must hold full_attention and sliding_attention")
    unknown = sorted(set(nested) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(f"{fields.where}: rope_parameters.{unknown[0]} is not supported for this architecture")
    scaling = fields.get("rope_scaling", {})
    if not isinstance(scaling, dict):
        raise ModelError(f"{fields.where}: rope_scaling must be an object")
    full = (nested.get("full_attention") or {}) | scaling
    local = nested.get("sliding_attention") or {}
    where = f"{fields.where}: rope_parameters"
    return (
        parse_rope(local, fields.number("rope_local_base_freq", 10_000.0), max_position, where=where),
        parse_rope(full, fields.number("rope_theta", 1_000_000.0), max_position, where=where),
    )
