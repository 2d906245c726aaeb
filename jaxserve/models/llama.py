"""Llama 2, 3, 3.1, 3.2; also the names and the plain shape that other families start from."""

from typing import Any

from jaxserve.models.config import Fields, LayerConfig, ModelConfig, dimensions, token_ids
from jaxserve.models.rope import read_rope

# our parameter | Hugging Face's tensor; the rows below final_norm repeat under model.layers.<i>.
NAMES = {
    "embed": "model.embed_tokens.weight",
    "lm_head": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "input_norm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}

SILU = {"silu": "silu", "swish": "silu"}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    fields = Fields(hf)
    sizes = dimensions(fields)
    rope = read_rope(fields, sizes["max_position_embeddings"])
    bias = fields.flag("attention_bias", False)
    config = ModelConfig(
        model_type="llama",
        architecture="LlamaForCausalLM",
        **sizes,
        **token_ids(fields),
        layers=(LayerConfig(window=None, rope=rope),) * sizes["num_layers"],
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        activation=fields.choice("hidden_act", SILU, "silu"),
        attention_scale=sizes["head_dim"] ** -0.5,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
    fields.refuse_unread()
    return config
