"""LoRA and rsLoRA: y += scaling * B (A x), scaling = alpha / R, or alpha / sqrt(R) for rsLoRA."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.adapters import fields
from jaxserve.adapters.targets import Matcher
from jaxserve.adapters.weights import AdapterWeights, Key, LoraPair, ModelShape, module_name
from jaxserve.models.config import member_dims

NAME = "lora"
FIELDS = fields.LORA
PREFIX = "base_model.model."


def tensor_names(key: Key, root: str) -> tuple[str, str]:
    """PEFT's names of A and B of one module."""
    module = PREFIX + module_name(*key, root)
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def plan(config: Mapping[str, Any], model: ModelShape) -> dict[Key, tuple[int, float]]:
    """(rank, scaling) of every adapted module. Raises AdapterError."""
    matcher = Matcher(config, model)
    modules = matcher.adapted()
    rank_keys, alpha_keys = matcher.first_keys("rank_pattern"), matcher.first_keys("alpha_pattern")
    planned = {}
    for name, key in modules.items():
        rank = config["rank_pattern"][rank_keys[name]] if name in rank_keys else config["r"]
        alpha = config["alpha_pattern"][alpha_keys[name]] if name in alpha_keys else config["lora_alpha"]
        planned[key] = (rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
    return planned


def shapes(config: Mapping[str, Any], model: ModelShape) -> dict[str, tuple[int, ...]]:
    """The tensors the file must hold, by name."""
    dims = member_dims(model)
    expected: dict[str, tuple[int, ...]] = {}
    for key, (rank, _) in plan(config, model).items():
        a, b = tensor_names(key, model.module_roots[0])
        size_in, size_out = dims[key[1]]
        expected |= {a: (rank, size_in), b: (size_out, rank)}
    return expected


def read(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: ModelShape) -> AdapterWeights:
    """Weights from checked tensors (names and shapes as ``shapes`` says, float32)."""
    planned, root = plan(config, model), model.module_roots[0]
    pairs = {key: LoraPair(*(tensors[name] for name in tensor_names(key, root))) for key in planned}
    return build(config, pairs, planned, root)


def build(
    config: Mapping[str, Any], pairs: Mapping[Key, LoraPair], planned: Mapping[Key, tuple[int, float]], root: str
) -> AdapterWeights:
    """Weights from their parts; ``planned`` gives the scaling."""
    scaling = {key: scaling for key, (_, scaling) in planned.items()}
    return AdapterWeights(method=NAME, config=dict(config), scaling=scaling, pairs=pairs, root=root)


def write(weights: AdapterWeights) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors of its file, float32."""
    tensors = {}
    for key, pair in weights.pairs.items():
        a, b = tensor_names(key, weights.root)
        tensors |= {a: pair.a, b: pair.b}
    return dict(weights.config), tensors


def new_config(
    *, rank: int, alpha: float, target_modules: str | list[str], use_rslora: bool = False, **others: Any
) -> dict[str, Any]:
    """The adapter_config.json of a new adapter; ``others`` are further keys of PEFT's LoraConfig."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": target_modules,
        "use_rslora": use_rslora,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    } | others


def initial(config: Mapping[str, Any], model: ModelShape, rng: np.random.Generator) -> AdapterWeights:
    """PEFT's starting point: A uniform within 1/sqrt(in) (Kaiming with a = sqrt 5), B zero. Raises AdapterError."""
    fields.check(config, FIELDS)
    planned, dims, pairs = plan(config, model), member_dims(model), {}
    for key, (rank, _) in planned.items():
        size_in, size_out = dims[key[1]]
        bound = 1 / math.sqrt(size_in)
        a = rng.uniform(-bound, bound, (rank, size_in)).astype(np.float32)
        pairs[key] = LoraPair(a, np.zeros((size_out, rank), np.float32))
    return build(config, pairs, planned, model.module_roots[0])
