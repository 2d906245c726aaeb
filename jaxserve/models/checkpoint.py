"""A directory of safetensors, read by rows.

The safetensors library checks every file; the bytes are then read with plain reads, because the pages of a memory
map stay resident and count as ours.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import ModelError
from jaxserve.files import open_regular, read_json

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
PIECE_BYTES = 16 << 20
SAMPLES, SAMPLE_BYTES = 64, 64  # of a tensor's bytes, for the fingerprint
# transformers writes a language model's tensors under any of these; all mean "model."
_LANGUAGE_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Tensor:
    """Where one tensor's bytes are."""

    fd: int
    offset: int
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a model directory under their canonical names; a context manager that holds the files open."""

    def __init__(self, model_dir: Path, ignored: tuple[str, ...] = ()):
        self.tensors: dict[str, Tensor] = {}
        self._fds: list[int] = []
        try:
            for name in _weight_files(model_dir):
                self._add_file(model_dir / name, ignored)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """Refuses missing, unexpected, wrongly shaped and non-float tensors, before any is read."""
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise ModelError(f"weights: {missing[0]} is missing{_and_others(missing)}")
        unexpected = sorted(set(self.tensors) - set(expected) - set(optional))
        if unexpected:
            raise ModelError(f"weights: {unexpected[0]} is not part of this architecture{_and_others(unexpected)}")
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise ModelError(f"weights: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        for name, tensor in self.tensors.items():
            if tensor.dtype not in DTYPES:
                raise ModelError(f"weights: {name} has dtype {tensor.dtype}; supported: {', '.join(DTYPES)}")

    def read(self, name: str, start: int, columns: slice, out: np.ndarray) -> None:
        """Fills ``out`` with rows from ``start`` on (and these columns of a matrix), cast to its dtype."""
        tensor = self.tensors[name]
        width = int(np.prod(tensor.shape[1:], dtype=np.int64))
        dtype = np.dtype(DTYPES[tensor.dtype])
        row_bytes = width * dtype.itemsize
        rows = max(1, PIECE_BYTES // row_bytes)
        for first in range(0, out.shape[0], rows):
            count = min(rows, out.shape[0] - first)
            piece = np.empty((count, *tensor.shape[1:]), dtype)
            _read_exactly(tensor.fd, tensor.offset + (start + first) * row_bytes, piece.reshape(-1).view(np.uint8))
            with np.errstate(over="ignore"):  # overflow is reported once the array is complete
                out[first : first + count] = piece[:, columns] if piece.ndim > 1 else piece

    def fingerprint(self) -> bytes:
        """sha256 over every tensor's name, dtype, shape and bytes at SAMPLES places: other weights have another one,
        and a large model's takes no time."""
        hasher = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            hasher.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            size = int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(DTYPES[tensor.dtype]).itemsize
            for place in np.linspace(0, max(size - SAMPLE_BYTES, 0), SAMPLES, dtype=np.int64).tolist():
                hasher.update(os.pread(tensor.fd, min(SAMPLE_BYTES, size), tensor.offset + place))
        return hasher.digest()

    def same(self, a: str, b: str) -> bool:
        """Whether two matrices hold equal numbers; reads a piece of each at a time."""
        rows, width = self.tensors[a].shape
        step = max(1, PIECE_BYTES // (width * 8))
        for start in range(0, rows, step):
            piece = np.empty((2, min(step, rows - start), width), np.float64)
            self.read(a, start, slice(None), piece[0])
            self.read(b, start, slice(None), piece[1])
            if not np.array_equal(piece[0], piece[1]):
                return False
        return True

    def _add_file(self, path: Path, ignored: tuple[str, ...]) -> None:
        fd = open_regular(path)
        self._fds.append(fd)
        try:
            with safe_open(path, framework="numpy"):
                pass  # the library has now checked the header against the file
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path.name}: not a valid safetensors file: {error}") from None
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        header = bytearray(length)
        _read_exactly(fd, 8, np.frombuffer(header, np.uint8))
        for stored, entry in json.loads(bytes(header), object_pairs_hook=_unique_keys).items():
            if stored == "__metadata__" or stored.startswith(ignored) or stored.endswith(".rotary_emb.inv_freq"):
                continue
            name = canonical(stored)
            if name in self.tensors:
                raise ModelError(f"{path.name}: {stored} is stored twice")
            begin, _ = entry["data_offsets"]
            self.tensors[name] = Tensor(fd, 8 + length + begin, entry["dtype"], tuple(entry["shape"]))


def canonical(name: str) -> str:
    """The name a plain causal language model would store this tensor under."""
    if name.removeprefix("language_model.").startswith("lm_head."):
        return name.removeprefix("language_model.")
    for prefix in _LANGUAGE_PREFIXES:
        if name.startswith(prefix):
            return "model." + name[len(prefix) :]
    return "model." + name


def has_weights(model_dir: Path) -> bool:
    """Whether there is a file of weights, or an index of several."""
    return any((model_dir / name).exists() for name in _WEIGHTS)


def _weight_files(model_dir: Path) -> list[str]:
    """The one file, or the shards that the index lists."""
    single, index = _WEIGHTS
    if (model_dir / single).exists():
        return [single]
    if not (model_dir / index).exists():
        pickles = sorted(path.name for path in model_dir.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
        raise ModelError(f"weights: neither {single} nor {index} in the model directory{hint}")
    weight_map = read_json(model_dir / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map is missing")
    files = list(dict.fromkeys(str(name) for name in weight_map.values()))
    for name in files:
        if name != os.path.basename(name) or not name.endswith(".safetensors") or not name.isprintable():
            raise ModelError(f"{index}: {name!r} is not the name of a safetensors file in this directory")
    return files


def _read_exactly(fd: int, offset: int, out: np.ndarray) -> None:
    view = memoryview(out)  # pyright: ignore[reportArgumentType]
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise ModelError("weights: a file became shorter while it was read")
        view, offset = view[count:], offset + count


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ModelError(f"weights: {twice[0]} appears twice in a safetensors header")
    return dict(pairs)


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""
