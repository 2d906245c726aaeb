"""Kernels that are lowered once, not once for every program that calls them.

A step of 32 layers has some 45 kernels, each of which Mosaic takes a tenth to a half of a second of Python to lower, and
an engine has dozens of such programs. JAX keeps compiled programs on disk, but to find one it has to lower it first. So
an op is exported (``jax.export``) for each set of shapes, a program gets what was exported, and where JAX keeps its
programs the exported ones are kept as well: the next start lowers no kernel at all.

Exported ops have the same custom calls and aliases as traced ones, and compile to the same programs.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax import export

logger = logging.getLogger(__name__)

CUSTOM_CALLS = ("mosaic_gpu_v2",)  # of Mosaic's kernels: JAX promises nothing of them, so the files name its version
KEPT_BYTES = 256 << 20  # on disk, at most
_exported: dict[Any, export.Exported] = {}


def call(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """``function(*args, **settings)``, a pure function of the arrays among them, as part of a program for CUDA."""
    leaves, tree = jax.tree.flatten((args, settings))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    fixed = tuple(None if _is_array(leaf) else leaf for leaf in leaves)
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=jax.sharding.get_abstract_mesh().abstract_device)
    config = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    key = f"{function.__module__}.{function.__qualname__}", tree, fixed, shapes, mesh.abstract_device, config

    def on_arrays(*arrays: jax.Array) -> Any:
        array = iter(arrays)
        args, settings = tree.unflatten([next(array) if _is_array(leaf) else leaf for leaf in leaves])
        return function(*args, **settings)

    if key not in _exported:
        path = _path(key)
        if (kept := path and _read(path)) is None:
            checks = [export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
            with jax.sharding.use_abstract_mesh(mesh):
                kept = export.export(jax.jit(on_arrays), platforms=["cuda"], disabled_checks=checks)(*shapes)
            if path:
                _write(path, kept.serialize())
        _exported[key] = kept
    return _exported[key].call(*arrays)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


# on disk


def _path(key: Any) -> Path | None:
    """Where an op of this key is kept, if JAX keeps its programs in a directory of this machine."""
    directory = jax.config.jax_compilation_cache_dir
    if not jax.config.jax_enable_compilation_cache or not directory or "://" in directory:
        return None
    versions = jax.__version__, jaxlib.__version__, _sources()
    return Path(directory) / "kernels" / f"{hashlib.sha256(repr((versions, key)).encode()).hexdigest()}.jax_export"


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


def _write(path: Path, content: bytes | bytearray) -> None:
    """Whole or not at all; the ones that were used least recently make room."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = sorted(path.parent.glob("*.jax_export"), key=lambda other: other.stat().st_mtime)
        excess = sum(other.stat().st_size for other in others) + len(content) - KEPT_BYTES
        for other in others:
            if excess <= 0:
                break
            excess -= other.stat().st_size
            other.unlink()
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        logger.info("a lowered kernel is not kept: %s", error)
