"""Parameters declared once: shape, logical axes, initial value, and the tensors of a checkpoint they are made of.

Weights keep the checkpoint's layout [out, in]. Projections that read the same input are stored as one array whose
rows are ordered by shard (shard 0's [q|k|v], shard 1's [q|k|v], ...), so every shard holds one contiguous block.

Shapes: D hidden, F ffn, V vocab (Vp with padding), H query heads, K kv heads, C head dim.
"""

from dataclasses import dataclass
from typing import Any

from jaxserve.errors import InvalidRequest, ModelError
from jaxserve.models.config import ModelConfig, member_dims
from jaxserve.models.registry import FAMILIES

SITES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
BIASES = {"qkv_proj": "qkv_bias", "o_proj": "o_bias", "gate_up_proj": "gate_up_bias", "down_proj": "down_bias"}
VOCAB_MULTIPLE = 8


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint and how its rows are dealt to the shards."""

    name: str
    rows: int  # in the checkpoint
    kind: str  # split (evenly) | kv_heads (whole heads, repeated if too few) | vocab (padded with zeros) | replicated
    heads: int = 1  # kv_heads only: how many

    def shard_rows(self, shard: int, tp: int) -> tuple[int, int]:
        """The checkpoint's rows [start, stop) that live on ``shard``."""
        if self.kind == "replicated":
            return 0, self.rows
        if self.kind == "kv_heads" and tp > self.heads:
            head_dim, head = self.rows // self.heads, shard * self.heads // tp
            return head * head_dim, (head + 1) * head_dim
        if self.kind == "vocab":
            size = padded_vocab(self.rows, tp) // tp
            return min(shard * size, self.rows), min((shard + 1) * size, self.rows)
        size = self.rows // tp
        return shard * size, (shard + 1) * size


@dataclass(frozen=True)
class ParamSpec:
    """One array as it is stored for a given number of shards."""

    parts: tuple[Part, ...]
    shape: tuple[int, ...]  # global
    axes: tuple[str | None, ...]  # logical, see sharding.rules
    init: str  # normal | zeros | ones


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Vp: the vocabulary rounded up so that every shard holds the same whole number of 8 rows."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def check_tp(config: ModelConfig, tp: int) -> None:
    """Refuses a number of shards that cannot hold whole heads and equal parts of the ffn."""
    for name, size in (("num_attention_heads", config.num_heads), ("intermediate_size", config.intermediate_size)):
        if size % tp:
            raise ModelError(f"tensor_parallel {tp} does not divide {name} {size}")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise ModelError(
            f"tensor_parallel {tp} and num_key_value_heads {config.num_kv_heads}: one must divide the other"
        )


def can_finetune(config: ModelConfig, tp: int) -> bool:
    """Whether no two of so many shards hold the same kv head: its gradients would lie on both."""
    return tp <= config.num_kv_heads


def check_finetuning_tp(config: ModelConfig, tp: int) -> None:
    """Raises InvalidRequest for a number of shards that cannot finetune."""
    if not can_finetune(config, tp):
        raise InvalidRequest(
            f"finetuning needs tensor_parallel at most num_key_value_heads {config.num_kv_heads}; it is {tp}"
        )


def param_specs(config: ModelConfig, tp: int) -> dict[str, Any]:
    """The tree of all parameters for ``tp`` shards.

    Raises:
      ModelError: the model cannot be split into ``tp`` shards.
    """
    check_tp(config, tp)
    names = FAMILIES[config.architecture].names
    D, V = config.hidden_size, config.vocab_size
    table = (padded_vocab(V, tp), D)
    specs: dict[str, Any] = {
        "embed": ParamSpec((Part(names["embed"], V, "vocab"),), table, ("vocab", "embed"), "normal"),
        "layers": [_layer_specs(config, tp, i) for i in range(config.num_layers)],
        "final_norm": _norm(config, names["final_norm"], D),
    }
    if not config.tie_word_embeddings:
        specs["lm_head"] = ParamSpec((Part(names["lm_head"], V, "vocab"),), table, ("vocab", "embed"), "normal")
    return specs


def _layer_specs(config: ModelConfig, tp: int, index: int) -> dict[str, ParamSpec]:
    names = FAMILIES[config.architecture].names
    prefix, D, C = f"model.layers.{index}.", config.hidden_size, config.head_dim
    specs: dict[str, ParamSpec] = {}
    for name in ("input_norm", "ffn_norm") + (("post_attn_norm", "post_ffn_norm") if config.post_norms else ()):
        specs[name] = _norm(config, prefix + names[name], D)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        specs[name] = _norm(config, prefix + names[name], C)
    biased = {
        "qkv_proj": config.qkv_bias,
        "o_proj": config.o_bias,
        "gate_up_proj": config.mlp_bias,
        "down_proj": config.mlp_bias,
    }
    for site in SITES:
        specs[site] = _projection(config, tp, site, prefix, "weight")
        if biased[site]:
            specs[BIASES[site]] = _projection(config, tp, site, prefix, "bias")
    return specs


def _norm(config: ModelConfig, name: str, size: int) -> ParamSpec:
    init = "zeros" if config.norm_offset else "ones"
    return ParamSpec((Part(name, size, "replicated"),), (size,), (None,), init)


def _projection(config: ModelConfig, tp: int, site: str, prefix: str, leaf: str) -> ParamSpec:
    """The weight or the bias of one site, all of its members fused along the rows."""
    names, dims = FAMILIES[config.architecture].names, member_dims(config)
    axis = "heads" if site in ("qkv_proj", "o_proj") else "ffn"
    is_row = site in ("o_proj", "down_proj")
    parts = []
    for member in SITES[site]:
        kind = "replicated" if is_row else "kv_heads" if member in ("k_proj", "v_proj") else "split"
        heads = config.num_kv_heads if kind == "kv_heads" else 1
        parts.append(Part(f"{prefix}{names[member]}.{leaf}", dims[member][1], kind, heads))
    shard_rows = sum(stop - start for start, stop in (part.shard_rows(0, tp) for part in parts))
    rows = shard_rows if is_row else shard_rows * tp
    axes = ("embed", axis) if is_row else (axis, "embed")
    if leaf == "bias":
        return ParamSpec(tuple(parts), (rows,), axes[:1], "zeros")
    return ParamSpec(tuple(parts), (rows, dims[SITES[site][0]][0]), axes, "normal")
