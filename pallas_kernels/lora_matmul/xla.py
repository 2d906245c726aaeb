"""Runs anywhere: a loop over spans of work items, as many turns as there is work; no adapters, no cost.

Weights are gathered by page, never selected by multiplying with a mask: a NaN adapter reaches only its own rows.
The matmuls contract last axes and have Q >= 2 rows, so on XLA's CPU backend a row's bits depend on nothing but itself.

Shapes: T rows, D in, E out, P pages, R ranks per page (of all members together in A), N blocks, Q rows per block,
J items.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.lora_matmul.plan import LoraPlan
from pallas_kernels.numerics import wide_dtype

SPAN_ITEMS = 16  # work items per loop turn: their weights should fit a cache


def lora_matmul(
    x_TD: Float[Array, "T D"], a_PRD: Float[Array, "P R D"], members: tuple[Float[Array, "P E R"], ...], plan: LoraPlan
) -> Float[Array, "T E"]:
    T = x_TD.shape[0]
    N, Q = plan.row_NQ.shape
    rank = a_PRD.shape[1] // len(members)
    span = min(SPAN_ITEMS, plan.block_J.shape[0])
    accumulate = wide_dtype(x_TD.dtype)
    x_NQD = x_TD.at[plan.row_NQ].get(mode="fill", fill_value=0)
    block_J = jnp.pad(plan.block_J, (0, -plan.block_J.shape[0] % span))
    page_J = jnp.pad(plan.page_J, (0, -plan.page_J.shape[0] % span))

    def add_span(index, y_NQE):
        item_J = index * span + jnp.arange(span, dtype=jnp.int32)
        block, page = (lax.dynamic_slice_in_dim(v, index * span, span) for v in (block_J, page_J))
        h_JQR = dot_blocks(x_NQD[block], a_PRD[page], accumulate).astype(x_TD.dtype)
        y_JQE = jnp.concatenate(
            [dot_blocks(h_JQR[..., i * rank : (i + 1) * rank], b[page], accumulate) for i, b in enumerate(members)],
            axis=-1,
        )
        target = jnp.where(item_J < plan.num_items, block, N)
        return y_NQE.at[target].add(y_JQE, mode="drop")

    y_NQE = jnp.zeros((N, Q, sum(b.shape[1] for b in members)), accumulate)
    y_NQE = lax.fori_loop(0, (plan.num_items + span - 1) // span, add_span, y_NQE)
    return y_NQE.reshape(N * Q, -1).at[plan.place_T].get(mode="fill", fill_value=0).reshape(T, -1).astype(x_TD.dtype)


def dot_blocks(x_JQI: jax.Array, w_JOI: jax.Array, accumulate: jnp.dtype) -> jax.Array:
    """[J, Q, I] x [J, O, I] -> [J, Q, O], item by item."""
    return lax.dot_general(x_JQI, w_JOI, (((2,), (2,)), ((0,), (0,))), preferred_element_type=accumulate)
