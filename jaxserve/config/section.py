"""What all sections of a configuration share."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from jaxserve.config.messages import problems
from jaxserve.errors import ConfigError
from jaxserve.sampling import plain_number


def _without_nul(path: str) -> str:
    if "\0" in path:
        raise ValueError("must not hold NUL")
    return path


Name = Annotated[str, Field(min_length=1)]
Place = Annotated[Name, AfterValidator(_without_nul)]  # in the file system
Names = tuple[Name, ...]


class Section(BaseModel):
    """Frozen; unknown keys, lax conversions ("16" for 16) and non-finite numbers are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Keywords(Section):
    """Taken as keyword arguments.

    Raises:
      ConfigError: unknown or wrong fields, all of them at once.
    """

    def __init__(self, **fields: Any):
        try:
            super().__init__(**{name: plain_number(value) for name, value in fields.items()})
        except ValidationError as error:
            raise ConfigError([p.line() for p in problems(error, type(self))]) from None


def words(kind: Any) -> tuple[str, ...]:
    """The members of a Literal, or of a union with one; none of any other type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(word for part in get_args(kind) for word in words(part))


def refuse_twice(names: Sequence[str], said: str) -> None:
    """Raises ValueError, "{said} 'name' twice", where a name comes twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{said} {twice[0]!r} twice")
