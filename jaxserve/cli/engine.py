"""The engine of a configuration."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxserve.assets import locate
from jaxserve.config import Config
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve import Engine


def load_engine(config: Config, room: Mapping[str, Any] | None = None) -> "Engine":
    """Loads the model and then lora.modules.

    Args:
      room: options that hold where the user left them open.

    Raises:
      ConfigError: no model.
    """
    if config.model.path is None:
        raise ConfigError(["MODEL: name a model directory, or set model.path"])
    from jaxserve import Engine

    given = {key for part in (config.engine, config.lora, config.finetune) for key in part.model_fields_set}
    options = dict(config.engine_config()) | {k: v for k, v in (room or {}).items() if k not in given}
    engine = Engine.from_pretrained(locate(config.model.path), **options)
    for module in config.lora.modules:
        engine.load_adapter(module.name, module.path)
    return engine
