"""Backward of the multi-adapter matmul for gradient rows: dx, and dA, dB added to lane pages.

Shapes: W rows, D in, E out, P bank pages, Y lane pages, R ranks per page (all members together in A), N blocks,
Q rows per block, J items.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.lora_matmul.plan import LoraPlan
from pallas_kernels.lora_matmul.xla import SPAN_ITEMS, dot_blocks
from pallas_kernels.numerics import wide_dtype


def lora_matmul_backward(
    x_WD: Float[Array, "W D"],
    d_y_WE: Float[Array, "W E"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    lane_J: Int[Array, "J"],
    lanes: tuple[Float[Array, "Y R D"], tuple[Float[Array, "Y E R"], ...]],
) -> tuple[Float[Array, "W D"], tuple[Float[Array, "Y R D"], tuple[Float[Array, "Y E R"], ...]]]:
    """Returns dx, and the lanes with dA and each member's dB (of the bank's factor, scaling included) added.

    Items are added one after another to what the lanes hold, so a lane's bits depend on the order of its items and
    not on how they were dealt to steps.

    Args:
      lane_J: the lane page each work item's gradient belongs to; Y or more is dropped.
      lanes: sums so far, in float32 or wider.
    """
    num_lane_pages = lanes[0].shape[0]
    W, N, Q = x_WD.shape[0], *plan.row_NQ.shape
    rank, wide = a_PRD.shape[1] // len(members), wide_dtype(x_WD.dtype)
    span = min(SPAN_ITEMS, plan.block_J.shape[0])
    x_NQD = x_WD.at[plan.row_NQ].get(mode="fill", fill_value=0)
    d_y_NQE = d_y_WE.at[plan.row_NQ].get(mode="fill", fill_value=0)
    block_J, page_J = (jnp.pad(v, (0, -v.shape[0] % span)) for v in (plan.block_J, plan.page_J))
    lane_J = jnp.pad(lane_J, (0, -lane_J.shape[0] % span))
    splits = [sum(b.shape[1] for b in members[:i]) for i in range(1, len(members))]

    def add_span(index, carry):
        d_x_NQD, d_a_YRD, d_bs = carry
        real_J = index * span + jnp.arange(span, dtype=jnp.int32) < plan.num_items
        block, page, lane = (lax.dynamic_slice_in_dim(v, index * span, span) for v in (block_J, page_J, lane_J))
        lane = jnp.where(real_J, lane, num_lane_pages)
        x_JQD, a_JRD = x_NQD[block], a_PRD[page]
        h_JQR = dot_blocks(x_JQD, a_JRD, wide).astype(x_WD.dtype)
        d_h, new_bs = [], []
        for i, (b_PER, d_y_JQE) in enumerate(zip(members, jnp.split(d_y_NQE[block], splits, axis=-1), strict=True)):
            d_h.append(lax.dot_general(d_y_JQE, b_PER[page], (((2,), (1,)), ((0,), (0,))), preferred_element_type=wide))
            h_JQr = h_JQR[..., i * rank : (i + 1) * rank]
            d_b_JER = lax.dot_general(d_y_JQE, h_JQr, (((1,), (1,)), ((0,), (0,))), preferred_element_type=wide)
            new_bs.append(d_bs[i].at[lane].add(d_b_JER, mode="drop"))
        d_h_JQR = jnp.concatenate(d_h, axis=-1).astype(x_WD.dtype)
        d_a_JRD = lax.dot_general(d_h_JQR, x_JQD, (((1,), (1,)), ((0,), (0,))), preferred_element_type=wide)
        d_x_JQD = lax.dot_general(d_h_JQR, a_JRD, (((2,), (1,)), ((0,), (0,))), preferred_element_type=wide)
        target = jnp.where(real_J, block, N)
        d_x_NQD = d_x_NQD.at[target].add(d_x_JQD, mode="drop")
        return d_x_NQD, d_a_YRD.at[lane].add(d_a_JRD, mode="drop"), tuple(new_bs)

    start = (jnp.zeros(x_NQD.shape, wide), *lanes)
    d_x_NQD, d_a_YRD, d_bs = lax.fori_loop(0, (plan.num_items + span - 1) // span, add_span, start)
    d_x_WD = d_x_NQD.reshape(N * Q, -1).at[plan.place_T].get(mode="fill", fill_value=0).reshape(W, -1)
    return d_x_WD.astype(x_WD.dtype), (d_a_YRD, d_bs)
