"""What an adapter is once it has been read: its numbers, by layer and member, and what they are worth.

Shapes: R rank. A is [R, in] and B is [out, R], as PEFT stores them. A key is (layer, member), the member being the
short name of a linear layer ("q_proj"), of which every decoder layer has the same seven.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jaxserve.models.config import ModelShape

Key = tuple[int, str]

MEMBERS = {  # member -> the block it sits in
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


class Weights:
    """What the store and the loop know of an adapter's content, be it on the host (AdapterWeights) or not."""

    digest: bytes
    method: str
    config: "Mapping[str, Any]"
    scaling: "Mapping[Key, float]"
    pairs: "Mapping[Key, LoraPair]"
    vectors: "Mapping[Key, ScaleVector]"
    rank: int
    nbytes: int

    @property
    def like(self) -> "AdapterWeights":
        """Weights on the host with the same modules, ranks, scaling and kinds of vectors."""
        raise NotImplementedError

    @property
    def fetched(self) -> "AdapterWeights":
        """The content itself, on the host."""
        raise NotImplementedError


def module_name(layer: int, member: str, root: str = "model") -> str:
    """The module's full name in a Hugging Face decoder called ``root``, what PEFT matches its patterns against."""
    return f"{root}.layers.{layer}.{MEMBERS[member]}.{member}"


def module_names(model: ModelShape, root: str | None = None) -> dict[str, Key]:
    """Every module an adapter may change, by full name, in the model's order."""
    root = root or model.module_roots[0]
    keys = [(layer, member) for layer in range(model.num_layers) for member in MEMBERS]
    return {module_name(*key, root): key for key in keys}


def _fixed(array: np.ndarray) -> np.ndarray:
    """A float32 view of ``array`` that cannot be written through."""
    array = np.ascontiguousarray(array, dtype=np.float32).view()
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One module's LoRA factors; the update of its matrix is scaling * b @ a."""

    a: np.ndarray  # [R, in] float32
    b: np.ndarray  # [out, R] float32

    def __post_init__(self):
        object.__setattr__(self, "a", _fixed(self.a))
        object.__setattr__(self, "b", _fixed(self.b))
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(f"a {self.a.shape} and b {self.b.shape} are not [R, in] and [out, R]")

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class ScaleVector:
    """One module's vector: ``output_scale`` [out] and ``input_scale`` [in] multiply, ``magnitude`` [out] is DoRA's."""

    kind: str
    value: np.ndarray  # float32

    def __post_init__(self):
        object.__setattr__(self, "value", _fixed(self.value))
        if self.kind not in ("output_scale", "input_scale", "magnitude") or self.value.ndim != 1:
            raise ValueError(f"no vector of kind {self.kind!r} and shape {self.value.shape}")


@dataclass(frozen=True, eq=False, kw_only=True)
class AdapterWeights(Weights):
    """One adapter's content. Immutable; ``dataclasses.replace`` makes the next version.

    ``config`` is its adapter_config.json, ``stored`` the dtype its file holds or will hold ("float32", "bfloat16",
    "float16": the float32 values here are exact copies). ``base_digest`` names the base model where it is known,
    ``root`` is what it calls the decoder.
    """

    method: str  # "lora", "dora", "ia3": keys of METHODS
    config: Mapping[str, Any]
    scaling: Mapping[Key, float]  # of each LoRA pair
    pairs: Mapping[Key, LoraPair]
    vectors: Mapping[Key, ScaleVector] = field(default_factory=dict)
    base_digest: bytes | None = None
    stored: str = "float32"
    root: str = "model"

    def __post_init__(self):
        if self.scaling.keys() != self.pairs.keys():
            raise ValueError("scaling and pairs must name the same modules")

    @cached_property
    def digest(self) -> bytes:
        """sha256 of everything that changes the maths, and of nothing else (not the stored dtype, not the base)."""
        return _digest(self)

    @property
    def like(self) -> "AdapterWeights":
        return self

    @property
    def fetched(self) -> "AdapterWeights":
        return self

    def factors(self) -> dict[Key, tuple[np.ndarray, np.ndarray, float]]:
        """(A [R, in], B [out, R], scaling) of every LoRA pair."""
        return {key: (pair.a, pair.b, self.scaling[key]) for key, pair in self.pairs.items()}

    @cached_property
    def rank(self) -> int:
        """The largest rank of any module; 0 for a method of vectors alone."""
        return max((pair.rank for pair in self.pairs.values()), default=0)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the arrays held here."""
        pairs = sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())
        return pairs + sum(vector.value.nbytes for vector in self.vectors.values())


def _digest(weights: AdapterWeights) -> bytes:
    hasher = hashlib.sha256(f"adapter 1 {weights.method}\n".encode())
    for key in sorted(weights.pairs):
        pair = weights.pairs[key]
        scale = float(weights.scaling[key]).hex()
        hasher.update(f"{module_name(*key)} pair {pair.a.shape} {pair.b.shape} {scale}\n".encode())
        hasher.update(pair.a.data)
        hasher.update(pair.b.data)
    for key in sorted(weights.vectors):
        vector = weights.vectors[key]
        hasher.update(f"{module_name(*key)} {vector.kind} {vector.value.shape}\n".encode())
        hasher.update(vector.value.data)
    return hasher.digest()
