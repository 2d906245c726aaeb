"""Runs anywhere: a loop over work items, as many turns as there is work; a batch without adapters skips it all.

Weights are taken by page, never selected by multiplying with a mask: a NaN adapter reaches only its own rows.
The matmuls contract last axes and have Q >= 2 rows, so on XLA's CPU backend a row's bits depend on nothing but itself.
There an item at a time is fastest: its weights are read where they lie. Elsewhere a span of items shares each launch.

Shapes: T rows, D in, E out, P pages, R ranks per page (of all members together in A), N blocks, Q rows per block,
J items.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.lora_matmul.plan import LoraPlan
from pallas_kernels.numerics import wide_dtype

SPAN_ITEMS = 16  # work items per turn of the span loop


def lora_matmul(
    x_TD: Float[Array, "T D"], a_PRD: Float[Array, "P R D"], members: tuple[Float[Array, "P E R"], ...], plan: LoraPlan
) -> Float[Array, "T E"]:
    y_TE = jnp.zeros((x_TD.shape[0], sum(b.shape[1] for b in members)), wide_dtype(x_TD.dtype))

    def work(y_TE):
        return lax.platform_dependent(
            x_TD, a_PRD, members, plan, y_TE, cpu=_item_by_item, default=_span_by_span
        )  # fmt: skip

    return lax.cond(plan.num_items > 0, work, lambda y_TE: y_TE, y_TE).astype(x_TD.dtype)


def _item_by_item(x_TD, a_PRD, members, plan: LoraPlan, y_TE):
    rank, wide = a_PRD.shape[1] // len(members), y_TE.dtype

    def add_item(item, y_TE):
        row_Q, page = plan.row_NQ[plan.block_J[item]], plan.page_J[item]
        x_QD = x_TD.at[row_Q].get(mode="fill", fill_value=0)
        h_QR = _dot(x_QD, lax.dynamic_index_in_dim(a_PRD, page, keepdims=False), wide).astype(x_TD.dtype)
        parts = [
            _dot(h_QR[:, i * rank : (i + 1) * rank], lax.dynamic_index_in_dim(b, page, keepdims=False), wide)
            for i, b in enumerate(members)
        ]
        return y_TE.at[row_Q].add(jnp.concatenate(parts, axis=1), mode="drop")

    return lax.fori_loop(0, plan.num_items, add_item, y_TE)


def _span_by_span(x_TD, a_PRD, members, plan: LoraPlan, y_TE):
    T, N = x_TD.shape[0], plan.row_NQ.shape[0]
    rank, wide = a_PRD.shape[1] // len(members), y_TE.dtype
    span = min(SPAN_ITEMS, plan.block_J.shape[0])
    x_NQD = x_TD.at[plan.row_NQ].get(mode="fill", fill_value=0)
    block_J, page_J = (jnp.pad(v, (0, -v.shape[0] % span)) for v in (plan.block_J, plan.page_J))

    def add_span(index, y_NQE):
        item_J = index * span + jnp.arange(span, dtype=jnp.int32)
        block, page = (lax.dynamic_slice_in_dim(v, index * span, span) for v in (block_J, page_J))
        h_JQR = dot_blocks(x_NQD[block], a_PRD[page], wide).astype(x_TD.dtype)
        parts = [dot_blocks(h_JQR[..., i * rank : (i + 1) * rank], b[page], wide) for i, b in enumerate(members)]
        target = jnp.where(item_J < plan.num_items, block, N)
        return y_NQE.at[target].add(jnp.concatenate(parts, axis=-1), mode="drop")

    y_NQE = jnp.zeros((*plan.row_NQ.shape, y_TE.shape[1]), wide)
    y_NQE = lax.fori_loop(0, (plan.num_items + span - 1) // span, add_span, y_NQE)
    return y_NQE.reshape(-1, y_TE.shape[1]).at[plan.place_T].get(mode="fill", fill_value=0).reshape(T, -1)


def _dot(x_QI: jax.Array, w_OI: jax.Array, wide: jnp.dtype) -> jax.Array:
    return lax.dot_general(x_QI, w_OI, (((1,), (1,)), ((), ())), preferred_element_type=wide)


def dot_blocks(x_JQI: jax.Array, w_JOI: jax.Array, accumulate: jnp.dtype) -> jax.Array:
    """[J, Q, I] x [J, O, I] -> [J, Q, O], item by item."""
    return lax.dot_general(x_JQI, w_JOI, (((2,), (2,)), ((0,), (0,))), preferred_element_type=accumulate)
