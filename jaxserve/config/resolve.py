"""Which value wins: command line over environment over file over defaults."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from jaxserve.config.files import Entries, Entry, read_entries
from jaxserve.config.messages import Problem, plain, problems, short, submodel
from jaxserve.config.schema import Config
from jaxserve.config.section import words
from jaxserve.errors import ConfigError

ENV_PREFIX = "JAXSERVE_"


def resolve(
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[tuple[str, str], Entry] | None = None,
) -> Config:
    """Merges the sources and validates them once.

    Args:
      file: a .yaml, .yml or .gin file.
      environ: JAXSERVE_SECTION__KEY=text; by default the process's own. A tuple or mapping is written in JSON.
      flags: (section, key) to the entry of a flag, whose value is text, or a list of texts for a tuple.

    Raises:
      ConfigError: one line per unknown key or wrong value, each with the file and line, variable or flag it came from.
    """
    written = {**env_entries(os.environ if environ is None else environ), **(flags or {})}
    typed, wrong = _typed(written)
    entries = {**(read_entries(file) if file else {}), **typed}
    try:
        config = Config(**_nested(entries))
    except ValidationError as error:
        wrong += [p.line(_place(p, entries, file)) for p in problems(error, Config)]
    if wrong:
        raise ConfigError(wrong)
    return config


def env_entries(environ: Mapping[str, str]) -> Entries:
    """The variables that name a key: JAXSERVE_ENGINE__MAX_NUM_SEQS is engine.max_num_seqs."""
    found: Entries = {}
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and "__" in name:
            section, key = name.removeprefix(ENV_PREFIX).lower().split("__", 1)
            found[section, key] = Entry(environ[name], name)
    return found


def _typed(entries: Mapping[tuple[str, ...], Entry]) -> tuple[Entries, list[str]]:
    """Text to the type of its key; the text of an unknown key stays, for validation to refuse."""
    typed, wrong = {}, []
    for path, entry in entries.items():
        try:
            typed[path] = Entry(_from_text(path, entry.value), entry.place)
        except ValidationError as error:
            wrong.append(Problem(path, short(entry.value), plain(error.errors()[0]["msg"])).line(entry.place))
    return typed, wrong


def _from_text(path: tuple[str, ...], text: Any) -> Any:
    section = submodel(Config, path[0])
    field = section.model_fields.get(path[1]) if section else None
    if field is None or not isinstance(text, str):
        return text
    annotation = field.annotation
    if type(None) in get_args(annotation) and text.lower() in ("none", "null") and text not in words(annotation):
        return None
    kind = TypeAdapter[Any](annotation or str)
    if isinstance(field.default, tuple):
        return kind.validate_json(text)
    if text.startswith(("[", "{")):
        with suppress(ValidationError):  # a stop string may begin like this
            return kind.validate_json(text)
    return kind.validate_strings(text)


def _nested(entries: Entries) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, entry in entries.items():
        if len(path) == 1:
            nested[path[0]] = dict(entry.value) if isinstance(entry.value, dict) else entry.value
        elif isinstance(nested.setdefault(path[0], {}), dict):
            nested[path[0]][path[1]] = entry.value
    return nested


def _place(problem: Problem, entries: Entries, file: str | Path | None) -> str | None:
    """Where a wrong value was written; a problem between keys names every place that had a say."""
    if problem.path in entries:
        return entries[problem.path].place
    places = [e.place for path, e in entries.items() if path[: len(problem.path)] == problem.path]
    return ", ".join(dict.fromkeys(places)) or (str(file) if file else None)
