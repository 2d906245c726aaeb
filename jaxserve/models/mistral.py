"""Mistral 7B and its kin: Llama with one sliding window for all layers, or none."""

from typing import Any

from jaxserve.models.config import Fields, LayerConfig, ModelConfig, dimensions, sliding_window, token_ids
from jaxserve.models.llama import SILU
from jaxserve.models.rope import read_rope


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    fields = Fields(hf)
    sizes = dimensions(fields)
    layer = LayerConfig(window=sliding_window(fields), rope=read_rope(fields, sizes["max_position_embeddings"]))
    config = ModelConfig(
        model_type="mistral",
        architecture="MistralForCausalLM",
        **sizes,
        **token_ids(fields),
        layers=(layer,) * sizes["num_layers"],
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        activation=fields.choice("hidden_act", SILU, "silu"),
        attention_scale=sizes["head_dim"] ** -0.5,
    )
    fields.refuse_unread()
    return config
