"""Numbered directories that are whole or absent, whenever the process dies and whatever the disk does.

A directory is filled under a temporary name, flushed file by file, closed by a manifest with the SHA-256 of every file
and of itself, and renamed. What does not agree with its manifest to the last bit is not there.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve import faults
from jaxserve.finetune.errors import CheckpointError

FORMAT = 1
MANIFEST, LOCK = "MANIFEST", "LOCK"
MAX_STEP = 10**10 - 1
MAX_MANIFEST_BYTES = 16 << 20
LOCK_ATTEMPTS, LOCK_SECONDS = 3, 0.02
_STEP = re.compile(r"step-([0-9]{10})")
_TENSORSTORE_ERRNO = re.compile(r"os_error_code='([0-9]{1,4})'")
_TEMPORARY = re.compile(r"\.tmp-[0-9]{10}-[0-9a-f]{8}")

OnEvent = Callable[[str, str], None]  # (kind, what happened)


def ignore_event(kind: str, message: str) -> None:
    """For callers that do not listen."""


@dataclass(frozen=True)
class Committed:
    """One verified directory."""

    step: int
    path: Path


class Damaged(ValueError):
    """A directory that does not agree with its manifest."""


def newest(root: str | os.PathLike[str], on_event: OnEvent = ignore_event) -> Committed | None:
    """The newest whole directory; damaged ones are passed over, each with a ``damaged`` event.

    Needs no permission to write. ``root`` may be a link, or not exist.

    Raises:
      CheckpointError: ``newer_format``, the newest was written by a later version; ``storage``, not readable.
    """
    for step, path in sorted(_steps(Path(root), on_event), reverse=True):
        if _is_whole(path, step, on_event):
            return Committed(step, path)
    return None


class StepStore:
    """Writes the numbered directories below ``root``; one process at a time.

    Raises:
      CheckpointError: ``busy``, ``newer_format``, or ``storage``: not a directory that can be written.
    """

    def __init__(self, root: str | os.PathLike[str], keep: int, on_event: OnEvent = ignore_event):
        assert keep >= 1, keep
        self.root = Path(os.path.realpath(root))
        self._keep = keep
        self._on_event = on_event
        self._lock = _locked(self.root)
        try:
            self._remove_leftovers()
            self._whole = {step for step, path in _steps(self.root, on_event) if _is_whole(path, step, on_event)}
        except BaseException:
            self.close()
            raise

    def save(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Makes directory ``step`` with the files that ``fill`` writes into an empty one; then drops old ones.

        Raises:
          CheckpointError: ``storage``: it was not made, nothing older was dropped. A call that failed is never taken
            for success later on.
        """
        self._check_step(step)
        temporary, final = self._temporary(step), self._final(step)
        try:
            self._write(temporary, final, step, fill)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"checkpoint {step} was not written: {_reason(error)}", "storage", _errno(error)
            ) from error
        self._whole.add(step)
        self._drop_old()
        return final

    def close(self) -> None:
        """Lets others write."""
        os.close(self._lock)

    def _final(self, step: int) -> Path:
        return self.root / f"step-{step:010d}"

    def _temporary(self, step: int) -> Path:
        return self.root / f".tmp-{step:010d}-{secrets.token_hex(4)}"

    def _check_step(self, step: int) -> None:
        last = max(self._whole, default=-1)
        if not last < step <= MAX_STEP:
            raise CheckpointError(f"checkpoint {step}: must be above {last}, the last one, to {MAX_STEP}", "storage")

    def _write(self, temporary: Path, final: Path, step: int, fill: Callable[[Path], None]) -> None:
        faults.hit("ckpt.begin")
        _mkdir(temporary)
        fill(temporary)
        faults.hit("ckpt.before_fsync")
        manifest = {"format": FORMAT, "step": step, "files": _flush(temporary)}
        faults.hit("ckpt.before_manifest")
        write_file(temporary / MANIFEST, _sealed(manifest))
        _fsync(temporary)
        faults.hit("ckpt.before_rename")
        if final.exists():  # damaged, or it would be in _whole
            os.rename(final, self._temporary(step))
        _rename(temporary, final)
        try:
            faults.hit("ckpt.after_rename")
            _fsync(self.root)
        except BaseException:
            os.rename(final, temporary)  # the name may not outlast the machine: it was never given
            raise

    def _drop_old(self) -> None:
        """Removes what is older than the newest ``keep``; a failure costs space, no checkpoint."""
        try:
            faults.hit("ckpt.committed")
            first_kept = sorted(self._whole)[-self._keep :][0]
            for step, path in list(_steps(self.root, ignore_event)):
                if step < first_kept:
                    self._remove(step, path)
        except Exception as error:
            self._on_event("not_removed", f"an old checkpoint stays: {_reason(error)}")

    def _remove(self, step: int, path: Path) -> None:
        temporary = self._temporary(step)
        _rename(path, temporary)
        self._whole.discard(step)
        with suppress(FileNotFoundError):
            os.unlink(temporary / MANIFEST)
        faults.hit("ckpt.mid_delete")
        shutil.rmtree(temporary)

    def _remove_leftovers(self) -> None:
        """What a killed process left: names of our pattern only, and nobody else holds the lock."""
        for entry in list(os.scandir(self.root)):
            if _TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a new file and flushes it to the disk. Raises OSError."""
    with open(path, "xb") as file:
        faults.hit("fs.write")
        file.write(content)
        file.flush()
        _fsync_descriptor(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whose readers see the old content or the new one, also after a crash. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        faults.hit("fs.write")
        file.write(content)
        file.flush()
        _fsync_descriptor(file.fileno())
    _rename(partial, path)


def _locked(root: Path) -> int:
    """A descriptor that holds the directory's lock."""
    try:
        if not root.is_dir():
            _mkdir(root, parents=True)
            _fsync(root.parent)
        descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"{root}: checkpoints cannot be written here: {_reason(error)}", "storage", error.errno
        ) from error
    for attempts_left in reversed(range(LOCK_ATTEMPTS)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if not attempts_left:
                os.close(descriptor)
                raise CheckpointError(f"{root}: another process writes checkpoints here", "busy", error.errno) from None
            time.sleep(LOCK_SECONDS)  # somebody may only be looking whether it is held
    return descriptor


def _steps(root: Path, on_event: OnEvent) -> Iterator[tuple[int, Path]]:
    """(step, path) of every directory of our names; others are left alone, with an event."""
    try:
        entries = list(os.scandir(root))
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be read: {_reason(error)}", "storage", error.errno) from error
    for entry in entries:
        match = _STEP.fullmatch(entry.name)
        if match and entry.is_dir(follow_symlinks=False):
            yield int(match[1]), root / entry.name
        elif entry.name != LOCK and not _TEMPORARY.fullmatch(entry.name):
            on_event("unknown_name", f"{entry.name!r} is no checkpoint and is left alone")


def _is_whole(path: Path, step: int, on_event: OnEvent) -> bool:
    try:
        verify(path, step)
    except Damaged as error:
        on_event("damaged", f"checkpoint {step} is passed over: {error}")
        return False
    return True


def verify(path: Path, step: int) -> None:
    """Compares a directory with its manifest.

    Raises:
      Damaged: in what they differ.
      CheckpointError: ``newer_format``.
    """
    try:
        manifest = _unsealed(path / MANIFEST)
        if manifest.get("format") != FORMAT:
            _refuse_format(manifest.get("format"), step)
        if manifest.get("step") != step:
            raise Damaged("its manifest is of another step")
        _compare(path, manifest["files"])
    except OSError as error:
        raise Damaged(f"cannot be read: {_reason(error)}") from None


def _refuse_format(found: Any, step: int) -> None:
    if isinstance(found, int) and found > FORMAT:
        text = f"checkpoint {step} has format {found}, this version reads up to {FORMAT}: use a later version"
        raise CheckpointError(text, "newer_format")
    raise Damaged("its manifest has no format")


def _compare(path: Path, wanted: dict[str, list]) -> None:
    found = {str(file.relative_to(path)): file for file in _files(path) if file != path / MANIFEST}
    if found.keys() != wanted.keys():
        name = min(found.keys() ^ wanted.keys())
        raise Damaged(f"{name!r} is {'missing' if name in wanted else 'not in the manifest'}")
    for name, file in found.items():
        if [file.stat().st_size, _sha256(file)] != wanted[name]:
            raise Damaged(f"{name!r} is not what was written")


def _files(path: Path) -> Iterator[Path]:
    """All regular files below ``path``. Raises Damaged: there is something else."""
    for directory, _, names in os.walk(path, onerror=_raise):
        for name in names:  # links to directories come as names of directories and are not walked into
            file = Path(directory, name)
            if not stat.S_ISREG(file.lstat().st_mode):
                raise Damaged(f"{str(file.relative_to(path))!r} is no regular file")
            yield file


def _raise(error: OSError) -> None:
    raise error


def _flush(root: Path) -> dict[str, list]:
    """Brings every file and directory below ``root`` to the disk; returns path to [size, SHA-256]."""
    files = {}
    for directory, _, names in os.walk(root, topdown=False, onerror=_raise):
        for name in names:
            file = Path(directory, name)
            _fsync(file)
            files[str(file.relative_to(root))] = [file.stat().st_size, _sha256(file)]
        _fsync(Path(directory))
    return files


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(manifest: dict[str, Any]) -> bytes:
    body = json.dumps(manifest, sort_keys=True).encode()
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _unsealed(path: Path) -> dict[str, Any]:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise Damaged("its manifest is no regular file")
    with open(path, "rb") as file:
        raw = file.read(MAX_MANIFEST_BYTES)
    body = raw[:-66]  # a line end, 64 hexadecimal digits, a line end
    if raw[-66:] != b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise Damaged("its manifest is not what was written")
    return json.loads(body)


def _mkdir(path: Path, parents: bool = False) -> None:
    faults.hit("fs.mkdir")
    path.mkdir(parents=parents)


def _rename(source: Path, target: Path) -> None:
    faults.hit("fs.rename")
    os.rename(source, target)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _fsync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def _fsync_descriptor(descriptor: int) -> None:
    faults.hit("fs.fsync")
    os.fsync(descriptor)


def _errno(error: BaseException) -> int | None:
    """Of the call that failed; TensorStore, which writes orbax's files, names it in its text alone."""
    told = _TENSORSTORE_ERRNO.search(str(error))
    return int(told[1]) if told else getattr(error, "errno", None)


def _reason(error: BaseException) -> str:
    number = _errno(error)
    text = os.strerror(number) if number is not None else str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
