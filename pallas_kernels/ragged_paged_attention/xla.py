"""Runs anywhere: a loop over spans of keys with an online softmax; memory does not grow with the context.

Spans start at fixed absolute positions and a span that a row does not see leaves its sums bit for bit alone, so a
row's result depends neither on its neighbours nor on how long their contexts are. The matmuls contract last axes and
have at least two rows, or make whole columns (``weighted_sum``): on XLA's CPU backend a row's bits do not depend
on the number of rows then, so a token computed in a prefill block equals the same token computed as a decode row.

Shapes: T rows, N blocks, Q rows per block, H query heads, K kv heads, g = H / K, C head dim, P pages,
G tokens per page, S keys per span.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.numerics import row_sum, wide_dtype
from pallas_kernels.ragged_paged_attention.layout import AttentionLayout

SPAN_KEYS = 64  # keys per loop step, at least one page: few enough that a step's arrays stay in cache
TILE_ROWS = 32  # rows of row blocks that share a loop on CPU: few wait for keys that only others see
WHOLE_HEAD = 64  # multiples of it are whole columns on a CPU
MASKED = -1e30  # finite: exp(MASKED - MASKED) is 1, never NaN


def ragged_paged_attention(
    q_THC: Float[Array, "T H C"],
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    layout: AttentionLayout,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "T H C"], Float[Array, "T H"]]:
    attend = partial(_attend_blocks, k_PKGC=k_PKGC, v_PKGC=v_PKGC, scale=scale, softcap=softcap, window=window)

    def all_at_once(q_NQHC, position_NQ, sequence_N):
        pages_NM = layout.page_table_BM.at[sequence_N].get(mode="clip")
        return attend(q_NQHC, position_NQ=position_NQ, pages_NM=pages_NM)

    parts = []
    for rows, block in ((slice(0, layout.chunk_rows), layout.row_block), (slice(layout.chunk_rows, None), 1)):
        q_NQHC = q_THC[rows].reshape(-1, block, *q_THC.shape[1:])
        if q_NQHC.shape[0]:
            position_NQ = layout.position_T[rows].reshape(-1, block)
            arrays = q_NQHC, position_NQ, layout.sequence_T[rows].reshape(-1, block)[:, 0]
            tiles = partial(_row_by_row if block == 1 else _tile_by_tile, all_at_once)
            parts.append(lax.platform_dependent(*arrays, cpu=tiles, default=all_at_once))
    out_THC, top_TH, total_TH = (
        jnp.concatenate(each) if len(parts) > 1 else each[0] for each in zip(*parts, strict=True)
    )
    # of all rows at once: on a CPU a logarithm's bits depend on what it is computed with
    lse_TH = jnp.where(total_TH == 0, -jnp.inf, top_TH + jnp.log(jnp.where(total_TH == 0, 1, total_TH)))
    return out_THC, lse_TH


def _row_by_row(attend, q_N1HC, position_N1, sequence_N):
    """Decode rows: no row's loop is longer than its own context, and the keys of a turn stay in cache."""
    parts = lax.map(lambda row: attend(*(x[None] for x in row)), (q_N1HC, position_N1, sequence_N))
    return tuple(x.reshape(-1, *x.shape[2:]) for x in parts)


def _tile_by_tile(attend, q_NQHC, position_NQ, sequence_N):
    """A tile at a time, and in it a sequence at a time, as one block: its loop ends at the sequence's own last key, and
    all its rows share the keys that are gathered."""
    tile = tile_blocks(*q_NQHC.shape[:2])

    def one(arrays):
        q_nQHC, position_nQ, sequence_n, run_n = arrays
        n, Q, H, C = q_nQHC.shape

        def one_run(index, found):
            mine_n = run_n == index
            mine_T = jnp.repeat(mine_n, Q)
            position_T = jnp.where(mine_T, position_nQ.reshape(-1), -1)
            sequence = lax.dynamic_slice_in_dim(sequence_n, jnp.argmax(mine_n), 1)
            new = attend(q_nQHC.reshape(1, n * Q, H, C), position_T[None], sequence)
            return jax.tree.map(lambda x, y: jnp.where(mine_T.reshape(-1, *(1,) * (x.ndim - 1)), x, y), new, found)

        wide = wide_dtype(q_nQHC.dtype)
        nothing = tuple(
            jnp.zeros((n * Q, H, *of), dtype) for of, dtype in (((C,), q_nQHC.dtype), ((), wide), ((), wide))
        )
        return lax.fori_loop(0, run_n[-1] + 1, one_run, nothing)

    tiles = tuple(x.reshape(-1, tile, *x.shape[1:]) for x in (q_NQHC, position_NQ, sequence_N))
    parts = lax.map(one, (*tiles, runs(tiles[-1])))
    return tuple(x.reshape(-1, *x.shape[2:]) for x in parts)


def runs(sequence_Nn: Int[Array, "N n"]) -> Int[Array, "N n"]:
    """Numbers the runs of blocks of one sequence in each tile, from 0."""
    changes = (sequence_Nn[:, 1:] != sequence_Nn[:, :-1]).astype(jnp.int32)
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def tile_blocks(num_blocks: int, block_rows: int) -> int:
    """Blocks of a tile: the most that divide the number of blocks and have about TILE_ROWS rows."""
    return next(n for n in range(max(TILE_ROWS // block_rows, 1), 0, -1) if num_blocks % n == 0)


def _attend_blocks(
    q_NQHC: Float[Array, "N Q H C"],
    *,
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    position_NQ: Int[Array, "N Q"],
    pages_NM: Int[Array, "N M"],
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Float[Array, "NQ H C"], Float[Array, "NQ H"], Float[Array, "NQ H"]]:
    """The output, the highest score and the sum of weights of each row and head."""
    N, Q, H, C = q_NQHC.shape
    K, G = k_PKGC.shape[1:3]
    group = H // K
    rows = max(Q * group, 2)  # one row would be a matrix-vector product, with other bits
    q_NKRC = q_NQHC.reshape(N, Q, K, group, C).transpose(0, 2, 1, 3, 4).reshape(N, K, Q * group, C)
    q_NKRC = jnp.pad(q_NKRC, ((0, 0), (0, 0), (0, rows - Q * group), (0, 0)))
    position_NR = jnp.pad(jnp.repeat(position_NQ, group, axis=1), ((0, 0), (0, rows - Q * group)), constant_values=-1)
    low_NR = jnp.zeros_like(position_NR) if window is None else jnp.maximum(position_NR - (window - 1), 0)

    pages_per_span = min(max(SPAN_KEYS // G, 1), pages_NM.shape[1])
    pages_NM = jnp.pad(pages_NM, ((0, 0), (0, -pages_NM.shape[1] % pages_per_span)))
    span = pages_per_span * G
    accumulate = wide_dtype(q_NQHC.dtype)

    def add_span(index, carry):
        top_NKR, total_NKR, out_NKRC = carry
        ids_NJ = lax.dynamic_slice_in_dim(pages_NM, index * pages_per_span, pages_per_span, axis=1)
        key_S = index * span + jnp.arange(span, dtype=jnp.int32)
        last_N = position_NR.max(1)
        k_NKSC = gather_pages(k_PKGC, ids_NJ)
        # a page may hold another sequence's leftovers past this one's end: 0 x NaN would spread them
        v_NKSC = jnp.where((key_S[None] <= last_N[:, None])[:, None, :, None], gather_pages(v_PKGC, ids_NJ), 0)
        score_NKRS = _dot(q_NKRC, k_NKSC, ((3,), (3,)), accumulate) * scale
        if softcap is not None:
            score_NKRS = softcap * jnp.tanh(score_NKRS / softcap)
        seen_NRS = (key_S[None, None] <= position_NR[..., None]) & (key_S[None, None] >= low_NR[..., None])
        score_NKRS = jnp.where(seen_NRS[:, None], score_NKRS, MASKED)
        new_top_NKR = jnp.maximum(top_NKR, score_NKRS.max(-1))
        weight_NKRS = jnp.where(seen_NRS[:, None], jnp.exp(score_NKRS - new_top_NKR[..., None]), 0)
        decay_NKR = jnp.exp(top_NKR - new_top_NKR)
        total_NKR = total_NKR * decay_NKR + row_sum(weight_NKRS)
        new_NKRC = weighted_sum(weight_NKRS.astype(v_NKSC.dtype), v_NKSC, accumulate)
        return new_top_NKR, total_NKR, out_NKRC * decay_NKR[..., None] + new_NKRC

    spans = jnp.max(position_NR) // span + 1  # -1 // span + 1 = 0: nothing but padding
    first = jnp.min(jnp.where(position_NR >= 0, low_NR, jnp.iinfo(jnp.int32).max)) // span if window else 0
    start = (
        jnp.full((N, K, rows), MASKED, accumulate),
        jnp.zeros((N, K, rows), accumulate),
        jnp.zeros((N, K, rows, C), accumulate),
    )
    top_NKR, total_NKR, out_NKRC = lax.fori_loop(first, spans, add_span, start)
    out_NKRC = (out_NKRC / jnp.where(total_NKR == 0, 1, total_NKR)[..., None]).astype(q_NQHC.dtype)
    out_NKRC = jnp.where((position_NR >= 0)[:, None, :, None], out_NKRC, 0)  # beside a NaN sequence as well

    def to_rows(x):
        x = x[:, :, : Q * group].reshape(N, K, Q, group, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2).reshape(N * Q, H, *x.shape[4:])

    return to_rows(out_NKRC), to_rows(top_NKR), to_rows(total_NKR)


def gather_pages(pool_PKGC: Float[Array, "P K G C"], ids_NJ: Int[Array, "N J"]) -> Float[Array, "N K S C"]:
    """The keys (or values) of each block's pages, one after another."""
    if ids_NJ.shape[0] == 1:  # slices are copied much faster than what is gathered
        pages = [lax.dynamic_index_in_dim(pool_PKGC, page, keepdims=False) for page in ids_NJ[0]]
        return jnp.concatenate(pages, axis=1)[None]
    pages_NJKGC = pool_PKGC.at[ids_NJ].get(mode="clip")
    N, J, K, G, C = pages_NJKGC.shape
    return pages_NJKGC.transpose(0, 2, 1, 3, 4).reshape(N, K, J * G, C)


def weighted_sum(weight_NKRS: jax.Array, value_NKSC: jax.Array, accumulate: jnp.dtype) -> Float[Array, "N K R C"]:
    """Sums values over the keys. XLA's CPU backend multiplies from 64 rows on by another kernel, which has other bits
    but for whole multiples of its columns: there the values are padded to such."""

    def product(weight_NKRS, value_NKSC):
        return _dot(weight_NKRS, value_NKSC, ((3,), (2,)), accumulate)

    def on_cpu(weight_NKRS, value_NKSC):
        C = value_NKSC.shape[3]
        return product(weight_NKRS, jnp.pad(value_NKSC, (*((0, 0),) * 3, (0, -C % WHOLE_HEAD))))[..., :C]

    return lax.platform_dependent(weight_NKRS, value_NKSC, cpu=on_cpu, default=product)


def _dot(x: jax.Array, y: jax.Array, contract: tuple[tuple[int], tuple[int]], accumulate: jnp.dtype) -> jax.Array:
    return lax.dot_general(x, y, (contract, ((0, 1), (0, 1))), preferred_element_type=accumulate)
