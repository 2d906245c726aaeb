"""Configuration files: yaml or gin in, yaml, gin or json out.

A file is data. Yaml is read by YAML 1.2 rules with no aliases, no tags of Python's and no second document. Gin files
are read with gin's own grammar, and what gin would execute (imports, configurable references, scopes) is refused.
Neither checks a type: that is the schema's business, so that both end in the same errors.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxserve.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 16


class Entry(NamedTuple):
    """One value of a configuration and where it was written."""

    value: Any
    place: str


Entries = dict[tuple[str, ...], Entry]  # (section, key), or (key,) for what is no section


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Returns the file's nested dict, not yet validated.

    Raises:
      ConfigError: the file cannot be read as what its suffix says; each line names file and line.
    """
    nested: dict[str, Any] = {}
    for keys, entry in read_entries(path).items():
        if len(keys) == 1:
            nested[keys[0]] = entry.value
        else:
            nested.setdefault(keys[0], {})[keys[1]] = entry.value
    return nested


def read_entries(path: str | Path) -> Entries:
    """Returns each key of the file with its value and its place, ``file:line``."""
    path = Path(path)
    readers: dict[str, Callable[[Path, str], Entries]] = {".yaml": _read_yaml, ".yml": _read_yaml, ".gin": _read_gin}
    if path.suffix not in readers:
        raise ConfigError([f"{path}: a config file ends in .yaml, .yml or .gin"])
    return readers[path.suffix](path, _read_text(path))


def dump_config(values: Mapping[str, Mapping[str, Any]], format: str) -> str:
    """Writes sections of plain values as ``yaml``, ``gin`` or ``json`` text."""
    return {"yaml": _dump_yaml, "gin": _dump_gin, "json": _dump_json}[format](values)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError([f"{path}: larger than {MAX_BYTES} bytes"])
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"]) from None


# yaml ------------------------------------------------------------------------------------------------------------


def _yaml():
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True)


def _read_yaml(path: Path, text: str) -> Entries:
    from ruamel.yaml.error import YAMLError

    try:
        _check_yaml_events(path, text)
        values = _yaml().load(text)
        lines = _yaml_lines(path, text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError([f"{path}{line}: {' '.join(str(problem).split())}"]) from None
    except ConfigError:  # a ValueError as well
        raise
    except (ValueError, OverflowError) as error:  # a date or a number outside Python's range
        raise ConfigError([f"{path}: {error}"]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: the document must be a mapping of sections"])
    return {keys: Entry(value, f"{path}:{lines.get(keys, 1)}") for keys, value in _flat(values)}


def _flat(values: dict) -> Iterator[tuple[tuple[str, ...], Any]]:
    for section, content in values.items():
        if isinstance(content, dict) and content:
            yield from (((str(section), str(key)), value) for key, value in content.items())
        else:  # a section without keys, as when all are commented out, is still one that there must be
            yield (str(section),), {} if content is None else content


def _check_yaml_events(path: Path, text: str) -> None:
    """Refuses what would make the tree larger or deeper than the text, before a tree is built."""
    from ruamel.yaml import events

    depth = documents = 0
    for event in _yaml().parse(text):
        line = event.start_mark.line + 1
        depth += isinstance(event, events.CollectionStartEvent) - isinstance(event, events.CollectionEndEvent)
        documents += isinstance(event, events.DocumentStartEvent)
        if depth > MAX_DEPTH:
            raise ConfigError([f"{path}:{line}: nested deeper than {MAX_DEPTH}"])
        if documents > 1:
            raise ConfigError([f"{path}:{line}: a second document"])
        if isinstance(event, events.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError([f"{path}:{line}: anchors and aliases are not allowed"])
        if isinstance(event, events.DocumentStartEvent) and (event.version or event.tags):
            raise ConfigError([f"{path}:{line}: directives are not allowed"])


def _yaml_lines(path: Path, text: str) -> dict[tuple[str, ...], int]:
    from ruamel.yaml.nodes import MappingNode

    lines = {}

    def note(*keys: Any) -> None:
        line = keys[-1].start_mark.line + 1
        if not all(isinstance(key.value, str) for key in keys):
            raise ConfigError([f"{path}:{line}: a key must be a name"])
        lines[tuple(key.value for key in keys)] = line

    root = _yaml().compose(text)
    for section, content in root.value if isinstance(root, MappingNode) else ():
        note(section)
        for key, _ in content.value if isinstance(content, MappingNode) else ():
            note(section, key)
    return lines


def _dump_yaml(values: Mapping[str, Mapping[str, Any]]) -> str:
    yaml = _yaml()
    yaml.default_flow_style = False
    yaml.width = MAX_BYTES  # no folding
    yaml.allow_unicode = False  # escapes what the reader takes for a line's end, as U+0085
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue] (annotated None)
    out = io.StringIO()
    yaml.dump({section: dict(content) for section, content in values.items()}, out)
    return out.getvalue()


# gin -------------------------------------------------------------------------------------------------------------


def _read_gin(path: Path, text: str) -> Entries:
    macros: dict[str, Entry] = {}
    entries: Entries = {}
    errors: list[str] = []
    for keys, value, place in _gin_bindings(path, text, path.resolve().parent, (path.resolve(),), errors):
        if len(keys) == 1:
            macros[keys[0]] = Entry(value, place)
        else:
            entries[keys] = Entry(value, place)
    resolved = {keys: Entry(_expand(e.value, macros, e.place, errors), e.place) for keys, e in entries.items()}
    used = {name for entry in (*entries.values(), *macros.values()) for name in _macros_in(entry.value)}
    unused = [(name, entry.place) for name, entry in macros.items() if name not in used]
    errors += [f"{place}: {name}: no section.key, and no macro in use" for name, place in unused]
    if errors:
        raise ConfigError(errors)
    return resolved


class _Macro(NamedTuple):
    name: str


def _macros_in(value: Any) -> Iterator[str]:
    if isinstance(value, _Macro):
        yield value.name
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _macros_in(item)


def _expand(value: Any, macros: Mapping[str, Entry], place: str, errors: list[str], depth: int = 0) -> Any:
    """Replaces %macros by their values."""
    if isinstance(value, _Macro):
        if value.name not in macros or depth > MAX_DEPTH:
            errors.append(f"{place}: %{value.name} is {'defined by itself' if value.name in macros else 'not defined'}")
            return None
        return _expand(macros[value.name].value, macros, place, errors, depth + 1)
    if isinstance(value, list | tuple):
        return type(value)(_expand(item, macros, place, errors, depth) for item in value)
    if isinstance(value, dict):
        return {key: _expand(item, macros, place, errors, depth) for key, item in value.items()}
    return value


def _gin_bindings(
    path: Path, text: str, folder: Path, opened: tuple[Path, ...], errors: list[str]
) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Yields (section, key) or (macro,), value and place of each binding, includes where they stand."""
    from gin import config_parser

    seen: set[tuple[str, ...]] = set()
    for statement in _gin_statements(path, text, errors):
        place = f"{path}:{statement.location.line_num}"
        if isinstance(statement, config_parser.ImportStatement):
            errors.append(f"{place}: import {statement.module}: imports are not allowed")
        elif isinstance(statement, config_parser.IncludeStatement):
            yield from _gin_include(statement.filename, place, path, folder, opened, errors)
        elif isinstance(statement, config_parser.BindingStatement):
            keys = (statement.selector, statement.arg_name) if statement.arg_name else (statement.selector,)
            if statement.scope:
                errors.append(f"{place}: {statement.scope}/{'.'.join(keys)}: scopes are not allowed")
            elif keys in seen:
                errors.append(f"{place}: {'.'.join(keys)}: bound twice")
            seen.add(keys)
            yield keys, statement.value, place


def _gin_include(name: str, place: str, path: Path, folder: Path, opened: tuple[Path, ...], errors: list[str]):
    target = (path.resolve().parent / name).resolve()
    if not target.is_relative_to(folder):
        errors.append(f"{place}: include {name!r}: outside the folder of the config file")
    elif target in opened:
        errors.append(f"{place}: include {name!r}: includes itself")
    else:
        try:
            text = _read_text(target)
        except ConfigError as error:
            errors.extend(f"{place}: include: {line}" for line in error.errors)
            return
        yield from _gin_bindings(path.parent / name, text, folder, (*opened, target), errors)


def _gin_statements(path: Path, text: str, errors: list[str]) -> Iterator[Any]:
    """gin's grammar over the text; what it cannot read ends the file with one error."""
    import tokenize

    from gin import config_parser

    class Delegate(config_parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name, evaluate):
            call = f"@{scoped_configurable_name}{'()' if evaluate else ''}"
            token = parser.current_token
            assert token is not None, call
            errors.append(f"{path}:{token.start[0]}: {call}: references to configurables are not allowed")

        def macro(self, macro_name):
            return _Macro(macro_name)

    try:
        parser = config_parser.ConfigParser(text, Delegate())
        yield from parser
    except SyntaxError as error:
        line = getattr(error.filename, "line_num", None) or error.lineno
        errors.append(f"{path}{f':{line}' if line else ''}: {str(error.msg).splitlines()[0]}")
    except (ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        errors.append(f"{path}: {str(error.args[0] if error.args else error).strip().splitlines()[0]}")


def _dump_gin(values: Mapping[str, Mapping[str, Any]]) -> str:
    lines = (f"{section}.{key} = {value!r}" for section, content in values.items() for key, value in content.items())
    return "\n".join(lines) + "\n"


def _dump_json(values: Mapping[str, Mapping[str, Any]]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
