"""JaxServe: LLM inference and LoRA finetuning in one jitted step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig
    from jaxserve.errors import (
        AdapterError,
        AdapterNotFound,
        ConfigError,
        EngineError,
        InvalidRequest,
        JaxServeError,
        ModelError,
    )
    from jaxserve.finetune.config import FinetuneConfig
    from jaxserve.finetune.errors import DataError
    from jaxserve.finetuning import FinetuneJob
    from jaxserve.llm import Engine
    from jaxserve.outputs import Completion, Event, RequestOutput
    from jaxserve.sampling import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "jaxserve.config": ("EngineConfig",),
    "jaxserve.errors": (
        "AdapterError",
        "AdapterNotFound",
        "ConfigError",
        "EngineError",
        "InvalidRequest",
        "JaxServeError",
        "ModelError",
    ),
    "jaxserve.finetune.config": ("FinetuneConfig",),
    "jaxserve.finetune.errors": ("DataError",),
    "jaxserve.finetuning": ("FinetuneJob",),
    "jaxserve.llm": ("Engine",),
    "jaxserve.outputs": ("Completion", "Event", "RequestOutput"),
    "jaxserve.sampling": ("SamplingParams",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "AdapterError",
    "AdapterNotFound",
    "Completion",
    "ConfigError",
    "DataError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "Event",
    "FinetuneConfig",
    "FinetuneJob",
    "InvalidRequest",
    "JaxServeError",
    "ModelError",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    """Imports on first use: a command line that only prints its help needs no JAX."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
