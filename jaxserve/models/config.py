"""What a model is, as data: the one description that every family's config.json is translated into.

``Fields`` reads a Hugging Face config with every value checked, so that a family file only says which
keys mean what. A key that changes the maths and that the family did not read is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxserve.errors import ModelError

# Keys that change the maths, with the values that mean "nothing special". A family that implements one
# reads it; for all other families any other value is refused.
NEUTRAL: dict[str, tuple] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attention_sink_size": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1, 1.0),
    "final_logit_softcapping": (),
    "is_causal": (True,),
    "layer_types": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "moe_intermediate_size": (),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1, 1.0),
    "qk_layernorm": (False,),
    "quantization_config": (),
    "compression_config": (),
    "residual_multiplier": (1, 1.0),
    "rope_local_base_freq": (),
    "rope_parameters": (),
    "rope_scaling": (),
    "rotary_pct": (1, 1.0),
    "scale_emb": (1, 1.0),
    "scale_depth": (),
    "sliding_window": (),
    "sliding_window_pattern": (),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}

_REQUIRED: Any = object()


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: the base, the variant and the variant's numbers."""

    theta: float
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 0  # llama3, yarn: the length the model was pretrained with
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range outwards

    def reach(self, max_position: int) -> int:
        """Positions it was stretched for, of a model that was made for ``max_position``."""
        if self.kind == "linear":
            return int(self.factor * max_position)
        return int(self.factor * self.original_max_position) if self.kind == "yarn" else max_position


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What differs between layers of one model."""

    window: int | None  # a token sees itself and the window - 1 tokens before it; None sees all
    rope: RopeConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only model. Hashable, so it can be a static argument of a jitted function."""

    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    layers: tuple[LayerConfig, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0  # Gemma multiplies by 1 + w
    activation: str = "silu"  # silu | gelu_tanh
    embedding_scale: float = 1.0
    attention_scale: float = 1.0  # multiplies q.k
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    post_norms: bool = False  # Gemma also normalises what a block adds to the residual stream
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    unembedded_tokens: tuple[str, ...] = ()  # tokens the tokenizer may know although they have no embedding row

    @property
    def module_roots(self) -> tuple[str, ...]:
        """What Hugging Face calls the decoder that holds the layers: today, then what else adapters may call it."""
        from jaxserve.models.registry import FAMILIES

        return FAMILIES[self.architecture].module_roots

    @property
    def max_length(self) -> int:
        """Most positions that can be asked for: a stretched rope reaches further than max_position_embeddings, which
        counts that already where it is Gemma 3's."""
        made_for = self.max_position_embeddings
        if self.model_type == "gemma3_text":
            return made_for
        return max(made_for, *(layer.rope.reach(made_for) for layer in self.layers))

    @classmethod
    def from_dict(cls, hf_config: Mapping[str, Any]) -> "ModelConfig":
        """Translates a Hugging Face config.json.

        Raises:
          ModelError: an unsupported architecture, a missing or senseless value, a key that changes the maths
            and is not implemented.
        """
        from jaxserve.models.registry import family_of

        return family_of(hf_config).from_hf(dict(hf_config))


class Fields:
    """Checked access to a config.json; remembers which keys were read."""

    def __init__(self, hf: Mapping[str, Any], where: str = "config.json"):
        self.hf = hf
        self.where = where
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; null counts as absent."""
        self.read.add(key)
        value = self.hf.get(key)
        if value is None and default is _REQUIRED:
            raise ModelError(f"{self.where}: {key} is missing")
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, *, low: int = 1, high: int = 2**31 - 1) -> Any:
        """An integer between ``low`` and ``high``; a default is returned unchecked."""
        value = self.get(key, default)
        if value is default:
            return value
        if type(value) is not int or not low <= value <= high:
            raise ModelError(f"{self.where}: {key} {_show(value)} must be an integer between {low} and {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, low: float = 0.0, high: float = 1e12) -> Any:
        """A finite float above ``low`` (exclusive) and up to ``high``; a default is returned unchecked."""
        value = self.get(key, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not low < value <= high:
            raise ModelError(f"{self.where}: {key} {_show(value)} must be a number above {low:g} and at most {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise ModelError(f"{self.where}: {key} {_show(value)} must be true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, str], default: str) -> str:
        """Translates one of the names in ``choices``."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise ModelError(f"{self.where}: {key} {_show(value)} is not supported; supported: {', '.join(choices)}")
        return choices[value]

    def ids(self, key: str, nothing: int | None = None) -> tuple[int, ...]:
        """A token id, a list of them, or nothing, which may be written as the id ``nothing``."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [] if value == nothing else [value]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ModelError(f"{self.where}: {key} {_show(value)} must be a token id or a list of token ids")
        return tuple(ids)

    def refuse_unread(self) -> None:
        """Refuses a key that changes the maths and that nobody read."""
        for key, neutral in NEUTRAL.items():
            value = self.hf.get(key)
            if key not in self.read and value is not None and value not in neutral:
                raise ModelError(f"{self.where}: {key} {_show(value)} is not supported for this architecture")


def dimensions(fields: Fields, **defaults: Any) -> dict[str, Any]:
    """The sizes every family has, as keyword arguments of ModelConfig. ``defaults`` are for families whose
    published configs leave keys out."""

    def size(key: str, high: int, default: Any = None) -> int:
        return fields.integer(key, defaults.get(key, _REQUIRED if default is None else default), high=high)

    hidden_size = size("hidden_size", 2**17)
    num_heads = size("num_attention_heads", 2**12)
    num_kv_heads = size("num_key_value_heads", 2**12, num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{fields.where}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if fields.hf.get("head_dim") is None and "head_dim" not in defaults and hidden_size % num_heads:
        raise ModelError(
            f"{fields.where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    head_dim = size("head_dim", 2**10, hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"{fields.where}: head_dim {head_dim} must be even for rotary embeddings")
    return {
        "vocab_size": size("vocab_size", 2**22),
        "hidden_size": hidden_size,
        "intermediate_size": size("intermediate_size", 2**20),
        "num_layers": size("num_hidden_layers", 2**10),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6, high=1.0),
        "max_position_embeddings": size("max_position_embeddings", 2**27),
    }


def token_ids(*sources: Fields) -> dict[str, Any]:
    """bos, eos and pad ids from the first source that names them."""

    def first(key: str, nothing: int | None = None) -> tuple[int, ...]:
        return next((ids for ids in (source.ids(key, nothing) for source in sources) if ids), ())

    return {
        "bos_token_id": next(iter(first("bos_token_id")), None),
        "eos_token_ids": first("eos_token_id"),
        "pad_token_id": next(iter(first("pad_token_id", -1)), None),  # early conversions of Llama have -1
    }


def sliding_window(fields: Fields) -> int | None:
    """The width of sliding layers: where the key is absent transformers takes 4096, where it is null none slides."""
    return fields.integer("sliding_window", None if "sliding_window" in fields.hf else 4096)


def layer_windows(fields: Fields, num_layers: int, window: int | None, default: list[str]) -> list[int | None]:
    """Each layer's window from ``layer_types``, or from the family's ``default`` pattern."""
    types = fields.get("layer_types", default)
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != num_layers:
        raise ModelError(f"{fields.where}: layer_types must list one type for each of the {num_layers} layers")
    for kind in types:
        if not isinstance(kind, str) or kind not in known:
            raise ModelError(
                f"{fields.where}: layer_types {_show(kind)} is not supported; supported: {', '.join(known)}"
            )
        if kind == "sliding_attention" and window is None:
            raise ModelError(f"{fields.where}: layer_types asks for sliding_attention but sliding_window is not set")
    return [known[kind] for kind in types]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class ModelShape(Protocol):
    """What linear layers and adapters have to know of a model."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def module_roots(self) -> tuple[str, ...]: ...


def member_dims(config: ModelShape) -> dict[str, tuple[int, int]]:
    """(in, out) of every projection, unsharded, under the names PEFT knows."""
    D, F = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q_proj": (D, q),
        "k_proj": (D, kv),
        "v_proj": (D, kv),
        "o_proj": (q, D),
        "gate_proj": (D, F),
        "up_proj": (D, F),
        "down_proj": (F, D),
    }
