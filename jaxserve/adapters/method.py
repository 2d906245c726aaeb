"""The PEFT methods: one module each, one line each in a table."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from jaxserve.adapters import dora, ia3, lora
from jaxserve.adapters.fields import Field, config_error
from jaxserve.adapters.weights import AdapterWeights, Key, LoraPair, ModelShape, ScaleVector

__all__ = ["METHODS", "AdapterWeights", "Key", "LoraPair", "Method", "ModelShape", "ScaleVector", "method_of"]


class Method(Protocol):
    """What a method's module provides to be read and written."""

    @property
    def NAME(self) -> str: ...
    @property
    def FIELDS(self) -> Mapping[str, Field]: ...

    def shapes(self, config: Mapping[str, Any], model: ModelShape) -> dict[str, tuple[int, ...]]:
        """The tensors that a checked configuration asks for. Raises AdapterError."""
        ...

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: ModelShape) -> AdapterWeights:
        """Weights from tensors with those names and shapes, float32."""
        ...

    def write(self, weights: AdapterWeights) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """adapter_config.json and the tensors, float32: the inverse of ``read``."""
        ...


METHODS: dict[tuple[str, bool], Method] = {  # (peft_type, use_dora)
    ("LORA", False): lora,
    ("LORA", True): dora,
    ("IA3", False): ia3,
}


def method_of(config: Mapping[str, Any]) -> Method:
    """The method an adapter_config.json asks for. Raises AdapterError."""
    peft_type, use_dora = config.get("peft_type"), config.get("use_dora") is True
    if not isinstance(peft_type, str) or (peft_type, use_dora) not in METHODS:
        supported = " or ".join(sorted({repr(name) for name, _ in METHODS}))
        raise config_error("peft_type", peft_type, supported)
    return METHODS[peft_type, use_dora]


def named(name: str) -> Method:
    """The method of ``AdapterWeights.method``."""
    return next(method for method in METHODS.values() if name == method.NAME)


def empty_adapter(config: Mapping[str, Any], model: ModelShape) -> AdapterWeights:
    """An adapter of this configuration, of zeros."""
    method = method_of(config)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in method.shapes(config, model).items()}
    return method.read(config, zeros, model)
