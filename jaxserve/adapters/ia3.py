"""(IA)3: one trained factor per output of a module, or per input of a feed-forward one (arXiv 2205.05638)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.adapters import fields
from jaxserve.adapters.lora import PREFIX
from jaxserve.adapters.targets import Matcher
from jaxserve.adapters.weights import AdapterWeights, Key, ModelShape, ScaleVector, module_name
from jaxserve.models.config import member_dims

NAME = "ia3"
FIELDS = fields.IA3


def tensor_name(key: Key, root: str) -> str:
    """PEFT's name of the vector of one module."""
    return f"{PREFIX}{module_name(*key, root)}.ia3_l"


def kinds(config: Mapping[str, Any], model: ModelShape) -> dict[Key, str]:
    """``input_scale`` or ``output_scale`` for every adapted module. Raises AdapterError."""
    matcher = Matcher(config, model)
    modules = matcher.adapted()
    on_input = matcher.feedforward(modules)
    return {key: "input_scale" if name in on_input else "output_scale" for name, key in modules.items()}


def shapes(config: Mapping[str, Any], model: ModelShape) -> dict[str, tuple[int, ...]]:
    """The tensors the file must hold, by name: [1, in] or [out, 1]."""
    dims, root = member_dims(model), model.module_roots[0]
    return {
        tensor_name(key, root): (1, dims[key[1]][0]) if kind == "input_scale" else (dims[key[1]][1], 1)
        for key, kind in kinds(config, model).items()
    }


def read(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: ModelShape) -> AdapterWeights:
    """Weights from checked tensors."""
    root, found = model.module_roots[0], kinds(config, model)
    vectors = {key: ScaleVector(kind, tensors[tensor_name(key, root)].reshape(-1)) for key, kind in found.items()}
    return AdapterWeights(method=NAME, config=dict(config), scaling={}, pairs={}, vectors=vectors, root=root)


def write(weights: AdapterWeights) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors of its file, float32."""
    tensors = {}
    for key, vector in weights.vectors.items():
        shape = (1, -1) if vector.kind == "input_scale" else (-1, 1)
        tensors[tensor_name(key, weights.root)] = vector.value.reshape(shape)
    return dict(weights.config), tensors


def initial(config: Mapping[str, Any], model: ModelShape) -> AdapterWeights:
    """PEFT's starting point: ones, which change nothing. Raises AdapterError."""
    fields.check(config, FIELDS)
    ones = {name: np.ones(shape, np.float32) for name, shape in shapes(config, model).items()}
    return read(config, ones, model)


def new_config(
    *, target_modules: str | list[str], feedforward_modules: str | list[str], **others: Any
) -> dict[str, Any]:
    """The adapter_config.json of a new adapter; ``others`` are further keys of PEFT's IA3Config."""
    return {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "target_modules": target_modules,
        "feedforward_modules": feedforward_modules,
        "inference_mode": True,
    } | others
