"""Qwen2 and Qwen2.5: biases on q, k and v; the last layers may use a sliding window."""

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
from jaxserve.models.llama import SILU
from jaxserve.models.rope import read_rope


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    fields = Fields(hf)
    sizes = dimensions(fields)
    config = ModelConfig(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        **sizes,
        **token_ids(fields),
        layers=layers(fields, sizes),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        activation=fields.choice("hidden_act", SILU, "silu"),
        attention_scale=sizes["head_dim"] ** -0.5,
        qkv_bias=True,
    )
    fields.refuse_unread()
    return config


def layers(fields: Fields, sizes: dict[str, Any]) -> tuple[LayerConfig, ...]:
    """Layers from max_window_layers on slide when use_sliding_window is set; layer_types overrides the pattern."""
    num_layers = sizes["num_layers"]
    window = sliding_window(fields)
    if not fields.flag("use_sliding_window", False):
        window = None
    first = fields.integer("max_window_layers", 28, low=0)
    pattern = [
        "sliding_attention" if window is not None and i >= first else "full_attention" for i in range(num_layers)
    ]
    rope = read_rope(fields, sizes["max_position_embeddings"])
    windows = layer_windows(fields, num_layers, window, pattern)
    return tuple(LayerConfig(window=window, rope=rope) for window in windows)
