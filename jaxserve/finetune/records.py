"""Reads training data strictly: JSONL files line by line, or Python values; what is wrong is named by line.

A record is one of {"messages", "tools"} (``finetune.conversations``), {"prompt", "completion"} and {"text"}. What a
user wrote is never repeated in an error, only keys, lines and reasons.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from jaxserve.adapters.fields import show
from jaxserve.adapters.files import strict_json
from jaxserve.errors import AdapterError
from jaxserve.finetune.conversations import Chat, check_keys, check_text, parse_chat
from jaxserve.finetune.errors import DataError

MAX_LINE_BYTES = 1 << 20
MAX_LINES = 10**6
MAX_ERRORS = 10
FORMS = "messages, prompt and completion, or text"

_NOT_JSONL = {  # first bytes -> what the file is instead
    b"\xef\xbb\xbf": "a byte order mark (save as UTF-8 without BOM)",
    b"\xff\xfe": "UTF-16 (save as UTF-8)",
    b"\xfe\xff": "UTF-16 (save as UTF-8)",
    b"\x1f\x8b": "gzip (unpack it first)",
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"PAR1": "Parquet (convert it to JSONL)",
}


@dataclass(frozen=True)
class Completion:
    """Text that continues a prompt; the prompt is not learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Text that is learnt as a whole."""

    text: str


Record = Chat | Completion | Text


class Problems:
    """Collects what is wrong, by place, up to ten; then it gives up."""

    def __init__(self):
        self._lines: list[str] = []

    def add(self, place: str, reason: str) -> None:
        """Raises DataError at the tenth problem."""
        self._lines.append(f"{place}: {reason}")
        if len(self._lines) >= MAX_ERRORS:
            self.check()

    def check(self) -> None:
        """Raises DataError if anything was added."""
        if self._lines:
            raise DataError(self._lines)


def read_lines(path: str | os.PathLike[str], problems: Problems) -> Iterator[tuple[int, bytes]]:
    """Yields (1-based line, its bytes without line end), blank lines left out.

    Lines end in ``\\n`` or ``\\r\\n`` and in nothing else. Memory stays within one line.

    Raises:
      DataError: no regular file, or not JSONL by its first bytes. Lines too long or too many go to ``problems``.
    """
    with _open(path) as file:
        _check_kind(file.peek(8)[:8])  # type: ignore[attr-defined]
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 2):  # a line end is not counted
            number += 1
            if number > MAX_LINES:
                problems.add(f"line {number}", f"more than {MAX_LINES} lines")
                return
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            if len(line) > MAX_LINE_BYTES:
                problems.add(f"line {number}", f"longer than {MAX_LINE_BYTES} bytes")
                _skip_line(file, raw)
            elif line.strip():
                yield number, line


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise DataError([f"data file: {getattr(error, 'strerror', None) or error}"]) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(["data file: not a regular file"])
    return os.fdopen(descriptor, "rb")


def _check_kind(head: bytes) -> None:
    for start, kind in _NOT_JSONL.items():
        if head.startswith(start):
            raise DataError([f"line 1: not JSONL in UTF-8, the file begins as {kind}"])
    if b"\0" in head:
        raise DataError(["line 1: not JSONL in UTF-8, the file begins as UTF-16 or another binary format"])


def _skip_line(file: BinaryIO, last: bytes) -> None:
    while last and not last.endswith(b"\n"):
        last = file.readline(MAX_LINE_BYTES)


def parse_line(line: bytes) -> Record:
    """The record of one line. Raises ValueError with the reason."""
    try:
        value = strict_json(line, "")
    except AdapterError as error:
        raise ValueError(str(error).removeprefix(": ")) from None
    return parse_record(value)


def parse_record(value: Any) -> Record:
    """The record that a parsed line or a Python mapping is. Raises ValueError with the reason."""
    if not isinstance(value, Mapping):
        raise ValueError(f"must be an object with {FORMS}")
    for form, (keys, optional, parse) in _FORMS.items():
        if form in value:
            check_keys(value, keys, optional)
            return parse(value)
    known = {key for keys, *_ in _FORMS.values() for key in keys}
    unknown = [key for key in value if key not in known]
    raise ValueError(f"unknown key {show(unknown[0])}" if unknown else f"needs {FORMS}")


def _completion(value: Mapping[str, Any]) -> Completion:
    prompt, completion = (check_text(key, value[key]) for key in ("prompt", "completion"))
    if not completion:
        raise ValueError("nothing to learn: completion is empty")
    return Completion(prompt, completion)


def _text(value: Mapping[str, Any]) -> Text:
    if not check_text("text", value["text"]):
        raise ValueError("nothing to learn: text is empty")
    return Text(value["text"])


_FORMS = {  # the key that tells -> (keys that it needs, keys that it may have, what makes the record)
    "messages": (("messages",), ("tools", "parallel_tool_calls"), parse_chat),
    "prompt": (("prompt", "completion"), (), _completion),
    "completion": (("prompt", "completion"), (), _completion),
    "text": (("text",), (), _text),
}
