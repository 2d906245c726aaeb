"""Reads the files of a model directory: regular files of bounded size, never blocking on a pipe or device."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from jaxserve.errors import InvalidRequest, ModelError

MAX_JSON_BYTES = 64 << 20


def directory(path: str | os.PathLike) -> Path:
    """Checks that a model directory is one.

    Raises:
      ModelError: it is not.
    """
    if not Path(path).is_dir():
        raise ModelError(f"{os.fspath(path)}: not a model directory")
    return Path(path)


def checked_directory(path: Any) -> Path:
    """The path of a directory that is read or made. Raises InvalidRequest."""
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise InvalidRequest(f"directory is {str(path)[:64]!r}; it must be the path of a directory", "directory")
    return Path(path)


def open_regular(path: Path) -> int:
    """Returns a descriptor. Links are followed, because model caches are made of them.

    Raises:
      ModelError: not there, not readable, not a regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"{path.name}: {error.strerror or error} in the model directory") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelError(f"{path.name}: not a regular file")
    return fd


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """Reads UTF-8 text of at most ``limit`` bytes.

    Raises:
      ModelError: as ``open_regular``; too big; not UTF-8.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ModelError(f"{path.name}: larger than {limit} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ModelError(f"{path.name}: not UTF-8") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ModelError: as ``read_text``; not a JSON object.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name}: must hold a JSON object")
    return value
