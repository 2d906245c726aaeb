"""Qwen3 (dense): no qkv bias, a norm on each head of q and k, head_dim apart from hidden_size."""

from typing import Any

from jaxserve.models.config import Fields, ModelConfig, dimensions, token_ids
from jaxserve.models.llama import SILU
from jaxserve.models.qwen2 import layers


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    fields = Fields(hf)
    sizes = dimensions(fields, head_dim=128)
    bias = fields.flag("attention_bias", False)
    config = ModelConfig(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        **sizes,
        **token_ids(fields),
        layers=layers(fields, sizes),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        activation=fields.choice("hidden_act", SILU, "silu"),
        attention_scale=sizes["head_dim"] ** -0.5,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )
    fields.refuse_unread()
    return config
