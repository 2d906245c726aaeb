"""Opens the files of an untrusted directory: regular files only, never blocking, and strict JSON.

Files are opened by name below one directory descriptor, so that nothing is swapped between the check and the read.
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxserve.adapters.fields import show
from jaxserve.errors import AdapterError

MAX_JSON_DEPTH = 16
MAX_JSON_ITEMS = 50_000
NO_LINKS = ": make a copy without links, with `cp -rL` or `hf download --local-dir`"

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISREG, "a regular file"),
)


def _kind(mode: int) -> str:
    return next((kind for holds, kind in _KINDS if holds(mode)), "no regular file")


@contextlib.contextmanager
def open_directory(path: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor of the directory ``path``. Raises AdapterError: missing, not a directory, a link, not readable."""
    try:
        text = os.fspath(path).rstrip("/") or "/"
        mode = os.lstat(text).st_mode
        if not stat.S_ISDIR(mode):
            hint = NO_LINKS if stat.S_ISLNK(mode) else ""
            raise AdapterError(f"adapter path {show(text)} is {_kind(mode)}, not a directory{hint}", "path")
        descriptor = os.open(text, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AdapterError(f"adapter directory {show(os.fspath(path))} does not exist", "path") from None
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, AdapterError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise AdapterError(f"adapter directory {show(path)} cannot be opened: {reason}", "path") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def exists(directory: int, name: str) -> bool:
    """Whether there is anything of that name; it is not opened."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def open_regular(directory: int, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """(file, size in bytes) of a regular file of the directory. Raises AdapterError for anything else."""
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode):
            hint = NO_LINKS if stat.S_ISLNK(mode) else ""
            raise AdapterError(f"{name} is {_kind(mode)}, not a regular file{hint}", name)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(name, flags, dir_fd=directory), "rb")
    except FileNotFoundError:
        raise AdapterError(f"{name} is missing", name) from None
    except OSError as error:
        raise AdapterError(f"{name} cannot be opened: {error.strerror}", name) from None
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{name} is {_kind(status.st_mode)}, not a regular file", name)
        yield file, status.st_size


def strict_json(raw: bytes, name: str) -> Any:
    """Parses UTF-8 JSON without NaN, infinities, duplicate keys, lone surrogates or deep nesting.

    Raises:
      AdapterError: ``raw`` is anything else; ``name`` says in the message what it is.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
        _check_size(value)
    except RecursionError:
        raise AdapterError(f"{name}: nested too deeply", name) from None
    except ValueError as error:  # decoding and JSON errors are ValueErrors
        raise AdapterError(f"{name}: not valid JSON: {show(str(error), 160)[1:-1]}", name) from None
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate key {show(twice)}")
    return table


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {show(text)} is too large")
    return value


def _check_size(value: Any) -> None:
    level, count = [value], 0
    for _ in range(MAX_JSON_DEPTH + 1):
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following.extend(item.keys())
                following.extend(item.values())
            elif isinstance(item, list):
                following.extend(item)
            elif isinstance(item, str):
                item.encode("utf-8")  # a lone surrogate raises
        count += len(following)
        if count > MAX_JSON_ITEMS:
            raise ValueError(f"more than {MAX_JSON_ITEMS} items")
        if not following:
            return
        level = following
    raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep")
