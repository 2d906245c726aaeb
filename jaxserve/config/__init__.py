"""One frozen, typed configuration, whatever it was written in.

Command line over environment over file (yaml or gin) over defaults; see ``resolve``.
"""

from jaxserve.config.engine import EngineConfig
from jaxserve.config.files import Entry, dump_config, load_config_file
from jaxserve.config.resolve import resolve
from jaxserve.config.schema import Config

__all__ = ["Config", "EngineConfig", "Entry", "dump_config", "load_config_file", "resolve"]
