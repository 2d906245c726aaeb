"""The decoder, written once for all families, with open slots for what an engine adds.

The functions see the shard they run on: inside ``shard_map`` weights, heads and ffn are local. ``linear`` adds
biases, adapters and the sum over shards; ``attend`` reads and writes keys and values; ``lookup`` reads the
vocabulary-split embedding; ``gate_up`` is there for an engine that does more than these between gate_up_proj and
down_proj. The ``plain_*`` slots are the whole model on one device: dense causal attention over one sequence.

Shapes: T packed tokens, S context, R rows, D hidden, I in, O out, V vocab, H query heads, K kv heads, C head dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxserve.models.config import LayerConfig, ModelConfig, RopeConfig, member_dims
from jaxserve.models.layers import accumulator, rms_norm, soft_cap
from jaxserve.models.params import BIASES, SITES
from jaxserve.models.rope import cos_sin, rotate
from pallas_kernels.gating import gated
from pallas_kernels.numerics import apart, matmul

__all__ = [
    "BIASES", "COLUMN", "ROW", "SITES", "forward", "head_name", "layer", "logits", "member_dims",
    "plain_attend", "plain_linear", "plain_lookup", "rotary",
]  # fmt: skip

COLUMN = frozenset({"qkv_proj", "gate_up_proj"})  # sites split over their outputs
ROW = frozenset({"o_proj", "down_proj"})  # sites split over their inputs: their outputs are partial sums


def rotary(
    config: ModelConfig, layer: LayerConfig, position_T: jax.Array, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, [T, C] each, of a layer's rope at these positions.

    On a CPU they are computed here and once: XLA would compute them anew for each head of each layer.
    """
    one = (position_T[0] > -2).astype(jnp.int32)  # all positions are; that only the run knows
    cos_TC, sin_TC = apart(jnp.stack(cos_sin(layer.rope, config.head_dim, position_T, dtype)), one)
    return cos_TC, sin_TC


def layer(
    p: dict[str, jax.Array],
    x_TD: jax.Array,
    *,
    config: ModelConfig,
    layer: LayerConfig,
    rope: tuple[jax.Array, jax.Array],
    linear: Callable,
    attend: Callable,
    kv: Any,
    gate_up: Callable | None = None,
) -> tuple[jax.Array, Any]:
    """One decoder layer. ``kv`` is whatever ``attend`` keeps for this layer; returns the new x and kv.

    Args:
      gate_up: ``(p, x_TD) -> act_TF``; by default ``linear`` and the gate.
    """
    h_TD = rms_norm(x_TD, p["input_norm"], config)
    q_THC, k_TKC, v_TKC = _qkv(p, h_TD, config, rope, linear)
    o_THC, kv = attend(q_THC, k_TKC, v_TKC, kv, layer)
    h_TD = linear("o_proj", p, o_THC.reshape(o_THC.shape[0], -1))
    if config.post_norms:
        h_TD = rms_norm(h_TD, p["post_attn_norm"], config)
    x_TD = x_TD + h_TD
    h_TD = rms_norm(x_TD, p["ffn_norm"], config)
    act_TF = gated(linear("gate_up_proj", p, h_TD), config.activation) if gate_up is None else gate_up(p, h_TD)
    h_TD = linear("down_proj", p, act_TF)
    if config.post_norms:
        h_TD = rms_norm(h_TD, p["post_ffn_norm"], config)
    return x_TD + h_TD, kv


def _qkv(p, h_TD, config: ModelConfig, rope, linear: Callable) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects, splits into this shard's heads, norms and rotates."""
    C = config.head_dim
    y_TO = linear("qkv_proj", p, h_TD)
    num_heads = p["o_proj"].shape[1] // C
    num_kv_heads = (y_TO.shape[1] // C - num_heads) // 2
    y = y_TO.reshape(y_TO.shape[0], -1, C)
    q_THC, k_TKC, _ = jnp.split(y, (num_heads, num_heads + num_kv_heads), axis=1)
    v_TKC = y_TO[:, (num_heads + num_kv_heads) * C :].reshape(k_TKC.shape)  # no copy where v is written by itself
    if config.qk_norm:
        q_THC, k_TKC = rms_norm(q_THC, p["q_norm"], config), rms_norm(k_TKC, p["k_norm"], config)
    return rotate(q_THC, *rope), rotate(k_TKC, *rope), v_TKC


def forward(
    params: dict[str, Any],
    token_T: jax.Array,
    position_T: jax.Array,
    *,
    config: ModelConfig,
    lookup: Callable,
    linear: Callable,
    attend: Callable,
    kv: list,
    gate_up: Callable | None = None,
    wrap: Callable[[Callable], Callable] = lambda step: step,
) -> tuple[jax.Array, list]:
    """Token ids to the residual stream after the final norm, [T, D].

    Args:
      kv: one entry per layer, handed to ``attend`` and returned as it leaves it.
      wrap: applied to the ``(p, x_TD, kv) -> (x_TD, kv)`` of each kind of layer, once for all layers of that kind: with
        ``jax.jit`` each kind is traced and lowered once, however many layers there are.
    """
    x_TD = lookup(params["embed"], token_T)
    if config.embedding_scale != 1.0:
        x_TD = x_TD * jnp.asarray(config.embedding_scale, x_TD.dtype)
    ropes: dict[RopeConfig, tuple[jax.Array, jax.Array]] = {}
    steps: dict[LayerConfig, Callable] = {}
    new_kv = []
    for p, layer_config, layer_kv in zip(params["layers"], config.layers, kv, strict=True):
        if layer_config.rope not in ropes:
            ropes[layer_config.rope] = rotary(config, layer_config, position_T, x_TD.dtype)
        if layer_config not in steps:
            steps[layer_config] = wrap(_bind(config, layer_config, ropes[layer_config.rope], linear, attend, gate_up))
        x_TD, layer_kv = steps[layer_config](p, x_TD, layer_kv)
        new_kv.append(layer_kv)
    return rms_norm(x_TD, params["final_norm"], config), new_kv


def _bind(config: ModelConfig, layer_config: LayerConfig, rope, linear, attend, gate_up) -> Callable:
    def step(p, x_TD, kv):
        return layer(
            p, x_TD, config=config, layer=layer_config, rope=rope, linear=linear, attend=attend, kv=kv, gate_up=gate_up
        )

    return step


def head_name(config: ModelConfig) -> str:
    """The parameter that logits are made of."""
    return "embed" if config.tie_word_embeddings else "lm_head"


def logits(params: dict[str, Any], x_RD: jax.Array, config: ModelConfig) -> jax.Array:
    """This shard's logits [R, V_local] in at least float32; rows that only pad the vocabulary give 0."""
    return soft_cap(matmul(x_RD, params[head_name(config)], accumulator(x_RD)), config.logits_softcap)


def plain_lookup(table_VD: jax.Array, token_T: jax.Array) -> jax.Array:
    """Rows of an embedding that is whole on this device."""
    return table_VD[token_T]


def plain_linear(site: str, p: dict[str, jax.Array], x_TI: jax.Array) -> jax.Array:
    """Base matmul and bias: no adapters, no other shards."""
    y_TO = matmul(x_TI, p[site])
    bias = p.get(BIASES[site])
    return y_TO if bias is None else y_TO + bias[None, :]


def plain_attend(config: ModelConfig) -> Callable:
    """Returns dense causal attention over one sequence at positions 0..T-1; keeps nothing in kv."""

    def attend(q_THC, k_TKC, v_TKC, kv, layer: LayerConfig):
        groups, wide = q_THC.shape[1] // k_TKC.shape[1], accumulator(q_THC)
        k_SHC, v_SHC = jnp.repeat(k_TKC, groups, axis=1), jnp.repeat(v_TKC, groups, axis=1)
        score = jnp.einsum("thc,shc->hts", q_THC, k_SHC, preferred_element_type=wide) * config.attention_scale
        score = soft_cap(score, config.attention_softcap)
        score = jnp.where(causal_mask(q_THC.shape[0], layer.window)[None], score, -jnp.inf)
        weight = jax.nn.softmax(score, axis=-1).astype(v_SHC.dtype)
        return jnp.einsum("hts,shc->thc", weight, v_SHC, preferred_element_type=wide).astype(q_THC.dtype), kv

    return attend


def causal_mask(length: int, window: int | None) -> jax.Array:
    """[T, S] bool: a token sees itself and earlier ones, at most ``window`` of them in all."""
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
