"""The backward of row blocks on Hopper: two kernels, no atomic operation, the same bits every time.

The first one goes like the forward, tile by tile of rows over the keys, and sums dQ. The second one goes tile by tile
of keys over the rows that see them, all query heads of the kv head, and adds dK and dV to their pages in place: every
key belongs to one thread block. Both recompute probabilities from the saved log-sum-exp (FlashAttention-2, Dao 2023,
algorithm 2).

Compiled ahead of time for an H200 as in ``mosaic_forward``: no spills, 168 registers, 131,072 (dQ) and 199,680 (dK, dV)
bytes of shared memory; the accumulators are written where they are.

Shapes: W rows, H query heads, K kv heads, C head dim, P pages, A accumulator pages, G tokens per page, B sequences,
M pages per sequence.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import LOG2E, WARPGROUP_ROWS, along
from pallas_kernels.ragged_paged_attention import mosaic_d_keys, mosaic_d_queries
from pallas_kernels.ragged_paged_attention.layout import Accumulators, AttentionLayout
from pallas_kernels.ragged_paged_attention.mosaic_pages import KernelShape, operand_sizes
from pallas_kernels.ragged_paged_attention.work import block_work, key_work, num_cores

NEVER = 1e30  # a log-sum-exp that makes every probability 0


@dataclass(frozen=True, kw_only=True)
class BackwardShape(KernelShape):
    """What the kernels are compiled for."""

    window: int | None

    stages = 2
    block_keys = 64  # per step of the dQ kernel

    @property
    def value_stages(self) -> int:
        """Blocks of values under way in the dQ kernel: shared memory has no room for two of the widest."""
        return 2 if self.head_dim <= 128 else 1

    @property
    def halves(self) -> int:
        """Parts of the head dim: where dK and dV are too wide for one warpgroup's registers, each has half."""
        return 1 if self.head_dim <= 128 else 2

    @property
    def turns(self) -> int:
        """Warpgroups that take turns with the units of the dK, dV kernel."""
        return 2 // self.halves

    @property
    def sum_columns(self) -> int:
        """Of dK or dV, that go through shared memory at a time."""
        return 64 if self.halves == 1 and self.head_dim % 64 == 0 else 32

    def weights(
        self, score: jax.Array, lse: jax.Array, axis: int, seen: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """P where ``seen``, and P times the slope of the soft cap; lse varies along ``axis``."""
        lse = along(axis, lse, score.shape)
        if self.softcap is None:
            weight = jnp.exp2(score * (self.scale * LOG2E) - lse)
            weight = weight if seen is None else jnp.where(seen, weight, 0.0)
            return weight, weight
        capped = jnp.tanh(score * (self.scale / self.softcap))
        weight = jnp.exp2(capped * (self.softcap * LOG2E) - lse)
        weight = weight if seen is None else jnp.where(seen, weight, 0.0)
        return weight, weight * (1.0 - capped * capped)

    def seen(self, key: jax.Array, position: jax.Array) -> jax.Array:
        seen = key <= position
        return seen if self.window is None else seen & (key > position - self.window)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The gradient rows, as both kernels read them."""

    q_WHC: Float[Array, "W H C"]
    d_out_WHC: Float[Array, "W H C"]
    lse_HW: Float[Array, "H W"]  # in units of log 2; NEVER for rows without keys
    delta_HW: Float[Array, "H W"]  # sum over C of dO * O
    position_W: Int[Array, "W"]  # -1: padding


def run(
    d_out_WHC: Float[Array, "W H C"],
    q_WHC: Float[Array, "W H C"],
    out_WHC: Float[Array, "W H C"],
    lse_WH: Float[Array, "W H"],
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    layout: AttentionLayout,
    accumulators: Accumulators,
    acc_table_BM: Int[Array, "B M"],
    *,
    interpret: bool,
    **settings: Any,
) -> tuple[Float[Array, "W H C"], Accumulators]:
    """The op; ``settings`` are its scale, softcap and window."""
    arrays = d_out_WHC, q_WHC, out_WHC, lse_WH, k_PKGC, v_PKGC, layout, accumulators, acc_table_BM
    return _pull(*arrays, **settings, cores=num_cores(interpret), interpret=interpret)


@partial(jax.jit, static_argnames=("scale", "softcap", "window", "cores", "interpret"))  # traced once for all layers
def _pull(
    d_out_WHC: Float[Array, "W H C"],
    q_WHC: Float[Array, "W H C"],
    out_WHC: Float[Array, "W H C"],
    lse_WH: Float[Array, "W H"],
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    layout: AttentionLayout,
    accumulators: Accumulators,
    acc_table_BM: Int[Array, "B M"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    cores: int,
    interpret: bool,
) -> tuple[Float[Array, "W H C"], Accumulators]:
    shape = BackwardShape(**operand_sizes(q_WHC, k_PKGC), scale=scale, softcap=softcap, window=window)
    rows = Rows(
        q_WHC=q_WHC,
        d_out_WHC=d_out_WHC,
        lse_HW=jnp.where(jnp.isfinite(lse_WH), lse_WH * LOG2E, NEVER).T,
        delta_HW=jnp.sum(d_out_WHC.astype(jnp.float32) * out_WHC.astype(jnp.float32), axis=-1).T,
        position_W=layout.position_T,
    )
    pools = k_PKGC, v_PKGC, layout.page_table_BM
    by_rows = block_work(layout, window=window, group=shape.group, block_keys=shape.block_keys)
    by_keys = key_work(layout, window=window, page_size=shape.page_size, tile_keys=WARPGROUP_ROWS)
    d_q_WHC = mosaic_d_queries.d_queries(rows, *pools, by_rows, shape, interpret=interpret)
    accumulators = mosaic_d_keys.add_d_keys(
        rows, *pools, acc_table_BM, accumulators, by_keys, shape, workers=cores, interpret=interpret
    )
    return d_q_WHC, accumulators
