"""The backward that runs anywhere: a loop over spans of keys; memory does not grow with the context.

Probabilities are recomputed from the saved log-sum-exp (FlashAttention-2, Dao 2023, algorithm 2).

Shapes: W gradient rows, N blocks, Q rows per block, H query heads, K kv heads, g = H / K, C head dim, P pages,
A accumulator pages, G tokens per page, S keys per span, M pages per sequence.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.numerics import row_sum
from pallas_kernels.ragged_paged_attention.layout import Accumulators, AttentionLayout
from pallas_kernels.ragged_paged_attention.xla import SPAN_KEYS, gather_pages, runs, tile_blocks, weighted_sum


def ragged_paged_attention_backward(
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
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "W H C"], Accumulators]:
    W, H, C = q_WHC.shape
    K, G = k_PKGC.shape[1:3]
    Q, group = layout.row_block, H // K
    N, wide = W // Q, accumulators[0].dtype

    def by_block(x_WHX):
        x = x_WHX.reshape(N, Q, K, group, *x_WHX.shape[2:])
        return jnp.moveaxis(x, 1, 2).reshape(N, K, Q * group, *x_WHX.shape[2:])

    q_NKRC, d_out_NKRC = by_block(q_WHC), by_block(d_out_WHC)
    # rows that saw nothing have a log-sum-exp of -inf; any finite stand-in keeps exp() finite, the mask does the rest
    lse_NKR = by_block(jnp.where(jnp.isfinite(lse_WH), lse_WH, 0))
    delta_NKR = by_block(row_sum(d_out_WHC.astype(wide) * out_WHC.astype(wide)))
    position_NR = jnp.repeat(layout.position_T.reshape(N, Q), group, axis=1)
    low_NR = jnp.zeros_like(position_NR) if window is None else jnp.maximum(position_NR - (window - 1), 0)
    sequence_N = layout.sequence_T.reshape(N, Q)[:, 0]
    per_span = min(max(SPAN_KEYS // G, 1), layout.page_table_BM.shape[1])
    pages_NM = _padded(layout.page_table_BM.at[sequence_N].get(mode="clip"), per_span, 0)
    acc_NM = _padded(acc_table_BM.at[sequence_N].get(mode="clip"), per_span, accumulators[0].shape[0])
    span = per_span * G

    settings = {"scale": scale, "softcap": softcap, "windowed": window is not None}
    arrays = _Blocks(q_NKRC, d_out_NKRC, lse_NKR, delta_NKR, position_NR, low_NR, pages_NM, acc_NM)
    d_q_NKRC, accumulators = lax.platform_dependent(
        arrays, sequence_N, k_PKGC, v_PKGC, accumulators,
        cpu=partial(_tile_by_tile, tile=tile_blocks(N, Q), span=span, **settings),
        default=lambda arrays, _, *rest: _all_blocks(arrays, *rest, span=span, **settings),
    )  # fmt: skip
    d_q_WHC = jnp.moveaxis(d_q_NKRC.reshape(N, K, Q, group, C), 1, 2).reshape(W, H, C)
    return d_q_WHC.astype(q_WHC.dtype), accumulators


class _Blocks(NamedTuple):
    """What is known of each block; each may be several parts of as many rows, whose sums of dK and dV stay apart."""

    q_NKRC: jax.Array
    d_out_NKRC: jax.Array
    lse_NKR: jax.Array
    delta_NKR: jax.Array
    position_NR: jax.Array
    low_NR: jax.Array
    pages_NM: jax.Array
    acc_NM: jax.Array

    def together(self, mine_N: jax.Array) -> "_Blocks":
        """These blocks, all of one sequence, as one; the other ones are padding in it, with zeros: theirs may not be
        finite."""
        first = jnp.argmax(mine_N)

        def rows(x_NKRX: jax.Array) -> jax.Array:
            mine = jnp.where(mine_N.reshape(-1, *(1,) * (x_NKRX.ndim - 1)), x_NKRX, 0)
            return jnp.moveaxis(mine, 0, 1).reshape(1, x_NKRX.shape[1], -1, *x_NKRX.shape[3:])

        return _Blocks(
            *map(rows, (self.q_NKRC, self.d_out_NKRC, self.lse_NKR, self.delta_NKR)),
            position_NR=jnp.where(mine_N[:, None], self.position_NR, -1).reshape(1, -1),
            low_NR=self.low_NR.reshape(1, -1),
            pages_NM=lax.dynamic_slice_in_dim(self.pages_NM, first, 1),
            acc_NM=lax.dynamic_slice_in_dim(self.acc_NM, first, 1),
        )


def _tile_by_tile(
    arrays: _Blocks, sequence_N, k_PKGC, v_PKGC, accumulators: Accumulators, *, tile: int, **settings: Any
) -> tuple[jax.Array, Accumulators]:
    """A tile at a time, and in it a sequence at a time, as one block; as the forward does. Each block's part of
    dK and dV is added for itself, in the blocks' order: no bit depends on which blocks share a tile."""
    tiles = jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), arrays)

    def one(accumulators, arrays):
        blocks, run_n = arrays
        n, K, R, C = blocks.q_NKRC.shape

        def one_run(index, carry):
            d_q_nKRC, accumulators = carry
            mine_n = run_n == index
            found, accumulators = _all_blocks(
                blocks.together(mine_n), k_PKGC, v_PKGC, accumulators, parts=n, **settings
            )
            found_nKRC = jnp.moveaxis(found.reshape(K, n, R, C), 1, 0)
            return jnp.where(mine_n[:, None, None, None], found_nKRC, d_q_nKRC), accumulators

        start = jnp.zeros(blocks.q_NKRC.shape, accumulators[0].dtype), accumulators
        d_q_nKRC, accumulators = lax.fori_loop(0, run_n[-1] + 1, one_run, start)
        return accumulators, d_q_nKRC

    accumulators, d_q = lax.scan(one, accumulators, (tiles, runs(sequence_N.reshape(-1, tile))))
    return d_q.reshape(-1, *d_q.shape[2:]), accumulators


def _all_blocks(
    arrays: _Blocks, k_PKGC, v_PKGC, accumulators: Accumulators,
    *, parts: int = 1, span: int, scale: float, softcap: float | None, windowed: bool,
) -> tuple[jax.Array, Accumulators]:  # fmt: skip
    q_NKRC, d_out_NKRC, lse_NKR, delta_NKR, position_NR, low_NR, pages_NM, acc_NM = arrays
    wide, per_span = accumulators[0].dtype, span // k_PKGC.shape[2]

    def add_span(index, carry):
        d_q_NKRC, d_k_AKGC, d_v_AKGC = carry
        ids_NJ, acc_NJ = (lax.dynamic_slice_in_dim(x, index * per_span, per_span, axis=1) for x in (pages_NM, acc_NM))
        key_S = index * span + jnp.arange(span, dtype=jnp.int32)
        seen_NRS = (key_S[None, None] <= position_NR[..., None]) & (key_S[None, None] >= low_NR[..., None])
        in_range_NS = (key_S[None] <= position_NR.max(1)[:, None])[:, None, :, None]
        k_NKSC, v_NKSC = (jnp.where(in_range_NS, gather_pages(pool, ids_NJ), 0) for pool in (k_PKGC, v_PKGC))
        raw_NKRS = _dot(q_NKRC, k_NKSC, 3, 3, wide) * scale
        capped_NKRS = raw_NKRS if softcap is None else softcap * jnp.tanh(raw_NKRS / softcap)
        weight_NKRS = jnp.where(seen_NRS[:, None], jnp.exp(capped_NKRS - lse_NKR[..., None]), 0)
        d_weight_NKRS = _dot(d_out_NKRC, v_NKSC, 3, 3, wide)
        d_score_NKRS = weight_NKRS * (d_weight_NKRS - delta_NKR[..., None])
        if softcap is not None:
            d_score_NKRS = d_score_NKRS * (1 - (capped_NKRS / softcap) ** 2)
        d_score_NKRS = (d_score_NKRS * scale).astype(q_NKRC.dtype)
        d_q_NKRC = d_q_NKRC + weighted_sum(d_score_NKRS, k_NKSC, wide)
        d_k_NKBSC, d_v_NKBSC = (  # rows that are not finite reach no key past them, which nobody would clear
            jnp.where(in_range_NS[:, :, None], _dot_parts(x_NKRS, y_NKRC, parts, wide), 0)
            for x_NKRS, y_NKRC in ((d_score_NKRS, q_NKRC), (weight_NKRS.astype(d_out_NKRC.dtype), d_out_NKRC))
        )
        return d_q_NKRC, _scatter(d_k_AKGC, acc_NJ, d_k_NKBSC), _scatter(d_v_AKGC, acc_NJ, d_v_NKBSC)

    spans = jnp.max(position_NR) // span + 1
    first = jnp.min(jnp.where(position_NR >= 0, low_NR, jnp.iinfo(jnp.int32).max)) // span if windowed else 0
    start = (jnp.zeros(q_NKRC.shape, wide), *accumulators)
    d_q_NKRC, *sums = lax.fori_loop(first, spans, add_span, start)
    return d_q_NKRC, (sums[0], sums[1])


def _padded(table_NM: Int[Array, "N M"], multiple: int, value: int) -> Int[Array, "N M"]:
    return jnp.pad(table_NM, ((0, 0), (0, -table_NM.shape[1] % multiple)), constant_values=value)


def _scatter(pool_AKGC: jax.Array, ids_NJ: Int[Array, "N J"], new_NKBSC: jax.Array) -> jax.Array:
    """Adds each block's span to its pages; blocks of one sequence, and the parts of a block, meet in the same pages,
    in their order."""
    N, K, parts, S, C = new_NKBSC.shape
    J = ids_NJ.shape[1]
    new_BNJKGC = new_NKBSC.reshape(N, K, parts, J, S // J, C).transpose(2, 0, 3, 1, 4, 5)
    if N > 1:
        assert parts == 1, f"{N} blocks of {parts} parts: the order of their sums is not told"
        return pool_AKGC.at[ids_NJ].add(new_BNJKGC[0], mode="drop")
    pages_JKGC = pool_AKGC.at[ids_NJ[0]].get(mode="fill", fill_value=0)
    for part in range(parts):
        pages_JKGC += new_BNJKGC[part, 0]
    return pool_AKGC.at[ids_NJ[0]].set(pages_JKGC, mode="drop")


def _dot_parts(x_NKRS: jax.Array, y_NKRC: jax.Array, parts: int, wide: jnp.dtype) -> Float[Array, "N K B S C"]:
    """Products over the rows of each part."""
    x_NKBRS, y_NKBRC = (x.reshape(*x.shape[:2], parts, -1, x.shape[3]) for x in (x_NKRS, y_NKRC))
    return _dot(x_NKBRS, y_NKBRC, 3, 3, wide)


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int, wide: jnp.dtype) -> jax.Array:
    """A product over one of the last two axes; those before are the same in both."""
    batch = tuple(range(x.ndim - 2))
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), (batch, batch)), preferred_element_type=wide)
