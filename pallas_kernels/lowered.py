"""Kernels that are lowered once, not once for every program that calls them.

A step has some 45 kernels, each takes Mosaic a tenth to a half of a second of Python to lower, and an engine has dozens
of such programs. JAX keeps compiled programs on disk, but to find one it has to lower it first. So an op is exported
(``jax.export``) for each set of shapes, programs get what was exported, and where JAX keeps its programs the exported
ops are kept too: the next start lowers no kernel at all.

An exported op has the custom calls and aliases of a traced one, and what it is part of compiles to the same program.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax import export

logger = logging.getLogger(__name__)

CUSTOM_CALLS = ("mosaic_gpu_v2",)  # of Mosaic's kernels: JAX promises nothing of them, so the files name its version
OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision")  # of JAX, under which an op is another one
SUFFIX = ".jax_export"
KEPT_BYTES = 512 << 20  # on disk, at most
_exported: dict[Any, export.Exported] = {}


def call(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """``function(*args, **settings)``, a pure function of the arrays among them, as part of a program for CUDA."""
    leaves, tree = jax.tree.flatten((args, settings))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    fixed = tuple(None if _is_array(leaf) else leaf for leaf in leaves)  # None for arrays alone: JAX has no such leaf
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
    name = f"{function.__module__}.{function.__qualname__}"
    options = tuple(jax.config.values[option] for option in OPTIONS)
    key = name, tree, fixed, shapes, jax.sharding.get_abstract_mesh(), options

    def on_arrays(*arrays: jax.Array) -> Any:
        array = iter(arrays)
        args, settings = tree.unflatten(next(array) if leaf is None else leaf for leaf in fixed)
        return function(*args, **settings)

    if key not in _exported:
        path = _path(key)
        if (kept := path and _read(path)) is None:
            checks = [export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
            kept = export.export(jax.jit(on_arrays), platforms=["cuda"], disabled_checks=checks)(*shapes)
            if path:
                _write(path, kept)
        _exported[key] = kept
    return _exported[key].call(*arrays)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


# on disk


def _path(key: Any) -> Path | None:
    """Where an op of this key is kept, if JAX keeps its programs in a directory of this machine. jax.export writes with
    flatbuffers, which JAX itself does not ask for."""
    directory, on = (jax.config.values[f"jax_{name}"] for name in ("compilation_cache_dir", "enable_compilation_cache"))
    if not on or not directory or "://" in directory or find_spec("flatbuffers") is None:
        return None
    made_by = version("jax"), version("jaxlib"), _sources()
    return Path(directory) / "kernels" / f"{hashlib.sha256(repr((made_by, key)).encode()).hexdigest()}{SUFFIX}"


@cache
def _sources() -> str:
    """A digest of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> export.Exported | None:
    try:
        kept = export.deserialize(bytearray(path.read_bytes()))
        os.utime(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file, or one of another format, is made again
        logger.warning("%s cannot be read and is made again: %s", path, error)
        return None
    return kept


def _write(path: Path, op: export.Exported) -> None:
    """Whole or not at all; the ones that were used least recently make room."""
    content = op.serialize()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = sorted(path.parent.glob(f"*{SUFFIX}"), key=lambda other: other.stat().st_mtime)
        excess = sum(other.stat().st_size for other in others) + len(content) - KEPT_BYTES
        for other in others:
            if excess <= 0:
                break
            excess -= other.stat().st_size
            other.unlink()
        partial = path.with_suffix(f".{os.getpid()}{SUFFIX}")
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        logger.info("a lowered kernel is not kept: %s", error)
