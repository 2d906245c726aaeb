"""Attention over pages and its backward in float64, row by row from the definition; inputs of a backward call.

Shapes: T rows, H query heads, K kv heads, C head dim, P pages, A accumulator pages, G tokens per page, S keys of a row.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import ragged_paged_attention

SPARE_PAGES = 2  # of the accumulators

_forward = jax.jit(
    partial(ragged_paged_attention, implementation="reference"), static_argnames=("scale", "softcap", "window")
)


def dense(case, q_THC, k_PKGC, v_PKGC, layout):
    """Output and log-sum-exp."""
    q_THC, k_PKGC, v_PKGC = (np.asarray(x, np.float64) for x in (q_THC, k_PKGC, v_PKGC))
    T, H, C = q_THC.shape
    out_THC, lse_TH = np.zeros((T, H, C)), np.full((T, H), -np.inf)
    for t, h, head, page_S, offset_S in _rows(case, H, k_PKGC, layout):
        _, score_S = _scores(case, q_THC[t, h], k_PKGC[page_S, head, offset_S])
        weight_S = np.exp(score_S - score_S.max())
        out_THC[t, h] = weight_S @ v_PKGC[page_S, head, offset_S] / weight_S.sum()
        lse_TH[t, h] = score_S.max() + np.log(weight_S.sum())
    return out_THC, lse_TH


def dense_backward(case, d_out_THC, q_THC, out_THC, lse_TH, k_PKGC, v_PKGC, layout, accumulators, acc_table_BM):
    """dQ, and the accumulators with dK and dV added; what the forward returned is not used."""
    d_out_THC, q_THC, k_PKGC, v_PKGC = (np.asarray(x, np.float64) for x in (d_out_THC, q_THC, k_PKGC, v_PKGC))
    d_q_THC = np.zeros_like(q_THC)
    d_k_AKGC, d_v_AKGC = (np.array(acc, np.float64) for acc in accumulators)
    acc_of_page = {}  # of each sequence
    for page_M, acc_M in zip(np.asarray(layout.page_table_BM), np.asarray(acc_table_BM), strict=True):
        acc_of_page |= zip(page_M.tolist(), acc_M.tolist(), strict=True)
    for t, h, head, page_S, offset_S in _rows(case, q_THC.shape[1], k_PKGC, layout):
        k_SC, v_SC = k_PKGC[page_S, head, offset_S], v_PKGC[page_S, head, offset_S]
        slope_S, score_S = _scores(case, q_THC[t, h], k_SC)
        weight_S = np.exp(score_S - score_S.max())
        weight_S /= weight_S.sum()
        d_weight_S = v_SC @ d_out_THC[t, h]
        d_score_S = weight_S * (d_weight_S - weight_S @ d_weight_S) * slope_S
        d_q_THC[t, h] = d_score_S @ k_SC
        acc_S = np.array([acc_of_page[page] for page in page_S])
        held_S = acc_S < len(d_k_AKGC)
        place = acc_S[held_S], head, offset_S[held_S]
        d_k_AKGC[place] += d_score_S[held_S, None] * q_THC[t, h]
        d_v_AKGC[place] += weight_S[held_S, None] * d_out_THC[t, h]
    return d_q_THC, d_k_AKGC, d_v_AKGC


def backward_inputs(case, dtype, seed=1):
    """Arguments of a backward call: accumulators hold something already, and the first page has none."""
    q, k, v, layout = case.make(dtype)
    rng = np.random.default_rng(seed)
    d_out = jnp.asarray(rng.standard_normal(q.shape), dtype)
    out, lse = _forward(q, k, v, layout, **case.settings)
    num_pages = k.shape[0] + SPARE_PAGES
    accumulators = tuple(jnp.asarray(rng.standard_normal((num_pages, *k.shape[1:])), np.float32) for _ in range(2))
    table = layout.page_table_BM
    acc_table = rng.permutation(num_pages)[: table.size].reshape(table.shape).astype(np.int32)
    acc_table[0, 0] = num_pages
    return d_out, q, out, lse, k, v, layout, accumulators, jnp.asarray(acc_table)


def _rows(case, num_heads, k_PKGC, layout):
    """Row, head, kv head, and the place of each key that they see."""
    group, page_size = num_heads // k_PKGC.shape[1], k_PKGC.shape[2]
    table_BM = np.asarray(layout.page_table_BM)
    for t, position in enumerate(np.asarray(layout.position_T)):
        if position < 0:
            continue
        low = 0 if case.window is None else max(position - case.window + 1, 0)
        key_S = np.arange(low, position + 1)
        page_S = table_BM[layout.sequence_T[t]][key_S // page_size]
        for h in range(num_heads):
            yield t, h, h // group, page_S, key_S % page_size


def _scores(case, q_C, k_SC):
    """d score / d (q k), and the scores."""
    score_S = k_SC @ q_C * case.scale
    if case.softcap is None:
        return case.scale, score_S
    capped_S = case.softcap * np.tanh(score_S / case.softcap)
    return case.scale * (1 - (capped_S / case.softcap) ** 2), capped_S
