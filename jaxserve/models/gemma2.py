"""Gemma 2: soft caps, norms before and after each block, every other layer local, scaled embeddings."""

from typing import Any

from jaxserve.models.config import (
    Fields,
    LayerConfig,
    ModelConfig,
    dimensions,
    layer_windows,
    sliding_window,
    token_ids,
)
from jaxserve.models.llama import NAMES as LLAMA_NAMES
from jaxserve.models.rope import read_rope

NAMES = LLAMA_NAMES | {
    "post_attn_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}

GELU = {"gelu_pytorch_tanh": "gelu_tanh"}

DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    fields = Fields(hf)
    sizes = dimensions(fields, **DEFAULTS, vocab_size=256_000, max_position_embeddings=8192)
    pattern = ["full_attention" if i % 2 else "sliding_attention" for i in range(sizes["num_layers"])]
    windows = layer_windows(fields, sizes["num_layers"], sliding_window(fields), pattern)
    rope = read_rope(fields, sizes["max_position_embeddings"])
    config = ModelConfig(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        **sizes,
        **token_ids(fields),
        **gemma(fields, sizes),
        layers=tuple(LayerConfig(window=window, rope=rope) for window in windows),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        # transformers' defaults hold where the key is absent; null switches a cap off
        attention_softcap=fields.number("attn_logit_softcapping", None if "attn_logit_softcapping" in hf else 50.0),
        logits_softcap=fields.number("final_logit_softcapping", None if "final_logit_softcapping" in hf else 30.0),
    )
    fields.refuse_unread()
    return config


def gemma(fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    bias = fields.flag("attention_bias", False)
    return {
        "activation": fields.choice("hidden_activation", GELU, "gelu_pytorch_tanh"),
        "attention_scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "embedding_scale": sizes["hidden_size"] ** 0.5,
        "norm_offset": 1.0,
        "post_norms": True,
        "qkv_bias": bias,
        "o_bias": bias,
    }
