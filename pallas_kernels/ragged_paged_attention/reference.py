"""The definition: each row against its whole context, gathered and dense; its backward is autodiff's.

Shapes: T rows, H query heads, K kv heads, C head dim, P pages, G tokens per page, B sequences, M pages per sequence,
W gradient rows, A accumulator pages.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.numerics import wide_dtype
from pallas_kernels.ragged_paged_attention.layout import Accumulators, AttentionLayout


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
    T, H, C = q_THC.shape
    K, G = k_PKGC.shape[1:3]
    accumulate = wide_dtype(q_THC.dtype)
    pages_TM = layout.page_table_BM.at[layout.sequence_T].get(mode="clip")
    k_TSKC, v_TSKC = (
        pool.at[pages_TM].get(mode="clip").swapaxes(2, 3).reshape(T, -1, K, C).astype(accumulate)
        for pool in (k_PKGC, v_PKGC)
    )
    key_S = jnp.arange(pages_TM.shape[1] * G, dtype=jnp.int32)
    low_T = jnp.zeros_like(layout.position_T) if window is None else layout.position_T - window + 1
    visible_TS = (key_S[None] <= layout.position_T[:, None]) & (key_S[None] >= low_T[:, None])
    q_TKGC = q_THC.reshape(T, K, H // K, C).astype(accumulate)
    score_TKGS = jnp.einsum("tkgc,tskc->tkgs", q_TKGC, jnp.where(visible_TS[..., None, None], k_TSKC, 0)) * scale
    if softcap is not None:
        score_TKGS = softcap * jnp.tanh(score_TKGS / softcap)
    score_TKGS = jnp.where(visible_TS[:, None, None], score_TKGS, -jnp.inf)
    top_TKG = jnp.where(jnp.any(visible_TS, 1)[:, None, None], score_TKGS.max(-1), 0)
    weight_TKGS = jnp.exp(score_TKGS - top_TKG[..., None])
    total_TKG = weight_TKGS.sum(-1)
    out_TKGC = jnp.einsum("tkgs,tskc->tkgc", weight_TKGS, jnp.where(visible_TS[..., None, None], v_TSKC, 0))
    out_TKGC = out_TKGC / jnp.where(total_TKG == 0, 1, total_TKG)[..., None]
    lse_TKG = top_TKG + jnp.log(total_TKG)
    return out_TKGC.reshape(T, H, C).astype(q_THC.dtype), lse_TKG.reshape(T, H)


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
    wide, table_BM = accumulators[0].dtype, layout.page_table_BM
    own_pages = jnp.arange(table_BM.size, dtype=jnp.int32).reshape(table_BM.shape)  # shared ones, once per sequence
    own_layout = replace(layout, page_table_BM=own_pages)

    def attend(q, k, v):
        return ragged_paged_attention(q, k, v, own_layout, scale=scale, softcap=softcap, window=window)[0]

    k, v = (pool.at[table_BM.reshape(-1)].get(mode="clip").astype(wide) for pool in (k_PKGC, v_PKGC))
    _, pull = jax.vjp(attend, q_WHC.astype(wide), k, v)
    d_q_WHC, *d_pools = pull(d_out_WHC.astype(wide))
    acc_pages = acc_table_BM.reshape(-1)
    d_k, d_v = (acc.at[acc_pages].add(d, mode="drop") for acc, d in zip(accumulators, d_pools, strict=True))
    return d_q_WHC.astype(q_WHC.dtype), (d_k, d_v)
