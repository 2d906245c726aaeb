"""The definition: every work item by itself, added in order.

Shapes: T rows, W gradient rows, D in, E out, P bank pages, Y lane pages, R ranks per page (of all members together in
A), J work items.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lora_matmul.plan import LoraPlan, among_all
from pallas_kernels.numerics import wide_dtype


def lora_matmul(
    x_TD: Float[Array, "T D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    add_to: Float[Array, "T E"] | None = None,
) -> Float[Array, "T E"]:
    rank, wide = a_PRD.shape[1] // len(members), wide_dtype(x_TD.dtype)
    y_TE = jnp.zeros((x_TD.shape[0], sum(b.shape[1] for b in members)), wide)
    for item in range(plan.block_J.shape[0]):
        page = plan.page_J[item]
        h_TR = _dot("td,rd->tr", x_TD, a_PRD[page]).astype(x_TD.dtype)
        parts = [_dot("tr,er->te", h_TR[:, i * rank : (i + 1) * rank], b[page]) for i, b in enumerate(members)]
        y_TE = jnp.where(_rows_of(plan, item, x_TD.shape[0])[:, None], y_TE + jnp.concatenate(parts, axis=1), y_TE)
    return y_TE.astype(x_TD.dtype) if add_to is None else add_to + y_TE.astype(add_to.dtype)


def lora_linear(
    x_TD: Float[Array, "T D"],
    w_ED: Float[Array, "E D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
) -> Float[Array, "T E"]:
    return lora_matmul(x_TD, a_PRD, members, plan, add_to=_dot("td,ed->te", x_TD, w_ED)).astype(x_TD.dtype)


def lora_matmul_backward(
    x_WD: Float[Array, "W D"],
    d_y_WE: Float[Array, "W E"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    lane_J: Int[Array, "J"],
    lanes: tuple[Float[Array, "Y R D"], tuple[Float[Array, "Y E R"], ...]],
    add_to: Float[Array, "W D"] | None,
    first_page: Int[Array, ""] | int,
    num_pages: int,
) -> tuple[Float[Array, "W D"], tuple[Float[Array, "Y R D"], tuple[Float[Array, "Y E R"], ...]]]:
    rank, wide = a_PRD.shape[1] // len(members), wide_dtype(x_WD.dtype)
    d_x_WD, (d_a_YRD, d_bs) = jnp.zeros(x_WD.shape, wide), lanes
    lane_J = among_all(lane_J, first_page, num_pages, d_a_YRD.shape[0])
    for item in range(plan.block_J.shape[0]):
        mine_W1 = _rows_of(plan, item, x_WD.shape[0])[:, None]
        x, d_y, page, lane = jnp.where(mine_W1, x_WD, 0), jnp.where(mine_W1, d_y_WE, 0), plan.page_J[item], lane_J[item]
        lane = jnp.where(item < plan.num_items, lane, d_a_YRD.shape[0])
        h_WR = _dot("td,rd->tr", x, a_PRD[page]).astype(x.dtype)
        d_h, new_bs, start = [], [], 0
        for i, (b_PER, d_b_YER) in enumerate(zip(members, d_bs, strict=True)):
            mine_E = d_y[:, start : start + b_PER.shape[1]]
            d_h.append(_dot("te,er->tr", mine_E, b_PER[page]).astype(x.dtype))
            d_b_ER = _dot("te,tr->er", mine_E, h_WR[:, i * rank : (i + 1) * rank])
            new_bs.append(d_b_YER.at[lane].add(d_b_ER, mode="drop"))
            start += b_PER.shape[1]
        d_h_WR, d_bs = jnp.concatenate(d_h, axis=1), tuple(new_bs)
        d_a_YRD = d_a_YRD.at[lane].add(_dot("tr,td->rd", d_h_WR, x), mode="drop")
        d_x_WD = jnp.where(mine_W1, d_x_WD + _dot("tr,rd->td", d_h_WR, a_PRD[page]), d_x_WD)
    d_x_WD = d_x_WD.astype(x_WD.dtype) if add_to is None else add_to + d_x_WD.astype(add_to.dtype)
    return d_x_WD, (d_a_YRD, d_bs)


def _rows_of(plan: LoraPlan, item: int, num_rows: int) -> jax.Array:
    """Which rows an item is for; none, if it is not real."""
    block, row_T = plan.block_J[item], jnp.arange(num_rows, dtype=jnp.int32)
    mine_T = jnp.zeros(num_rows, bool)
    for part in plan.parts(num_rows):
        start = part.first_row + (block - part.first_block) * part.block_rows
        inside = (block >= part.first_block) & (block < part.first_block + part.num_blocks)
        mine_T |= inside & (row_T >= start + plan.first_J[item]) & (row_T < start + plan.stop_J[item])
    return mine_T & (item < plan.num_items)


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=wide_dtype(x.dtype))
