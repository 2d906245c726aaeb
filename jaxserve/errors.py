"""Every exception JaxServe raises on purpose, drawn once.

- JaxServeError
  - InvalidRequest: ValueError; one field of a request (.param)
  - ModelError: ValueError; a model directory that cannot be served
  - AdapterError: ValueError; an adapter directory that cannot be served (.field)
    - AdapterNotFound: KeyError as well
  - ConfigError: ValueError; all problems of a configuration at once (.errors)
  - EngineError: RuntimeError; a bug of ours or a failing device
  - DataError, CheckpointError (jaxserve.finetune.errors): training data, checkpoints
"""

from collections.abc import Sequence


class JaxServeError(Exception):
    """Root of the tree; str() is what a user should read."""


class InvalidRequest(JaxServeError, ValueError):
    """A request that is refused; ``param`` names the field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class ModelError(JaxServeError, ValueError):
    """A model directory that cannot be served, said in one line."""


class AdapterError(JaxServeError, ValueError):
    """An adapter that cannot be served; ``field`` names the config key, tensor or file."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class AdapterNotFound(AdapterError, KeyError):
    """No adapter of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class ConfigError(JaxServeError, ValueError):
    """A configuration that is refused; ``errors`` holds one line per problem."""

    def __init__(self, errors: Sequence[str]):
        super().__init__("\n".join(errors))
        self.errors = list(errors)

    def __reduce__(self):  # of another process, it says the same
        return type(self), (self.errors,)


class EngineError(JaxServeError, RuntimeError):
    """The engine cannot go on with what it was asked."""
