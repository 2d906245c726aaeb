"""``jaxserve bench memory``: what finetuning must keep, from the compiled programs, method by method.

FlexLLM's ablation (arXiv 2402.18789, section 5) rebuilt: the activations of one sequence where every weight could be
trained and nothing is run again; without what only the gradients of frozen weights ask for; with policies that run more
and more again; with windows, where a sequence keeps its keys, its values and their gradients between steps and
everything else for a window alone; and with a stash, where it keeps its activations between steps as well and nothing
is run twice. All but the first are the engine's own step.

Letters: S tokens of the sequence, W rows of a window, D hidden, I in, O out, R rank, G tokens per page.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.bench import ahead, roofline
from jaxserve.bench.engine import model_path
from jaxserve.bench.plan import first_layers, program_of
from jaxserve.config import Config, EngineConfig
from jaxserve.engine.activations import REMAT, stash_bytes
from jaxserve.engine.buckets import MIN_ROWS, Bucket
from jaxserve.engine.gradient import frozen_head
from jaxserve.engine.sizes import core_config
from jaxserve.engine.specs import train_shape
from jaxserve.errors import ConfigError
from jaxserve.models import decoder
from jaxserve.models.config import ModelConfig
from jaxserve.models.loader import load_config, stored_dtype
from pallas_kernels.cross_entropy import LossRows, loss_and_gradient
from pallas_kernels.numerics import wide_dtype
from pallas_kernels.ragged_paged_attention import (
    AttentionLayout,
    ragged_paged_attention,
    ragged_paged_attention_backward,
)
from pallas_kernels.token_sampling import VocabShard
from sharding import named_sharding

PUBLISHED = {"every weight": 63.0, "frozen": 16.0, "remat": 12.0, "windows": 9.3}  # of FlexLLM, relative to each other
RANK = 16
GB = 1e9


def main(config: Config, device: str, length: int, window: int, layers: int | None, as_json: bool) -> int:
    """Compiles, and prints what was found."""
    path = model_path(config)
    model = load_config(path)
    options = config.engine_config()
    if options.tensor_parallel != 1:
        raise ConfigError([f"engine.tensor_parallel {options.tensor_parallel}: one device is looked at"])
    if options.dtype == "auto":
        options = options.model_copy(update={"dtype": stored_dtype(path)})
    result = {"device": ahead.TARGETS[device]["name"]}
    result |= ablation(model, options, ahead.mesh_of(device, 1), length, window, layers)
    print(json.dumps(result, indent=1) if as_json else "\n".join(lines(result)))
    return 0


def ablation(
    model: ModelConfig, options: EngineConfig, mesh: Mesh, length: int, window: int, layers: int | None = None
) -> dict[str, Any]:
    """Bytes by method, as JSON.

    Args:
      options: dtype is the name of one.
      mesh: one device, there or described. On a CPU the compiler puts work side by side rather than memory to use
        again, and the policies come out alike.
      length: tokens of the sequence; window: gradient rows of a step.
      layers: compile so many layers, and half as many, and go on from there in a straight line: layers are alike, and
        their programs long. None: compile all.

    Raises:
      ConfigError: sizes that do not go together.
    """
    if layers is not None and layers < 2:
        raise ConfigError([f"--layers {layers}: at least 2, because half as many are compiled too"])
    if not 0 < window <= length <= model.max_position_embeddings:
        most = model.max_position_embeddings
        raise ConfigError([f"--window {window}, --length {length}: 1 to the length, which may be {most} at most"])
    dtype = str(options.dtype)
    between = length * roofline.finetune_bytes(model, np.dtype(dtype).itemsize)
    shapes = [model] if layers is None else [first_layers(model, n) for n in (layers // 2, layers)]
    methods: list[tuple[str, str, int, Callable[[ModelConfig], int]]] = [
        ("every weight", "every weight trainable, nothing run again", 0,
         lambda model: _every_weight(model, dtype, length, mesh))
    ]  # fmt: skip
    for rows in dict.fromkeys((length, window)):
        for remat in REMAT:
            kind = "windows" if rows < length else "frozen" if remat == "none" else "remat"
            text = f"{f'windows of {window}' if kind == 'windows' else 'frozen weights pruned'}, remat {remat}"
            step = partial(_step_bytes, options=options, length=length, rows=rows, remat=remat, mesh=mesh)
            methods.append((kind, text, between if kind == "windows" else 0, step))
    stashed = length * stash_bytes(model, np.dtype(dtype).itemsize)
    step = partial(_step_bytes, options=options, length=length, rows=window, remat=None, mesh=mesh)
    methods.append(("stash", f"windows of {window}, a stash", between + stashed, step))
    found = [
        _row(kind, text, _at_all_layers(model, shapes, [compiled(shape) for shape in shapes]), kept)
        for kind, text, kept, compiled in methods
    ]
    unit = found[0]["bytes"] / PUBLISHED["every weight"]
    return {
        "dtype": dtype,
        "layers": model.num_layers,
        "layers_compiled": [shape.num_layers for shape in shapes],
        "tokens": length,
        "window": window,
        "published_units": PUBLISHED,
        "methods": [row | {"units": row["bytes"] / unit} for row in found],
    }


def _at_all_layers(model: ModelConfig, shapes: Sequence[ModelConfig], found: Sequence[int]) -> int:
    """Bytes of the whole model, from those of as many layers as were compiled."""
    if len(found) == 1:
        return found[0]
    (few, many), (less, more) = (shape.num_layers for shape in shapes), found
    return round(more + (more - less) / (many - few) * (model.num_layers - many))


def _row(kind: str, text: str, temporary: int, between: int = 0) -> dict[str, Any]:
    """Temporaries of a step, and what a sequence keeps between two of them."""
    return {
        "kind": kind, "method": text, "temporary_bytes": temporary, "between_steps_bytes": between,
        "bytes": temporary + between,
    }  # fmt: skip


# the engine's step


def _step_bytes(
    model: ModelConfig, options: EngineConfig, length: int, rows: int, remat: str | None, mesh: Mesh
) -> int:
    """Temporaries of a step with so many gradient rows; ``remat`` None: with a stash, and of the step before it, that
    runs them forward, if they are more."""
    pages = -(-length // options.block_size)
    stashed = remat is None
    changed = {"max_model_len": length, "num_kv_pages": pages, "max_num_seqs": MIN_ROWS}
    changed |= {"finetune_window": rows, "finetune_remat": remat, "finetune_stash_tokens": length if stashed else 0}
    changed |= {"max_loras": 1, "max_lora_rank": RANK}
    core = core_config(options.model_copy(update=changed), model, None, mesh)
    grad_rows = -(-rows // core.row_block) * core.row_block
    train = train_shape(core, 1)
    buckets = [Bucket(0, MIN_ROWS, grad_rows, stashed)]
    if stashed:
        buckets.append(Bucket(grad_rows, MIN_ROWS, stashed=True))
    return max(program_of(core, model, mesh, train, bucket).temporary for bucket in buckets)


# every weight trainable


def _every_weight(model: ModelConfig, dtype: str, length: int, mesh: Mesh) -> int:
    """Temporaries of a loss over a whole sequence and its gradients for all layers' weights and the adapters, of which
    the lengths alone are kept: results are memory that a program may use before it writes them."""
    whole, kind = named_sharding(mesh, ()), jnp.dtype(dtype)

    def array(shape: Sequence[int], dtype: Any = kind) -> Any:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=whole)

    dims = roofline.site_dims(model).items()
    pairs = {site: (array((RANK, inputs)), array((sum(outs), RANK))) for site, (inputs, outs) in dims}
    adapters = [pairs] * model.num_layers
    ints, floats = array((length,), jnp.int32), array((length,), jnp.float32)
    rows = LossRows(ints, floats, ints, *[floats] * 4)
    params, program = ahead.abstract_params(model, mesh, dtype), jax.jit(partial(_lengths, model=model))
    return ahead.compile_for(mesh, lambda: program.lower(params, adapters, ints, rows)).temporary


def _lengths(params: Any, adapters: Any, token_S: jax.Array, rows: LossRows, *, model: ModelConfig) -> Any:
    loss, gradients = whole_sequence(params, adapters, token_S, rows, model=model)
    return loss, jax.tree.map(lambda x: jnp.sum(jnp.square(x.astype(jnp.float32))), gradients)


def whole_sequence(params: Any, adapters: Any, token_S: jax.Array, rows: LossRows, *, model: ModelConfig) -> Any:
    """The loss of a sequence [S], and its gradient for the weights of all layers and for the adapters, a pair of
    (A [R, I], B [O, R]) for each linear layer."""
    shard = VocabShard()

    def run(layers: Any, adapters: Any) -> jax.Array:
        numbered = [{**p, "number": i} for i, p in enumerate(layers)]
        hidden_SD, _ = decoder.forward(
            {**params, "layers": numbered},
            token_S,
            jnp.arange(token_S.shape[0], dtype=jnp.int32),
            config=model,
            lookup=decoder.plain_lookup,
            linear=partial(_adapted, adapters),
            attend=_attend(model, token_S.shape[0]),
            kv=[None] * model.num_layers,
        )
        return hidden_SD

    hidden_SD, pull = jax.vjp(run, params["layers"], adapters)
    loss_S, _, d_hidden_SD = loss_and_gradient(hidden_SD, rows, frozen_head(params, model, shard), shard)
    return jnp.sum(loss_S), pull(d_hidden_SD)


def _adapted(adapters: Any, site: str, p: Any, x_SI: jax.Array) -> jax.Array:
    a_RI, b_OR = adapters[p["number"]][site]
    return decoder.plain_linear(site, p, x_SI) + (x_SI @ a_RI.T) @ b_OR.T


def _attend(model: ModelConfig, length: int) -> Any:
    """The engine's attention over a sequence that fills its pages; it keeps its inputs, output and log-sum-exp."""
    G = math.gcd(length, 64)
    pages = jnp.arange(length // G, dtype=jnp.int32)[None]
    layout = AttentionLayout(
        position_T=jnp.arange(length, dtype=jnp.int32),
        sequence_T=jnp.zeros(length, jnp.int32),
        page_table_BM=pages,
        chunk_rows=length,
        row_block=G,
    )

    def paged(x_SKC: jax.Array) -> jax.Array:
        return x_SKC.reshape(-1, G, *x_SKC.shape[1:]).swapaxes(1, 2)

    def flat(x_PKGC: jax.Array) -> jax.Array:
        return x_PKGC.swapaxes(1, 2).reshape(length, *x_PKGC.shape[1:2], x_PKGC.shape[3])

    def attend(q, k, v, kv, layer):
        settings: dict[str, Any] = {
            "scale": model.attention_scale, "softcap": model.attention_softcap, "window": layer.window,
        }  # fmt: skip

        def forward(q, k, v):
            out, lse = ragged_paged_attention(q, paged(k), paged(v), layout, **settings)
            return out, (q, k, v, out, lse)

        def backward(kept, d_out):
            q, k, v, out, lse = kept
            sums = jnp.zeros(paged(k).shape, wide_dtype(k.dtype)), jnp.zeros(paged(v).shape, wide_dtype(v.dtype))
            d_q, sums = ragged_paged_attention_backward(
                d_out, q, out, lse, paged(k), paged(v), layout, sums, pages, **settings
            )
            return d_q.astype(q.dtype), *(flat(x).astype(q.dtype) for x in sums)

        ruled: Any = jax.custom_vjp(lambda q, k, v: forward(q, k, v)[0])
        ruled.defvjp(forward, backward)
        return ruled(q, k, v), kv

    return attend


# text


def lines(result: dict[str, Any]) -> list[str]:
    """The result as text."""
    told = [
        f"{result['device']}, {result['dtype']}, {result['layers']} layers (compiled: "
        f"{' and '.join(map(str, result['layers_compiled']))}), a sequence of {result['tokens']} tokens",
        "FlexLLM published {every weight:g} / {frozen:g} / {remat:g} / {windows:g}: everything, frozen weights pruned, "
        "with rematerialisation, token by token; units below are relative to the first line".format(
            **result["published_units"]
        ),
        f"{'method':<44} {'temp GB':>9} {'between GB':>11} {'in all':>9} {'units':>6}",
    ]
    return told + [
        f"{row['method']:<44} {row['temporary_bytes'] / GB:9.4f} {row['between_steps_bytes'] / GB:11.4f} "
        f"{row['bytes'] / GB:9.4f} {row['units']:6.1f}"
        for row in result["methods"]
    ]
