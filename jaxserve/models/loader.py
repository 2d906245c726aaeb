"""Model directories in: configs, and weights streamed onto a mesh.

Names, shapes and sizes are all checked before the first array is made; then the host holds one shard of one
parameter at a time beside the arrays themselves.
"""

import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from jaxserve.errors import ModelError
from jaxserve.files import directory, read_json
from jaxserve.models.checkpoint import DTYPES, Checkpoint, has_weights
from jaxserve.models.config import Fields, ModelConfig
from jaxserve.models.params import ParamSpec, Part, param_specs
from jaxserve.models.registry import FAMILIES
from sharding import named_sharding

SERVED_DTYPES = ("float32", "bfloat16", "float16")
INIT_SCALE = 0.02  # standard deviation of dummy weights


def load_config(model_dir: str | os.PathLike) -> ModelConfig:
    """Reads config.json.

    Raises:
      ModelError: no such directory or file, not JSON, or a model that is not supported.
    """
    return ModelConfig.from_dict(read_json(directory(model_dir) / "config.json"))


def stored_dtype(model_dir: str | os.PathLike) -> str:
    """The dtype config.json names, else that of the first weight; float32 where that is none that can be served."""
    hf = read_json(Path(model_dir) / "config.json")
    text = hf.get("text_config")
    for config in (hf, text if isinstance(text, dict) else {}):
        named = config.get("dtype") or config.get("torch_dtype")
        if named is not None:
            named = str(named).removeprefix("torch.")
            return named if named in SERVED_DTYPES else "float32"
    if not has_weights(directory(model_dir)):  # dummy weights need none
        return "float32"
    with Checkpoint(directory(model_dir)) as checkpoint:
        stored = next((tensor.dtype for tensor in checkpoint.tensors.values()), "F32")
    named = np.dtype(DTYPES.get(stored, np.float32)).name
    return named if named in SERVED_DTYPES else "float32"


def load_generation_config(model_dir: str | os.PathLike) -> dict[str, Any]:
    """Reads generation_config.json; empty where there is none.

    Raises:
      ModelError: not JSON, or an eos_token_id that is neither a token id nor a list of them.
    """
    path = directory(model_dir) / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    Fields(generation, path.name).ids("eos_token_id")
    return generation


def check_tokenizer(config: ModelConfig, tokenizer: Any) -> None:
    """Refuses a tokenizer that can produce ids without an embedding row.

    Tokens named in ``config.unembedded_tokens`` may exist; a prompt that contains one is refused like any id
    outside the vocabulary.
    """
    if tokenizer.vocab_size <= config.vocab_size:
        return
    beyond = {id: token for token, id in tokenizer.vocab.items() if id >= config.vocab_size}
    refused = [id for id, token in beyond.items() if token not in config.unembedded_tokens]
    if refused:
        raise ModelError(
            f"tokenizer is larger than the embedding: token {beyond[max(refused)]!r} has id {max(refused)}, "
            f"vocab_size is {config.vocab_size}"
        )


def load_params(model_dir: str | os.PathLike, config: ModelConfig, mesh: Mesh, dtype: DTypeLike) -> dict[str, Any]:
    """Reads the weights onto the mesh, cast to ``dtype``; ``param_specs`` describes the tree.

    Raises:
      ModelError: a tensor missing, unexpected, of a wrong shape or dtype, or with values that are not finite in
        ``dtype``; a broken file; a model that cannot be split over this mesh.
    """
    specs, dtype = param_specs(config, mesh.size), np.dtype(dtype)
    finite: dict[str, jax.Array] = {}
    with _checkpoint(model_dir, config) as checkpoint:
        checkpoint.check(_expected_shapes(config, specs), optional=("lm_head.weight",))

        def load(spec: ParamSpec) -> jax.Array:
            array = jax.block_until_ready(_load_one(checkpoint, spec, mesh, dtype))
            finite[spec.parts[0].name] = _all_finite(array)
            return array

        params = jax.tree.map(load, specs, is_leaf=_is_spec)
        _check_tied_head(checkpoint, config)
    for name, flag in finite.items():
        if not flag:
            raise ModelError(f"weights: {name}, or a tensor stored with it, is not finite in {dtype.name}")
    return params


def weights_fingerprint(model_dir: str | os.PathLike, config: ModelConfig) -> bytes:
    """Names the weights of a model directory that ``load_params`` has taken: 32 bytes."""
    with _checkpoint(model_dir, config) as checkpoint:
        return checkpoint.fingerprint()


def dummy_params(config: ModelConfig, mesh: Mesh, dtype: DTypeLike, seed: int = 0) -> dict[str, Any]:
    """Random weights made on the devices; the same model for any number of shards.

    Raises:
      ModelError: a model that cannot be split over this mesh.
    """
    leaves, treedef = jax.tree.flatten(param_specs(config, mesh.size), is_leaf=_is_spec)
    arrays = []
    for index, spec in enumerate(leaves):
        # without names, so that equal layers share one compiled program
        parts = tuple(Part("", part.rows, part.kind, part.heads) for part in spec.parts)
        make = _dummy_maker(parts, spec.shape, spec.init, np.dtype(dtype), named_sharding(mesh, spec.axes))
        arrays.append(make(jax.random.fold_in(jax.random.key(seed), index)))
    return jax.tree.unflatten(treedef, arrays)


def _checkpoint(model_dir: str | os.PathLike, config: ModelConfig) -> Checkpoint:
    """The tensors of a model; one that ties its head to the embedding may have stored them under either name."""
    family = FAMILIES[config.architecture]
    checkpoint = Checkpoint(directory(model_dir), family.ignored)
    head, embed = family.names["lm_head"], family.names["embed"]
    if config.tie_word_embeddings and head in checkpoint.tensors and embed not in checkpoint.tensors:
        checkpoint.tensors[embed] = checkpoint.tensors.pop(head)
    return checkpoint


def _is_spec(node: Any) -> bool:
    return isinstance(node, ParamSpec)


_all_finite = jax.jit(lambda x: jnp.isfinite(x).all())


def _expected_shapes(config: ModelConfig, specs: Any) -> dict[str, tuple[int, ...]]:
    """Every checkpoint tensor's shape: a part's rows, and the unsharded columns of the array it goes into."""
    return {
        part.name: (part.rows, *spec.shape[1:])
        for spec in jax.tree.leaves(specs, is_leaf=_is_spec)
        for part in spec.parts
    }


def _load_one(checkpoint: Checkpoint, spec: ParamSpec, mesh: Mesh, dtype: np.dtype) -> jax.Array:
    """Builds one parameter, shard by shard, from the slices each shard holds."""
    sharding = named_sharding(mesh, spec.axes)
    local = sharding.shard_shape(spec.shape)
    shards = []
    for shard, device in enumerate(mesh.devices.flat):
        if device.process_index == jax.process_index():
            shards.append(jax.device_put(_read_shard(checkpoint, spec, local, shard, mesh.size, dtype), device))
            jax.block_until_ready(shards[-1])  # one host buffer at a time
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, shards)


def _read_shard(
    checkpoint: Checkpoint, spec: ParamSpec, local: tuple[int, ...], shard: int, tp: int, dtype: np.dtype
) -> np.ndarray:
    columns = slice(None)
    if len(local) == 2 and local[1] != spec.shape[1]:
        columns = slice(shard * local[1], (shard + 1) * local[1])
    out, row = np.empty(local, dtype), 0
    for part in spec.parts:
        start, stop = part.shard_rows(shard, tp)
        checkpoint.read(part.name, start, columns, out[row : row + stop - start])
        row += stop - start
    out[row:] = 0  # vocabulary padding
    return out


def _check_tied_head(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """A head stored beside a tied embedding must equal it: transformers would otherwise untie them."""
    head = checkpoint.tensors.get("lm_head.weight")
    if head is None or not config.tie_word_embeddings:
        return
    embed = FAMILIES[config.architecture].names["embed"]
    if head.shape != checkpoint.tensors[embed].shape or not checkpoint.same(embed, "lm_head.weight"):
        raise ModelError(f"weights: tie_word_embeddings is true but lm_head.weight differs from {embed}")


@lru_cache(maxsize=64)
def _dummy_maker(parts: tuple[Part, ...], shape: tuple[int, ...], init: str, dtype: np.dtype, sharding: NamedSharding):
    make = partial(_dummy, parts=parts, shape=shape, init=init, dtype=dtype, tp=sharding.mesh.size)
    return jax.jit(make, out_shardings=sharding)


def _dummy(key: jax.Array, *, parts: tuple[Part, ...], shape: tuple[int, ...], init: str, dtype: np.dtype, tp: int):
    if init != "normal":
        return jnp.full(shape, 1 if init == "ones" else 0, dtype)
    tensors = [_normal(jax.random.fold_in(key, i), (part.rows, shape[1]), dtype) for i, part in enumerate(parts)]
    shards = range(1 if parts[0].kind == "replicated" else tp)
    rows = [w_OI[slice(*part.shard_rows(s, tp))] for s in shards for part, w_OI in zip(parts, tensors, strict=True)]
    array = jnp.concatenate(rows)
    return jnp.pad(array, ((0, shape[0] - array.shape[0]), (0, 0)))


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * INIT_SCALE).astype(dtype)
