"""Between a lane's gradients, an adapter's float32 masters and its pages in the bank; all on the device.

Masters hold an adapter at its true rank, one array per parameter and linear layer, stacked over the model's layers.
Gradients come out of the lanes in that form; new masters go into bank pages in the bank's dtype, scaling folded in.
Publishing a version is therefore a few copies on the device and an index on the host: no file, no other engine.

Shapes: L layers, R true rank, D in, E out, X pages of one adapter, Y lane pages, P bank pages.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxserve.adapters.bank import Bank, BankShape, SiteBank
from jaxserve.adapters.scales import INPUT, MAGNITUDE, OUTPUT, Scales, ScalesShape, SiteScales
from jaxserve.adapters.weights import AdapterWeights, LoraPair, ScaleVector
from jaxserve.engine.gradient import TrainState
from jaxserve.models import decoder
from jaxserve.models.config import ModelConfig, member_dims
from jaxserve.models.params import SITES, param_specs
from pallas_kernels.lora_matmul import PAGE_RANK
from pallas_kernels.numerics import row_sum, wide_dtype
from sharding import AXIS, ArraySpec, lora_specs, named_sharding, partition_spec, tree_specs

A, B = "a", "b"
VECTORS = (INPUT, OUTPUT, MAGNITUDE)
Masters = dict[str, dict[str, Float[Array, "L ..."]]]  # member -> {"a": [L, R, D], "b": [L, E, R], vectors [L, D or E]}
Factors = Mapping[str, Mapping[str, Any]]  # like masters: b's scaling; of vectors 1, 0 in other layers
SITE_OF = {member: site for site, members in SITES.items() for member in members}
WHOLE = PartitionSpec()


def leaf_axes(member: str, leaf: str) -> tuple[str | None, ...]:
    """Logical axes of one of a member's masters: those of its place in the bank."""
    a_axes, b_axes = lora_specs(SITE_OF[member])
    return {A: a_axes, B: b_axes, INPUT: (None, a_axes[2])}.get(leaf, (None, b_axes[1]))


def masters_of(weights: AdapterWeights, config: ModelConfig, mesh: Mesh) -> Masters:
    """An adapter's parameters in float32, on the mesh. In layers that it leaves alone, and at ranks that a module
    lacks, factors are zero and vectors one."""
    dims, L = member_dims(config), config.num_layers
    masters: dict[str, dict[str, np.ndarray]] = {}
    for (layer, member), pair in weights.pairs.items():
        size_in, size_out = dims[member]
        leaves = masters.setdefault(
            member,
            {A: np.zeros((L, weights.rank, size_in), np.float32), B: np.zeros((L, size_out, weights.rank), np.float32)},
        )
        leaves[A][layer, : pair.rank], leaves[B][layer, :, : pair.rank] = pair.a, pair.b
    for (layer, member), vector in weights.vectors.items():
        leaves = masters.setdefault(member, {})
        ones = np.ones((L, dims[member][0 if vector.kind == INPUT else 1]), np.float32)
        leaves.setdefault(vector.kind, ones)[layer] = vector.value
    return {member: _placed(member, masters[member], mesh) for member in sorted(masters)}


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """The tree with what lies on one device alone, as the counts of an optimizer do, on all of the mesh's."""
    devices = set(mesh.devices.flat)

    def place(x: jax.Array) -> jax.Array:
        return x if x.sharding.device_set == devices else jax.device_put(x, named_sharding(mesh, ()))

    return jax.tree.map(place, tree)


def _placed(member: str, leaves: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    return {k: jax.device_put(leaves[k], named_sharding(mesh, leaf_axes(member, k))) for k in sorted(leaves)}


def factors_of(weights: AdapterWeights, config: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """What stands between masters and what the model multiplies with, by layer."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    worth = {(member, layer, B): scaling for (layer, member), scaling in weights.scaling.items()}
    worth |= {(member, layer, vector.kind): 1.0 for (layer, member), vector in weights.vectors.items()}
    for (member, layer, leaf), value in sorted(worth.items()):
        leaves = factors.setdefault(member, {})
        leaves.setdefault(leaf, np.zeros(config.num_layers, np.float32))[layer] = value
    return factors


def shares_of(weights: AdapterWeights, masters: Masters) -> dict[str, dict[str, np.ndarray]]:
    """Like masters, [L]: the share of a leaf that the adapter has; the rest are ranks that a module lacks."""
    shares = {m: {k: np.ones(len(x), np.float32) for k, x in leaves.items()} for m, leaves in masters.items()}
    for (layer, member), pair in weights.pairs.items():
        shares[member][A][layer] = shares[member][B][layer] = pair.rank / weights.rank
    return shares


def weights_of(masters: Mapping[str, Mapping[str, Any]], like: AdapterWeights) -> AdapterWeights:
    """Masters as an adapter with the modules, ranks and scaling of ``like``, whose file may hold a narrower dtype."""
    host = jax.tree.map(np.asarray, masters)
    pairs = {
        (layer, m): LoraPair(host[m][A][layer, : pair.rank], host[m][B][layer, :, : pair.rank])
        for (layer, m), pair in like.pairs.items()
    }
    vectors = {
        (layer, m): ScaleVector(vector.kind, host[m][vector.kind][layer]) for (layer, m), vector in like.vectors.items()
    }
    return replace(like, pairs=pairs, vectors=vectors, stored="float32")


def _leaf_specs(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, PartitionSpec]]:
    return {m: {leaf: partition_spec(leaf_axes(m, leaf)) for leaf in leaves} for m, leaves in tree.items()}


def _all_whole(tree: Any) -> Any:
    return jax.tree.map(lambda _: WHOLE, tree)


# gradients


@partial(jax.jit, static_argnames=("mesh", "rank", "num_layers"), donate_argnames="train")
def take_gradients(
    train: TrainState,
    pages_X: Int[Array, "X"],
    lane: Int[Array, ""],
    factors: Factors,
    norms: Mapping[str, Float[Array, "L E"]],
    *,
    mesh: Mesh,
    rank: int,
    num_layers: int,
) -> tuple[TrainState, Masters]:
    """Reads a lane's gradients as gradients of the masters, and sets the lane back to zero.

    The terms that devices hold apart are summed here, once per optimizer step: A of column-parallel layers and B of
    row-parallel ones, and input scales of column-parallel ones.

    Args:
      train: accumulators and stash may be missing.
      pages_X: lane pages of the factors; lane: number of the lane, of the scales.
      norms: DoRA's row lengths, as ``publish`` returned them.
    """
    split = PartitionSpec(AXIS)
    sums = (train.lanes, train.scale_lanes)
    sums_specs = jax.tree.map(lambda _: split, sums)
    gradients = {m: (A, *leaves) if B in leaves else tuple(leaves) for m, leaves in factors.items()}
    gradient_specs = {m: {k: partition_spec(leaf_axes(m, k)) for k in leaves} for m, leaves in gradients.items()}
    norm_specs = {m: partition_spec(leaf_axes(m, MAGNITUDE)) for m in norms}
    local = jax.shard_map(
        partial(_take_local, rank=rank, num_layers=num_layers, parallel=mesh.size > 1),
        mesh=mesh,
        in_specs=(*sums_specs, WHOLE, WHOLE, _all_whole(factors), norm_specs),
        out_specs=(*sums_specs, gradient_specs),
        check_vma=False,
    )
    lanes, scale_lanes, taken = local(*sums, pages_X, lane, factors, norms)
    return replace(train, lanes=lanes, scale_lanes=scale_lanes), taken


def _take_local(lanes, scale_lanes, pages_X, lane, factors, norms, *, rank: int, num_layers: int, parallel: bool):
    L, gradients = num_layers, {}

    def summed(x: jax.Array, held_apart: bool) -> jax.Array:
        return lax.psum(x, AXIS) if parallel and held_apart else x

    for member, leaves in factors.items():
        site = SITE_OF[member]
        index, count = SITES[site].index(member), len(SITES[site])
        is_row, found = site in decoder.ROW, {}
        for leaf, factor_L in leaves.items():
            if leaf == B:
                a, b = lanes[site].a_PRD[0], lanes[site].members[index][0]
                a = a.reshape(L, -1, count, PAGE_RANK, a.shape[-1])[:, pages_X, index]  # [L, X, 16, D]
                b = b.reshape(L, -1, *b.shape[1:])[:, pages_X]  # [L, X, E, 16]
                found[A] = summed(a.reshape(L, -1, a.shape[-1])[:, :rank], not is_row)
                b_LER = jnp.moveaxis(b, 1, 2).reshape(L, b.shape[2], -1)[..., :rank]
                found[B] = summed(b_LER * _by_layer(factor_L, b_LER), is_row)
            elif leaf == INPUT:
                d_LD = _of_lane(scale_lanes[site].input_PMD, L, lane)[:, index]
                found[leaf] = summed(d_LD * _by_layer(factor_L, d_LD), not is_row)
            else:
                d_LE = _of_lane(scale_lanes[site].outputs[index], L, lane)
                d_LE = d_LE / norms[member].astype(d_LE.dtype) if leaf == MAGNITUDE else d_LE
                found[leaf] = d_LE * _by_layer(factor_L, d_LE)
        gradients[member] = found

    def clear(sums: jax.Array, places: jax.Array) -> jax.Array:
        rows = (jnp.arange(L, dtype=jnp.int32)[:, None] * (sums.shape[1] // L) + places[None]).reshape(-1)
        return sums.at[0, rows].set(0)

    cleared = jax.tree.map(lambda sums: clear(sums, pages_X), lanes)
    return cleared, jax.tree.map(lambda sums: clear(sums, lane[None]), scale_lanes), gradients


def _of_lane(sums: jax.Array, L: int, lane: jax.Array) -> jax.Array:
    """One lane of [1, L * lanes, ...], as [L, ...]."""
    by_layer = sums.reshape(L, -1, *sums.shape[2:])
    return lax.dynamic_index_in_dim(by_layer, lane, axis=1, keepdims=False)


def _by_layer(factor_L: jax.Array, like: jax.Array) -> jax.Array:
    return factor_L.reshape(-1, *(1,) * (like.ndim - 1)).astype(like.dtype)


# versions


@partial(jax.jit, static_argnames=("mesh", "shape"), donate_argnames=("bank", "scales"))
def publish(
    bank: Bank,
    scales: Scales | None,
    params: Any,
    masters: Masters,
    pages_X: Int[Array, "X"],
    factors: Factors,
    *,
    mesh: Mesh,
    shape: BankShape,
) -> tuple[Bank, Scales | None, dict[str, jax.Array]]:
    """Writes masters into bank pages, cast and scaled; what the adapter leaves alone becomes neutral there.

    Args:
      scales: None where the engine has none; DoRA and (IA)3 need them.
      params: the base model, for DoRA; else None.

    Returns: bank, scales, and DoRA's row lengths |W + B A| by member, [L, E].
    """
    bank_specs, scales_specs, params_specs = _specs(shape, scales, params, mesh)
    norms = [m for m, leaves in factors.items() if MAGNITUDE in leaves]
    local = jax.shard_map(
        partial(_publish_local, num_pages=shape.num_pages, parallel=mesh.size > 1),
        mesh=mesh,
        in_specs=(bank_specs, scales_specs, params_specs, _leaf_specs(masters), WHOLE, _all_whole(factors)),
        out_specs=(bank_specs, scales_specs, {m: partition_spec(leaf_axes(m, MAGNITUDE)) for m in norms}),
        check_vma=False,
    )
    return local(bank, scales, params, masters, pages_X, factors)


def _specs(shape: BankShape, scales: Scales | None, params: Any, mesh: Mesh) -> tuple[Any, Any, Any]:
    return (
        tree_specs(shape.specs()),
        None if scales is None else tree_specs(ScalesShape(shape).specs()),
        None if params is None else tree_specs(param_specs(shape.config, mesh.size)),
    )


def _publish_local(bank: Bank, scales, params, masters: Masters, pages_X, factors, *, num_pages: int, parallel: bool):
    X, new = pages_X.shape[0], {}
    for site, members in SITES.items():
        old = bank[site]
        L = old.a_PRD.shape[0] // num_pages
        rows = (jnp.arange(L, dtype=jnp.int32)[:, None] * num_pages + pages_X[None]).reshape(-1)
        a_parts, b_new = [], []
        for index, member in enumerate(members):
            b_old, leaves = old.members[index], masters.get(member, {})
            if B in leaves:
                a_LRD, b_LER = leaves[A], leaves[B] * _by_layer(factors[member][B], leaves[B])
            else:
                a_LRD, b_LER = jnp.zeros((L, 1, old.a_PRD.shape[-1])), jnp.zeros((L, b_old.shape[1], 1))
            more = X * PAGE_RANK - a_LRD.shape[1]
            a_parts.append(jnp.pad(a_LRD, ((0, 0), (0, more), (0, 0))).reshape(L, X, PAGE_RANK, -1))
            b_LEXr = jnp.pad(b_LER, ((0, 0), (0, 0), (0, more))).reshape(L, -1, X, PAGE_RANK)
            b_new.append(_set_pages(b_old, rows, jnp.moveaxis(b_LEXr, 2, 1)))
        new[site] = SiteBank(_set_pages(old.a_PRD, rows, jnp.concatenate(a_parts, axis=2)), tuple(b_new))
    if scales is None:
        return new, None, {}
    scales = _publish_scales(scales, masters, factors, pages_X[0], num_pages)
    magnitudes = {member: leaves[MAGNITUDE] for member, leaves in masters.items() if MAGNITUDE in leaves}
    scales, norms = _gains_local(
        scales, new, params, magnitudes, pages_X, factors, num_pages=num_pages, parallel=parallel
    )
    return new, scales, norms


def _set_pages(pool: jax.Array, rows: Int[Array, "LX"], value: jax.Array) -> jax.Array:
    """value [L, X, ...] into the pages ``rows`` [L * X] of a bank array, in place."""
    return pool.at[rows].set(value.reshape(-1, *pool.shape[1:]).astype(pool.dtype), unique_indices=True)


def _publish_scales(scales: Scales, masters: Masters, factors: Factors, page, num_pages: int) -> Scales:
    """Input and output scales of one adapter; ones where it has none, whatever weight decay made of the masters."""
    new = {}
    for site, members in SITES.items():
        old = scales[site]
        L = old.bias_P.shape[0] // num_pages
        rows = jnp.arange(L, dtype=jnp.int32) * num_pages + page

        def leaf(member: str, name: str, like: jax.Array, L: int = L) -> jax.Array:
            if name not in masters.get(member, {}):
                return jnp.ones((L, *like.shape[1:]), like.dtype)
            adapted_L1 = factors[member][name][:, None] > 0
            return jnp.where(adapted_L1, masters[member][name].astype(like.dtype), 1)

        inputs = jnp.stack([leaf(member, INPUT, old.input_PMD[:, 0]) for member in members], axis=1)
        outputs = tuple(
            pool.at[rows].set(leaf(member, OUTPUT, pool)) for member, pool in zip(members, old.outputs, strict=True)
        )
        bias = not any(B in leaves for leaves in masters.values())  # (IA)3 scales the bias like the output
        new[site] = SiteScales(
            old.input_PMD.at[rows].set(inputs), outputs, old.bias_P.at[rows].set(jnp.full(L, bias, old.bias_P.dtype))
        )
    return new


# DoRA


@partial(jax.jit, static_argnames=("mesh", "shape"), donate_argnames="scales")
def set_gains(
    scales: Scales,
    bank: Bank,
    params: Any,
    magnitudes: Mapping[str, Float[Array, "L E"]],
    pages_X: Int[Array, "X"],
    factors: Factors,
    *,
    mesh: Mesh,
    shape: BankShape,
) -> Scales:
    """Gives a DoRA adapter in the bank its output scales: magnitude / |W + B A|, row by row.

    Args:
      magnitudes: rows in the order of the shards, as ``BankShape.rows`` has them.
      pages_X: the adapter's pages, then page 0 as often as it takes.
    """
    bank_specs, scales_specs, params_specs = _specs(shape, scales, params, mesh)
    magnitude_specs = {m: partition_spec(leaf_axes(m, MAGNITUDE)) for m in magnitudes}
    local = jax.shard_map(
        lambda *args: _gains_local(*args, num_pages=shape.num_pages, parallel=mesh.size > 1)[0],
        mesh=mesh,
        in_specs=(scales_specs, bank_specs, params_specs, magnitude_specs, WHOLE, _all_whole(factors)),
        out_specs=scales_specs,
        check_vma=False,
    )
    return local(scales, bank, params, magnitudes, pages_X, factors)


def _gains_local(scales, bank, params, magnitudes, pages_X, factors, *, num_pages: int, parallel: bool):
    new = dict(scales)
    norms = _lengths_local(bank, params, pages_X, members=tuple(magnitudes), num_pages=num_pages, parallel=parallel)
    for member, magnitude_LE in magnitudes.items():
        site = SITE_OF[member]
        index, outputs = SITES[site].index(member), list(new[site].outputs)
        pool, L = outputs[index], magnitude_LE.shape[0]
        adapted_L1 = factors[member][MAGNITUDE][:, None] > 0
        gain_LE = jnp.where(adapted_L1, magnitude_LE.astype(pool.dtype) / norms[member], 1)
        rows = jnp.arange(L, dtype=jnp.int32) * num_pages + pages_X[0]
        outputs[index] = pool.at[rows].set(gain_LE)
        new[site] = replace(new[site], outputs=tuple(outputs))
    return new, norms


@partial(jax.jit, static_argnames=("mesh", "shape", "members"))
def adapter_lengths(
    bank: Bank, params: Any, pages_X: Int[Array, "X"], *, mesh: Mesh, shape: BankShape, members: tuple[str, ...]
) -> dict[str, Float[Array, "L E"]]:
    """|W + B A| of every row, by member, for the adapter in these pages; page 0 alone gives |W|."""
    bank_specs, _, params_specs = _specs(shape, None, params, mesh)
    local = jax.shard_map(
        partial(_lengths_local, members=members, num_pages=shape.num_pages, parallel=mesh.size > 1),
        mesh=mesh,
        in_specs=(bank_specs, params_specs, WHOLE),
        out_specs={m: partition_spec(leaf_axes(m, MAGNITUDE)) for m in members},
        check_vma=False,
    )
    return local(bank, params, pages_X)


def _lengths_local(bank, params, pages_X, *, members: tuple[str, ...], num_pages: int, parallel: bool):
    lengths = {}
    for member in members:
        site = SITE_OF[member]
        index, count = SITES[site].index(member), len(SITES[site])
        widths = [b.shape[1] for b in bank[site].members]
        rows = slice(sum(widths[:index]), sum(widths[: index + 1]))
        squares = []
        for layer, p in enumerate(params["layers"]):
            pages = layer * num_pages + pages_X
            a = bank[site].a_PRD[pages]  # [X, members * 16, D]
            a_RD = a.reshape(len(pages_X), count, PAGE_RANK, -1)[:, index].reshape(-1, a.shape[-1])
            b_ER = jnp.moveaxis(bank[site].members[index][pages], 0, 1).reshape(widths[index], -1)
            square_E = _row_squares(p[site][rows], a_RD, b_ER)
            squares.append(lax.psum(square_E, AXIS) if parallel and site in decoder.ROW else square_E)
        lengths[member] = jnp.sqrt(jnp.stack(squares))
    return lengths


def _row_squares(w_ED: jax.Array, a_RD: jax.Array, b_ER: jax.Array) -> jax.Array:
    """|W + B A|^2 of every row, without the product: |w|^2 + 2 b (A w) + b (A A^T) b."""
    wide = wide_dtype(w_ED.dtype)

    def product(x, y):  # both contract their last axis
        return lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=wide)

    a_RD, b_ER = a_RD.astype(w_ED.dtype), b_ER.astype(wide)
    across_E = row_sum(b_ER * product(w_ED, a_RD))
    within_E = row_sum(product(b_ER, product(a_RD, a_RD)) * b_ER)
    return row_sum(jnp.square(w_ED.astype(wide))) + 2 * across_E + within_E


# a lane that is put aside


@partial(jax.jit, static_argnames="num_layers")
def read_lane(train: TrainState, pages_X: Int[Array, "X"], lane: Int[Array, ""], *, num_layers: int) -> Any:
    """A lane's sums as they are, of every device: what ``write_lane`` puts back bit by bit."""
    sums = train.lanes, train.scale_lanes
    return jax.tree.map(
        lambda whole, rows: whole[:, rows], sums, _lane_rows(*sums, pages_X, lane, num_layers=num_layers)
    )


@partial(jax.jit, static_argnames="num_layers", donate_argnames="train")
def write_lane(train: TrainState, kept: Any, pages_X: Int[Array, "X"], lane: Int[Array, ""], *, num_layers: int):
    """``train`` with these sums in a lane; it may be another lane than they were read from."""
    sums = train.lanes, train.scale_lanes
    lanes, scale_lanes = jax.tree.map(
        lambda whole, new, rows: whole.at[:, rows].set(new),
        sums,
        kept,
        _lane_rows(*sums, pages_X, lane, num_layers=num_layers),
    )
    return replace(train, lanes=lanes, scale_lanes=scale_lanes)


def _lane_rows(lanes, scale_lanes, pages_X, lane, *, num_layers: int) -> Any:
    def rows(sums: jax.Array, places: jax.Array) -> jax.Array:
        layer_L = jnp.arange(num_layers, dtype=jnp.int32)[:, None]
        return (layer_L * (sums.shape[1] // num_layers) + places[None]).reshape(-1)

    return (
        jax.tree.map(lambda sums: rows(sums, pages_X), lanes),
        jax.tree.map(lambda sums: rows(sums, lane[None]), scale_lanes),
    )


SUMMED, SAME = -1, -2  # how devices hold an array that is not split: terms of it, or all of it each


def gathered(sums: Any, shape: BankShape) -> Any:
    """A lane's sums as one device would have them, on the host: whatever is on as many devices can take them up."""

    def gather(whole: jax.Array, held: int) -> np.ndarray:
        parts = np.asarray(whole)
        if held >= 0:
            return np.concatenate(parts, axis=held)[None]
        return parts[:1] if held == SAME else parts.sum(axis=0, keepdims=True)

    return jax.tree.map(gather, sums, _held(sums, shape))


def spread(one: Any, like: Any, shape: BankShape) -> Any:
    """The opposite of ``gathered``: sums for as many devices as ``like`` is on, placed like it."""

    def place(whole: np.ndarray, old: jax.Array, held: int) -> jax.Array:
        count = old.shape[0]
        if held >= 0:
            parts = np.stack(np.split(whole[0], count, axis=held))
        elif held == SAME:
            parts = np.repeat(whole, count, axis=0)
        else:
            parts = np.concatenate([whole, np.zeros((count - 1, *whole.shape[1:]), whole.dtype)])
        return jax.device_put(parts, old.sharding)

    return jax.tree.map(place, one, like, _held(like, shape))


def _held(sums: Any, shape: BankShape) -> Any:
    """Of each array, the axis that is split over devices, SUMMED or SAME."""

    def held(spec: ArraySpec, otherwise: int = SUMMED) -> int:
        return next((at for at, axis in enumerate(partition_spec(spec.axes)) if axis is not None), otherwise)

    lanes = jax.tree.map(held, shape.specs(), is_leaf=lambda x: isinstance(x, ArraySpec))
    if sums[1] is None:
        return lanes, None
    scales, site_scales = {}, cast(Any, SiteScales)  # a SiteScales of numbers
    for site, each in ScalesShape(shape).specs().items():
        outputs = tuple(held(output, SAME) for output in each.outputs)
        scales[site] = site_scales(held(each.input_PMD), outputs, held(each.bias_P))
    return lanes, scales
