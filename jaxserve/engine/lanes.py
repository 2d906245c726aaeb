"""Between a lane's gradients, an adapter's float32 masters and its pages in the bank; all on the device.

Masters hold an adapter at its true rank, one array per factor and linear layer, stacked over the model's layers.
Gradients come out of the lane pages in that form; new masters go into bank pages in the bank's dtype, scaling folded
in. Publishing a version is therefore a few copies on the device and an index on the host: no file, no other engine.

Shapes: L layers, R true rank, D in, E out, X pages of one adapter, Y lane pages, P bank pages.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxserve.adapters.bank import Bank, SiteBank
from jaxserve.adapters.weights import AdapterWeights, Key, LoraPair
from jaxserve.models import decoder
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import SITES, member_dims
from pallas_kernels.lora_matmul import PAGE_RANK
from sharding import AXIS, lora_specs, named_sharding, partition_spec

Masters = dict[str, dict[str, Float[Array, "L ..."]]]  # member -> {"a": [L, R, D], "b": [L, E, R]}
SITE_OF = {member: site for site, members in SITES.items() for member in members}


def master_axes(member: str) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of a member's masters: those of its place in the bank."""
    a_axes, b_axes = lora_specs(SITE_OF[member])
    return {"a": a_axes, "b": b_axes}


def masters_of(weights: AdapterWeights, config: ModelConfig, mesh: Mesh) -> Masters:
    """An adapter's factors in float32, on the mesh; modules it does not adapt, and ranks it lacks, are zero."""
    dims, rank = member_dims(config), weights.rank
    masters: Masters = {}
    for member in sorted({member for _, member in weights.pairs}):
        a_LRD = np.zeros((config.num_layers, rank, dims[member][0]), np.float32)
        b_LER = np.zeros((config.num_layers, dims[member][1], rank), np.float32)
        for (layer, name), pair in weights.pairs.items():
            if name == member:
                a_LRD[layer, : pair.rank], b_LER[layer, :, : pair.rank] = pair.a, pair.b
        axes = master_axes(member)
        masters[member] = {k: jax.device_put(v, named_sharding(mesh, axes[k])) for k, v in (("a", a_LRD), ("b", b_LER))}
    return masters


def scales_of(weights: AdapterWeights, config: ModelConfig) -> dict[str, np.ndarray]:
    """member -> scaling of each layer [L]; 0 where the layer is not adapted."""
    scales: dict[str, np.ndarray] = {}
    for (layer, member), scaling in weights.scaling.items():
        scales.setdefault(member, np.zeros(config.num_layers, np.float32))[layer] = scaling
    return scales


def pairs_of(masters: Masters, like: AdapterWeights) -> dict[Key, LoraPair]:
    """Masters as PEFT's factors, each at the rank ``like`` has."""
    host = jax.tree.map(np.asarray, masters)
    return {
        (layer, member): LoraPair(host[member]["a"][layer, : pair.rank], host[member]["b"][layer, :, : pair.rank])
        for (layer, member), pair in like.pairs.items()
    }


@partial(jax.jit, static_argnames=("mesh", "rank", "num_layers"), donate_argnames="lanes")
def take_gradients(
    lanes: dict[str, SiteBank],
    pages_X: Int[Array, "X"],
    scales: Mapping[str, Float[Array, "L"]],
    *,
    mesh: Mesh,
    rank: int,
    num_layers: int,
) -> tuple[dict[str, SiteBank], Masters]:
    """Reads a lane's gradients as gradients of the masters, and sets the lane back to zero.

    The terms that devices hold apart are summed here, once per optimizer step: A of column-parallel layers and B of
    row-parallel ones.
    """
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    masters = {m: {k: partition_spec(axes) for k, axes in master_axes(m).items()} for m in scales}
    local = jax.shard_map(
        partial(_take_local, rank=rank, num_layers=num_layers, parallel=mesh.size > 1),
        mesh=mesh,
        in_specs=(jax.tree.map(lambda _: split, lanes), whole, jax.tree.map(lambda _: whole, dict(scales))),
        out_specs=(jax.tree.map(lambda _: split, lanes), masters),
        check_vma=False,
    )
    return local(lanes, pages_X, dict(scales))


def _take_local(lanes, pages_X, scales, *, rank: int, num_layers: int, parallel: bool):
    L, gradients = num_layers, {}
    for member, scale_L in scales.items():
        site = SITE_OF[member]
        index, count = SITES[site].index(member), len(SITES[site])
        a, b = lanes[site].a_PRD[0], lanes[site].members[index][0]
        a = a.reshape(L, -1, count, PAGE_RANK, a.shape[-1])[:, pages_X, index]  # [L, X, 16, D]
        b = b.reshape(L, -1, *b.shape[1:])[:, pages_X]  # [L, X, E, 16]
        a = a.reshape(L, -1, a.shape[-1])[:, :rank]
        b = jnp.moveaxis(b, 1, 2).reshape(L, b.shape[2], -1)[..., :rank] * scale_L[:, None, None].astype(b.dtype)
        if parallel and site in decoder.COLUMN:
            a = lax.psum(a, AXIS)
        if parallel and site in decoder.ROW:
            b = lax.psum(b, AXIS)
        gradients[member] = {"a": a, "b": b}

    def clear(lane):
        rows = (jnp.arange(L, dtype=jnp.int32)[:, None] * (lane.shape[1] // L) + pages_X[None]).reshape(-1)
        return lane.at[0, rows].set(0)

    return jax.tree.map(clear, lanes), gradients


@partial(jax.jit, static_argnames=("mesh", "num_pages"), donate_argnames="bank")
def publish(
    bank: Bank,
    masters: Masters,
    pages_X: Int[Array, "X"],
    scales: Mapping[str, Float[Array, "L"]],
    *,
    mesh: Mesh,
    num_pages: int,
) -> Bank:
    """Writes masters into bank pages, cast and scaled; members without masters become zero there."""
    bank_specs = {}
    for site, members in SITES.items():
        a_spec, b_spec = (partition_spec(axes) for axes in lora_specs(site))
        bank_specs[site] = cast(Any, SiteBank)(a_spec, (b_spec,) * len(members))
    master_specs = {m: {k: partition_spec(axes) for k, axes in master_axes(m).items()} for m in masters}
    whole = PartitionSpec()
    local = jax.shard_map(
        partial(_publish_local, num_pages=num_pages),
        mesh=mesh,
        in_specs=(bank_specs, master_specs, whole, jax.tree.map(lambda _: whole, dict(scales))),
        out_specs=bank_specs,
        check_vma=False,
    )
    return local(bank, masters, pages_X, dict(scales))


def _publish_local(bank: Bank, masters: Masters, pages_X, scales, *, num_pages: int) -> Bank:
    X = pages_X.shape[0]
    new = {}
    for site, members in SITES.items():
        old = bank[site]
        L = old.a_PRD.shape[0] // num_pages
        rows = (jnp.arange(L, dtype=jnp.int32)[:, None] * num_pages + pages_X[None]).reshape(-1)
        a_parts, b_new = [], []
        for index, member in enumerate(members):
            b_old = old.members[index]
            if member in masters:
                a_LRD, b_LER = masters[member]["a"], masters[member]["b"] * scales[member][:, None, None]
            else:
                a_LRD, b_LER = jnp.zeros((L, 1, old.a_PRD.shape[-1])), jnp.zeros((L, b_old.shape[1], 1))
            more = X * PAGE_RANK - a_LRD.shape[1]
            a_parts.append(jnp.pad(a_LRD, ((0, 0), (0, more), (0, 0))).reshape(L, X, PAGE_RANK, -1))
            b_LEXr = jnp.pad(b_LER, ((0, 0), (0, 0), (0, more))).reshape(L, -1, X, PAGE_RANK)
            b_new.append(_set_pages(b_old, rows, jnp.moveaxis(b_LEXr, 2, 1)))
        new[site] = SiteBank(_set_pages(old.a_PRD, rows, jnp.concatenate(a_parts, axis=2)), tuple(b_new))
    return new


def _set_pages(pool: jax.Array, rows: Int[Array, "LX"], value: jax.Array) -> jax.Array:
    """value [L, X, ...] into the pages ``rows`` [L * X] of a bank array, in place."""
    return pool.at[rows].set(value.reshape(-1, *pool.shape[1:]).astype(pool.dtype), unique_indices=True)
