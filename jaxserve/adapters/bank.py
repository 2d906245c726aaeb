"""The adapters' place on the device: one array per site and factor, paged by rank.

A bank page holds 16 ranks of every layer and every linear layer of one adapter; an adapter of rank r owns
ceil(r / 16) pages and page 0 stays zero: the bare base model. Layers lie one after another in the page axis, so an
unrolled step reads layer l at page l * P + page and nothing is sliced or copied.

Placement follows from the base matrix (``sharding.parallelize``): a column-parallel layer replicates A and splits
B's rows like its own; a row-parallel layer splits A's columns like its own and replicates B, whose partial product
joins the base's all-reduce. Neither adds a collective.

Shapes: L layers, P pages, R ranks (16 per member), D in, E out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxserve.models.config import ModelConfig, member_dims
from jaxserve.models.params import SITES, Part
from pallas_kernels.lora_matmul import PAGE_RANK
from pallas_kernels.numerics import wide_dtype
from sharding import ArraySpec, lora_specs, zeros

SITE_NAMES = tuple(SITES)


@struct.dataclass
class SiteBank:
    """The bank of one site (linear layers that share an input)."""

    a_PRD: Float[Array, "LP R D"]  # members' ranks one after another
    members: tuple[Float[Array, "LP E 16"], ...]  # B of each member, scaling folded in


Bank = dict[str, SiteBank]


@dataclass(frozen=True)
class BankShape:
    """What a bank needs to know: pages per layer and the model's linear layers."""

    config: ModelConfig
    num_pages: int
    tensor_parallel: int
    dtype: str

    def specs(self) -> dict[str, Any]:
        """ArraySpec (shape and logical axes) of every array of the bank, as stored for this tensor parallelism."""
        rows = self.config.num_layers * self.num_pages
        dims = member_dims(self.config)
        bank, site_bank = {}, cast(Any, SiteBank)  # a SiteBank of ArraySpecs
        for site, members in SITES.items():
            a_axes, b_axes = lora_specs(site)
            a = ArraySpec((rows, PAGE_RANK * len(members), dims[members[0]][0]), a_axes)
            outs = [len(self.rows(member)) for member in members]
            bank[site] = site_bank(a, tuple(ArraySpec((rows, out, PAGE_RANK), b_axes) for out in outs))
        return bank

    def rows(self, member: str) -> np.ndarray:
        """The rows of a member's B in the order the shards hold them; kv heads repeat when shards outnumber them."""
        rows = member_dims(self.config)[member][1]
        if member not in ("k_proj", "v_proj"):
            return np.arange(rows)
        part = Part(member, rows, "kv_heads", self.config.num_kv_heads)
        shards = (part.shard_rows(shard, self.tensor_parallel) for shard in range(self.tensor_parallel))
        return np.concatenate([np.arange(*bounds) for bounds in shards])

    def empty(self, mesh: Mesh) -> Bank:
        """A bank of zeros on the mesh."""
        return jax.tree.map(
            lambda spec: zeros(mesh, spec.shape, spec.axes, self.dtype),
            self.specs(),
            is_leaf=lambda x: isinstance(x, ArraySpec),
        )

    def paged(self, pairs: Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray, float]], rank: int) -> list[dict]:
        """Cuts an adapter into bank pages.

        Args:
          pairs: (layer, member) -> (A [r, in], B [out, r], scaling).
          rank: the adapter's greatest rank.

        Returns: one ``{site: (A [L, R, D], (B [L, E, 16], ...))}`` per page, in the bank's dtype, scaling folded into B
        in float32, rows of B in the order of the shards.
        """
        return [self._page(pairs, start) for start in range(0, max(rank, 1), PAGE_RANK)]

    def _page(self, pairs, start: int) -> dict:
        L, dims, wide = self.config.num_layers, member_dims(self.config), wide_dtype(self.dtype).type
        page = {}
        for site, members in SITES.items():
            a_LRD = np.zeros((L, PAGE_RANK * len(members), dims[members[0]][0]), jnp.dtype(self.dtype))
            outs = []
            for index, member in enumerate(members):
                rows = self.rows(member)
                b_LER = np.zeros((L, len(rows), PAGE_RANK), jnp.dtype(self.dtype))
                for layer in range(L):
                    a, b, scaling = pairs.get((layer, member), (None, None, 0.0))
                    if a is None or b is None or a.shape[0] <= start:
                        continue
                    a, b = a[start : start + PAGE_RANK], b[:, start : start + PAGE_RANK]
                    a_LRD[layer, index * PAGE_RANK : index * PAGE_RANK + a.shape[0]] = a
                    b_LER[layer, :, : b.shape[1]] = (np.asarray(b, wide) * wide(scaling))[rows]
                outs.append(b_LER)
            page[site] = (a_LRD, tuple(outs))
        return page


@partial(jax.jit, donate_argnames="bank", static_argnames="num_pages")
def write_page(bank: Bank, page: jax.Array, content: dict, num_pages: int) -> Bank:
    """Writes one page of every layer, in place."""
    write = partial(with_page, page=page, num_pages=num_pages)
    return {
        site: SiteBank(write(old.a_PRD, content[site][0]), tuple(map(write, old.members, content[site][1])))
        for site, old in bank.items()
    }


def with_page(pool: jax.Array, content: jax.Array, page: jax.Array, num_pages: int) -> jax.Array:
    """A pool [L * P, ...] with content [L, ...] in one page of every layer."""
    index_L = jnp.arange(content.shape[0], dtype=jnp.int32) * num_pages + page
    return pool.at[index_L].set(content, unique_indices=True)


def sites_touched(members: Sequence[str]) -> tuple[int, ...]:
    """Indices of the sites that have at least one of these members."""
    return tuple(i for i, site in enumerate(SITE_NAMES) if set(SITES[site]) & set(members))
