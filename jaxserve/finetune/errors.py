"""What finetuning refuses.

JaxServeError
|-- DataError         ValueError: training data that cannot be learnt from (.errors, .code)
`-- CheckpointError   RuntimeError: a checkpoint that cannot be written or resumed from (.code)
    `-- CheckpointMismatch   of another job, model, data set or optimizer (.fields)
"""

from collections.abc import Sequence

from jaxserve.errors import JaxServeError


class DataError(JaxServeError, ValueError):
    """Training data that is refused; ``errors`` holds one line per problem, the first ten at most."""

    code = "invalid_training_file"

    def __init__(self, errors: Sequence[str]):
        super().__init__("\n".join(errors))
        self.errors = list(errors)

    def within(self, place: str) -> "DataError":
        """The same problems, each with the place it is in before it."""
        return DataError([f"{place}: {line}" for line in self.errors])


class CheckpointError(JaxServeError, RuntimeError):
    """``code``: storage (the disk refused), busy (another process writes here), newer_format or checkpoint_mismatch."""

    def __init__(self, message: str, code: str, errno: int | None = None):
        super().__init__(message)
        self.code = code
        self.errno = errno  # of the failed call, where there was one


class CheckpointMismatch(CheckpointError):
    """The checkpoint belongs to something else; ``fields`` names what differs."""

    def __init__(self, message: str, fields: Sequence[str]):
        super().__init__(message, "checkpoint_mismatch")
        self.fields = list(fields)
