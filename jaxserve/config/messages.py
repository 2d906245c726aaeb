"""A validation error as problems that name the key, the value and what was expected."""

import difflib
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

MAX_VALUE_CHARS = 64


class Problem(NamedTuple):
    """One wrong value; ``path`` is (section, key), (key,) or () for the whole."""

    path: tuple[str, ...]
    value: str | None
    reason: str

    def line(self, place: str | None = None) -> str:
        key = ".".join(self.path)
        head = f"{key} = {self.value}" if self.value is not None else key
        return ": ".join(part for part in (place, head, self.reason) if part)


def problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every wrong key of a failed validation of ``model``, once each."""
    found: dict[tuple[str, ...], Problem] = {}
    for e in error.errors(include_url=False, include_context=False):
        path = _key(e["loc"], model)
        value = None if _is_section(path, model) and e["type"] == "value_error" else short(e["input"])
        reason = "unknown key" + _hint(path, model) if e["type"] == "extra_forbidden" else plain(e["msg"])
        if path in found and reason not in found[path].reason:  # members of a union fail one by one
            reason = f"{found[path].reason}, or {reason}"
        found[path] = Problem(path, value, reason)
    return list(found.values())


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


def _key(loc: tuple[str | int, ...], model: type[BaseModel]) -> tuple[str, ...]:
    """The part of a location that names a key: list indices and union members are left out."""
    head = tuple(str(part) for part in loc[:1])
    section = submodel(model, head[0]) if head else None
    return head + _key(loc[1:], section) if section else head


def _is_section(path: tuple[str, ...], model: type[BaseModel]) -> bool:
    return not path or (submodel(model, path[0]) is not None and len(path) == 1)


def submodel(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section called ``name``, if that is one."""
    field = model.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _hint(path: tuple[str, ...], model: type[BaseModel]) -> str:
    section = submodel(model, path[0]) if len(path) == 2 else model
    near = difflib.get_close_matches(path[-1], section.model_fields if section else (), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def plain(message: str) -> str:
    """The library's message as the end of our line."""
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    return "it " + message if message.startswith(("should", "must")) else message[:1].lower() + message[1:]
