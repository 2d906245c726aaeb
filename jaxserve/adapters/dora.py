"""DoRA: LoRA's update on a matrix whose rows are then given trained lengths (arXiv 2402.09353).

y = m / |W + scaling B A|_row * (W x + scaling B (A x)) + bias; the file adds m, one number per output, to LoRA's.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxserve.adapters import fields, lora
from jaxserve.adapters.weights import AdapterWeights, Key, ModelShape, ScaleVector, module_name
from jaxserve.models.config import member_dims

NAME = "dora"
FIELDS = fields.LORA


def magnitude_name(key: Key, root: str) -> str:
    """PEFT's name of the magnitude vector of one module."""
    return f"{lora.PREFIX}{module_name(*key, root)}.lora_magnitude_vector"


def shapes(config: Mapping[str, Any], model: ModelShape) -> dict[str, tuple[int, ...]]:
    """The tensors the file must hold, by name."""
    dims, root = member_dims(model), model.module_roots[0]
    magnitudes = {magnitude_name(key, root): (dims[key[1]][1],) for key in lora.plan(config, model)}
    return lora.shapes(config, model) | magnitudes


def read(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: ModelShape) -> AdapterWeights:
    """Weights from checked tensors."""
    weights = lora.read(config, tensors, model)
    vectors = {key: ScaleVector("magnitude", tensors[magnitude_name(key, weights.root)]) for key in weights.pairs}
    return replace(weights, method=NAME, vectors=vectors)


def write(weights: AdapterWeights) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors of its file, float32."""
    config, tensors = lora.write(weights)
    magnitudes = {magnitude_name(key, weights.root): vector.value for key, vector in weights.vectors.items()}
    return config, tensors | magnitudes


def initial(
    config: Mapping[str, Any], model: ModelShape, rng: np.random.Generator, row_norms: Mapping[Key, np.ndarray]
) -> AdapterWeights:
    """PEFT's starting point: LoRA's, and as magnitudes the lengths [out] of the base matrices' rows."""
    weights = lora.initial(config, model, rng)
    vectors = {key: ScaleVector("magnitude", row_norms[key]) for key in weights.pairs}
    return replace(weights, method=NAME, vectors=vectors)
