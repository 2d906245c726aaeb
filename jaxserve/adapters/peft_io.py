"""Reads and writes PEFT adapter directories: adapter_config.json and adapter_model.safetensors.

The directory is not trusted. Nothing but these two files is opened; the configuration decides which tensors there
must be, the header is compared with that before any data is read, and both have to agree to the last name and shape.
"""

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxserve.adapters import fields, files
from jaxserve.adapters.fields import CONFIG_FILE, MAX_RANK, show
from jaxserve.adapters.lora import PREFIX
from jaxserve.adapters.method import Method, method_of, named
from jaxserve.adapters.targets import VISION, respelled
from jaxserve.adapters.weights import MEMBERS, AdapterWeights, Key, ModelShape, module_name
from jaxserve.errors import AdapterError
from jaxserve.models.config import member_dims

TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096
# Trained entries are of the order of 1e-3 to 10. Beyond 1e4 a file is damaged or hostile, and the products of such
# entries would leave float16 and, soon, float32.
MAX_ABS = 1e4
BASE_DIGEST_KEY = "jaxserve.base_digest"  # in the file's metadata: the model the adapter was trained on

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def load_peft(
    path: str | os.PathLike[str],
    model: ModelShape,
    *,
    max_rank: int = MAX_RANK,
    base_digest: bytes | None = None,
) -> AdapterWeights:
    """Reads the PEFT directory ``path`` as an adapter of ``model``.

    ``base_digest`` is compared with the one in the file if both are there. A refused file is answered without reading
    its data, but for values out of range.

    Raises:
      AdapterError: what is wrong and where, in one line; ``field`` is the key, tensor or file.
    """
    with files.open_directory(path) as directory:
        config = _read_config(directory)
        method = method_of(config)
        fields.check(config, method.FIELDS)
        if not files.exists(directory, TENSOR_FILE) and files.exists(directory, PICKLE_FILE):
            raise AdapterError(f"{PICKLE_FILE} is a pickle and is never opened; save as {TENSOR_FILE}", PICKLE_FILE)
        with files.open_regular(directory, TENSOR_FILE) as (file, size):
            return _read_tensors(file, size, config, method, model, max_rank, base_digest)


def check_base(found: bytes | None, own: bytes | None) -> None:
    """Raises AdapterError where an adapter's base model and this one are known, and differ."""
    if found is not None and own is not None and found != own:
        raise AdapterError(
            f"adapter was trained on base model {found.hex()[:12]}..., this one is {own.hex()[:12]}...", "base_digest"
        )


def check_fit(weights: AdapterWeights, model: ModelShape) -> None:
    """Raises AdapterError where weights held in memory adapt what this model has not, or has in another size."""
    dims = member_dims(model)
    found: list[tuple[Key, str, int]] = []
    for key, pair in weights.pairs.items():
        found += [(key, "inputs", pair.a.shape[1]), (key, "outputs", pair.b.shape[0])]
    for key, vector in weights.vectors.items():
        found.append((key, "inputs" if vector.kind == "input_scale" else "outputs", len(vector.value)))
    for (layer, member), side, size in found:
        if member not in dims:
            raise AdapterError(f"{member!r} is adapted; the model has {', '.join(dims)}", "weights")
        name, expected = module_name(layer, member, weights.root), dims[member][side == "outputs"]
        if not 0 <= layer < model.num_layers:
            raise AdapterError(f"{name} is adapted; the model has {model.num_layers} layers", "weights")
        if size != expected:
            raise AdapterError(f"{name} is adapted for {size} {side}; the model's has {expected}", "weights")


def _read_config(directory: int) -> dict[str, Any]:
    with files.open_regular(directory, CONFIG_FILE) as (file, size):
        if size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{CONFIG_FILE}: {size} bytes, at most {MAX_CONFIG_BYTES}", CONFIG_FILE)
        config = files.strict_json(file.read(MAX_CONFIG_BYTES), CONFIG_FILE)
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_FILE}: a {type(config).__name__}, must be an object", CONFIG_FILE)
    return config


def _check_rank(expected: Mapping[str, tuple[int, ...]], max_rank: int) -> None:
    for name, shape in expected.items():
        if name.endswith("lora_A.weight") and shape[0] > max_rank:
            raise AdapterError(f"{CONFIG_FILE}: rank {shape[0]} of {name} exceeds max_rank {max_rank}", "r")


def _read_tensors(
    file: BinaryIO,
    size: int,
    config: dict[str, Any],
    method: Method,
    model: ModelShape,
    max_rank: int,
    base_digest: bytes | None,
) -> AdapterWeights:
    start, header = _read_header(file, size)
    metadata = header.pop("__metadata__", {})
    root = _root(header, model)
    if root != model.module_roots[0]:
        config = respelled(config, model, root)
    expected = method.shapes(config, model)
    _check_rank(expected, max_rank)
    names = {_filed(name, model, root): name for name in expected}
    _check_header(header, {filed: expected[name] for filed, name in names.items()}, model, root)
    found_digest = _base_digest(metadata)
    check_base(found_digest, base_digest)
    _check_extent(header, size - len(start))
    tensors = _parse(start + file.read(size - len(start)))
    stored = {str(tensor.dtype) for tensor in tensors.values()}
    weights = method.read(config, {names[name]: _checked(name, tensor) for name, tensor in tensors.items()}, model)
    return replace(weights, base_digest=found_digest, stored=stored.pop() if len(stored) == 1 else "float32")


def _root(header: Mapping[str, Any], model: ModelShape) -> str:
    """What the file calls the decoder; the model's own word where it names no layer of one."""
    for root in model.module_roots:
        if any(name.startswith(f"{PREFIX}{root}.layers.") for name in header):
            return root
    return model.module_roots[0]


def _filed(name: str, model: ModelShape, root: str) -> str:
    return PREFIX + root + name.removeprefix(PREFIX + model.module_roots[0])


def _read_header(file: BinaryIO, size: int) -> tuple[bytes, dict[str, Any]]:
    """(the file's first bytes up to the data, the header). Raises AdapterError."""
    length = file.read(8)
    if len(length) < 8:
        raise _tensor_file_error(f"{size} bytes, too short for a header")
    (header_size,) = struct.unpack("<Q", length)
    if header_size > min(MAX_HEADER_BYTES, size - 8):
        raise _tensor_file_error(f"header of {header_size} bytes in a file of {size}, at most {MAX_HEADER_BYTES}")
    raw = file.read(header_size)
    if raw.count(b'"dtype"') > MAX_TENSORS or raw.count(b"{") > 2 * MAX_TENSORS:
        raise _tensor_file_error(f"more than {MAX_TENSORS} tensors")
    header = files.strict_json(raw, f"{TENSOR_FILE} header")
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise _tensor_file_error("header is not a table of tensors")
    return length + raw, header


def _tensor_file_error(what: str) -> AdapterError:
    return AdapterError(f"{TENSOR_FILE}: {what}", TENSOR_FILE)


def _check_header(
    header: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], model: ModelShape, root: str
) -> None:
    for name, entry in header.items():
        _check_entry(name, entry)
    extra = sorted(header.keys() - expected.keys())
    if extra:
        raise _tensor_error(extra[0], _why_extra(extra[0], model, root), len(extra) - 1)
    missing = sorted(expected.keys() - header.keys())
    if missing:
        raise _tensor_error(missing[0], "missing, the configuration asks for it", len(missing) - 1)
    for name, shape in expected.items():
        found = tuple(header[name]["shape"])
        if found != shape:
            hint = " (transposed)" if found == shape[::-1] else ""
            raise _tensor_error(name, f"shape {list(found)}{hint}, expected {list(shape)} for this model and rank")


def _tensor_error(name: str, what: str, others: int = 0) -> AdapterError:
    more = f" (and {others} more)" if others else ""
    return AdapterError(f"{TENSOR_FILE}: tensor {show(name, 160)}: {what}{more}", name)


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _tensor_error(name, f"header entry has keys {show(sorted(entry))}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise _tensor_error(name, f"dtype {show(entry['dtype'])}, must be F32, BF16 or F16")
    for key in ("shape", "data_offsets"):
        numbers = entry[key]
        if not isinstance(numbers, list) or not all(fields.is_integer(n) and n >= 0 for n in numbers):
            raise _tensor_error(name, f"{key} {show(numbers)} is not a list of sizes")
    if 0 in entry["shape"]:
        raise _tensor_error(name, f"shape {entry['shape']} holds nothing")
    if len(entry["data_offsets"]) != 2:
        raise _tensor_error(name, f"data_offsets {show(entry['data_offsets'])} are not two")


def _why_extra(name: str, model: ModelShape, root: str) -> str:
    if not set(VISION).isdisjoint(name.split(".")):
        return "of the vision half; only adapters of the language model are served, train it with the rest excluded"
    if "lm_head" in name or "embed_tokens" in name:
        return "adapters of lm_head and embed_tokens are not supported"
    parts = name.removeprefix(f"{PREFIX}{root}.layers.").split(".")
    if len(parts) > 2 and parts[0].isdecimal() and len(parts[0]) < 10 and int(parts[0]) >= model.num_layers:
        return f"layer {int(parts[0])}, the model has layers 0 to {model.num_layers - 1}"
    if len(parts) > 3 and parts[0].isdecimal() and parts[2] in MEMBERS:
        return "not among what target_modules and the other options name"
    return f"not expected; names must be as PEFT writes them for a decoder with {root}.layers.N"


def _base_digest(metadata: Mapping[str, Any]) -> bytes | None:
    text = metadata.get(BASE_DIGEST_KEY)
    if text is None:
        return None
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        raise _tensor_file_error(f"metadata {BASE_DIGEST_KEY} is {show(text)}, must be hexadecimal") from None


def _check_extent(header: Mapping[str, Any], data_bytes: int) -> None:
    needed = sum(int(np.prod(entry["shape"])) * _DTYPES[entry["dtype"]].itemsize for entry in header.values())
    if needed != data_bytes:
        raise _tensor_file_error(f"{data_bytes} bytes of data, the header describes {needed}: truncated or padded")


def _parse(raw: bytes) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        raise _tensor_file_error(show(str(error), 160)[1:-1]) from None
    return {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"]) for name, entry in entries
    }


def _checked(name: str, tensor: np.ndarray) -> np.ndarray:
    """The tensor as float32. Raises AdapterError for NaN, infinities and absurd sizes."""
    values = tensor.astype(np.float32)
    if values.min() >= -MAX_ABS and values.max() <= MAX_ABS:  # false for NaN
        return values
    if not np.isfinite(values).all():
        raise _tensor_error(name, "holds NaN or infinity")
    raise _tensor_error(name, f"holds {np.abs(values).max():.3g}, at most {MAX_ABS:.0e} in size")


def save_peft(weights: AdapterWeights, path: str | os.PathLike[str]) -> None:
    """Writes a PEFT directory, made if need be, that PEFT and ``load_peft`` read back bit for bit.

    The configuration is taken away first and written last: a save that was cut short is a directory without one,
    never a mixture of two adapters.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    config, tensors = named(weights.method).write(weights)
    dtype = {str(each): each for each in _DTYPES.values()}[weights.stored]
    metadata = {"format": "pt"}
    if weights.base_digest is not None:
        metadata[BASE_DIGEST_KEY] = weights.base_digest.hex()
    stored = {name: np.ascontiguousarray(tensor.astype(dtype)) for name, tensor in tensors.items()}
    with contextlib.suppress(FileNotFoundError):
        os.unlink(directory / CONFIG_FILE)
    _write(directory / TENSOR_FILE, _in_order(safetensors.numpy.save(stored, metadata)))
    _write(directory / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode())


def _in_order(content: bytes) -> bytes:
    """The same file with its metadata in order: safetensors writes them in one that differs between processes, and an
    adapter that is the same should be the same file."""
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= size - 8, f"{len(text)=} {size=}"
    return content[:8] + text.ljust(size - 8) + content[size:]


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
