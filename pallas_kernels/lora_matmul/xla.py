"""Runs anywhere: a loop over work items, as many turns as there is work; a batch without adapters skips it all.

Weights are taken by page, never selected by multiplying with a mask: a NaN adapter reaches only its own rows.
The matmuls contract last axes and have Q >= 2 rows, so on XLA's CPU backend a row's bits depend on nothing but itself.
There an item at a time is fastest: its weights are read where they lie. Elsewhere a span of items shares each launch.

Shapes: T rows, W gradient rows, D in, E out, P bank pages, Y lane pages, R ranks per page (of all members together in
A), N blocks, Q rows per block, J items.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.lora_matmul.plan import LoraPlan, Part
from pallas_kernels.numerics import wide_dtype

SPAN_ITEMS = 16  # work items per turn of the span loop


def lora_matmul(
    x_TD: Float[Array, "T D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    add_to: Float[Array, "T E"] | None = None,
) -> Float[Array, "T E"]:
    T, E, wide = x_TD.shape[0], sum(b.shape[1] for b in members), wide_dtype(x_TD.dtype)
    y_TE = jnp.zeros((T, E), wide) if add_to is None else add_to.astype(wide)
    for part in plan.parts(T):
        y_TE = lax.platform_dependent(
            x_TD, y_TE, a_PRD, members, plan, cpu=_each(_item_by_item, part), default=_each(_span_by_span, part)
        )
    return y_TE.astype(x_TD.dtype if add_to is None else add_to.dtype)


def _blocks(x_TD: jax.Array, part: Part) -> Float[Array, "N Q D"]:
    x_TD = x_TD[part.first_row : part.stop_row]
    missing = part.num_blocks * part.block_rows - x_TD.shape[0]
    x_TD = jnp.pad(x_TD, ((0, missing), (0, 0))) if missing else x_TD
    return x_TD.reshape(part.num_blocks, part.block_rows, -1)


def _each(function, part: Part):
    return lambda *args: function(*args, part)


def _items_of(plan: LoraPlan, part: Part) -> tuple[jax.Array, jax.Array]:
    """The part's items, [first, stop)."""
    bounds = (part.first_block, part.first_block + part.num_blocks)
    first, stop = (jnp.sum(plan.real_J() & (plan.block_J < block), dtype=jnp.int32) for block in bounds)
    return first, stop


def _item_by_item(x_TD, y_TE, a_PRD, members, plan: LoraPlan, part: Part) -> Float[Array, "T E"]:
    """Adds the items to their rows of y, in place."""
    rank, wide = a_PRD.shape[1] // len(members), wide_dtype(x_TD.dtype)
    row_Q, T = jnp.arange(part.block_rows, dtype=jnp.int32), x_TD.shape[0]
    missing = max(part.stop_row - T, 0)
    if missing:  # the last block reaches past the last row
        x_TD, y_TE = (jnp.pad(array, ((0, missing), (0, 0))) for array in (x_TD, y_TE))

    def add_item(item, y_TE):
        row = part.first_row + (plan.block_J[item] - part.first_block) * part.block_rows
        page = plan.page_J[item]
        x_QD, y_QE = (lax.dynamic_slice_in_dim(array, row, part.block_rows) for array in (x_TD, y_TE))
        h_QR = _dot(x_QD, lax.dynamic_index_in_dim(a_PRD, page, keepdims=False), wide).astype(x_TD.dtype)
        parts = [
            _dot(h_QR[:, i * rank : (i + 1) * rank], lax.dynamic_index_in_dim(b, page, keepdims=False), wide)
            for i, b in enumerate(members)
        ]
        mine_Q = (row_Q >= plan.first_J[item]) & (row_Q < plan.stop_J[item])
        y_QE = jnp.where(mine_Q[:, None], y_QE + jnp.concatenate(parts, axis=1), y_QE)
        return lax.dynamic_update_slice_in_dim(y_TE, y_QE, row, axis=0)

    return lax.fori_loop(*_items_of(plan, part), add_item, y_TE)[:T]


def _span_by_span(x_TD, y_TE, a_PRD, members, plan: LoraPlan, part: Part) -> Float[Array, "T E"]:
    """Adds the items to their rows of y; nothing is touched where there are none."""
    first_item, stop_item = _items_of(plan, part)
    rows = slice(part.first_row, part.stop_row)

    def work(x_TD, y_TE):
        y_NQE = _sum_spans(_blocks(x_TD, part), a_PRD, members, plan, part, first_item, stop_item)
        # not .at[rows].add: where those are all rows its index is empty, on which XLA crashes in a split program
        added_TE = y_NQE.reshape(-1, y_TE.shape[1])[: y_TE.shape[0] - part.first_row]
        return lax.dynamic_update_slice_in_dim(y_TE, y_TE[rows] + added_TE, part.first_row, axis=0)

    return lax.cond(stop_item > first_item, work, lambda _, y_TE: y_TE, x_TD, y_TE)


def _sum_spans(
    x_NQD, a_PRD, members, plan: LoraPlan, part: Part, first_item: jax.Array, stop_item: jax.Array
) -> Float[Array, "N Q E"]:
    rank, wide = a_PRD.shape[1] // len(members), wide_dtype(x_NQD.dtype)
    span = min(SPAN_ITEMS, plan.block_J.shape[0])
    row_Q = jnp.arange(part.block_rows, dtype=jnp.int32)
    fields = [_padded(v, span) for v in (plan.block_J, plan.page_J, plan.first_J, plan.stop_J)]

    def add_span(index, y_NQE):
        start = first_item + index * span
        start = jnp.minimum(start, fields[0].shape[0] - span)  # as dynamic_slice would do
        block, page, first, stop = (lax.dynamic_slice_in_dim(v, start, span) for v in fields)
        item_J = start + jnp.arange(span, dtype=jnp.int32)
        real_J = (item_J >= first_item + index * span) & (item_J < stop_item)
        block = jnp.where(real_J, block - part.first_block, part.num_blocks)
        h_JQR = dot_blocks(x_NQD.at[block].get(mode="clip"), a_PRD[page], wide).astype(x_NQD.dtype)
        parts = [dot_blocks(h_JQR[..., i * rank : (i + 1) * rank], b[page], wide) for i, b in enumerate(members)]
        mine_JQ = (row_Q[None] >= first[:, None]) & (row_Q[None] < stop[:, None])
        y_JQE = jnp.where(mine_JQ[..., None], jnp.concatenate(parts, axis=-1), 0)
        return y_NQE.at[block].add(y_JQE, mode="drop")

    y_NQE = jnp.zeros((*x_NQD.shape[:2], sum(b.shape[1] for b in members)), wide)
    return lax.fori_loop(0, (stop_item - first_item + span - 1) // span, add_span, y_NQE)


def lora_matmul_backward(
    x_WD: Float[Array, "W D"],
    d_y_WE: Float[Array, "W E"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    lane_J: Int[Array, "J"],
    lanes: tuple[Float[Array, "Y R D"], tuple[Float[Array, "Y E R"], ...]],
    add_to: Float[Array, "W D"] | None = None,
) -> tuple[Float[Array, "W D"], tuple[Float[Array, "Y R D"], tuple[Float[Array, "Y E R"], ...]]]:
    num_lane_pages = lanes[0].shape[0]
    W, Q = x_WD.shape[0], plan.row_block
    rank, wide = a_PRD.shape[1] // len(members), wide_dtype(x_WD.dtype)
    span = min(SPAN_ITEMS, plan.block_J.shape[0])
    x_NQD, d_y_NQE = x_WD.reshape(-1, Q, x_WD.shape[1]), d_y_WE.reshape(-1, Q, d_y_WE.shape[1])
    N, row_Q = x_NQD.shape[0], jnp.arange(Q, dtype=jnp.int32)
    fields = [_padded(v, span) for v in (plan.block_J, plan.page_J, plan.first_J, plan.stop_J, lane_J)]
    splits = [sum(b.shape[1] for b in members[:i]) for i in range(1, len(members))]

    def add_span(index, carry):
        d_x_NQD, d_a_YRD, d_bs = carry
        real_J = index * span + jnp.arange(span, dtype=jnp.int32) < plan.num_items
        block, page, first, stop, lane = (lax.dynamic_slice_in_dim(v, index * span, span) for v in fields)
        lane = jnp.where(real_J, lane, num_lane_pages)
        mine_JQ1 = ((row_Q[None] >= first[:, None]) & (row_Q[None] < stop[:, None]))[..., None]
        x_JQD, a_JRD = jnp.where(mine_JQ1, x_NQD[block], 0), a_PRD[page]
        d_y_JQE = jnp.where(mine_JQ1, d_y_NQE[block], 0)
        h_JQR = dot_blocks(x_JQD, a_JRD, wide).astype(x_WD.dtype)
        d_h, new_bs = [], []
        for i, (b_PER, d_y_JQe) in enumerate(zip(members, jnp.split(d_y_JQE, splits, axis=-1), strict=True)):
            d_h.append(lax.dot_general(d_y_JQe, b_PER[page], (((2,), (1,)), ((0,), (0,))), preferred_element_type=wide))
            h_JQr = h_JQR[..., i * rank : (i + 1) * rank]
            d_b_JER = lax.dot_general(d_y_JQe, h_JQr, (((1,), (1,)), ((0,), (0,))), preferred_element_type=wide)
            new_bs.append(d_bs[i].at[lane].add(d_b_JER, mode="drop"))
        d_h_JQR = jnp.concatenate(d_h, axis=-1).astype(x_WD.dtype)
        d_a_JRD = lax.dot_general(d_h_JQR, x_JQD, (((1,), (1,)), ((0,), (0,))), preferred_element_type=wide)
        d_x_JQD = lax.dot_general(d_h_JQR, a_JRD, (((2,), (1,)), ((0,), (0,))), preferred_element_type=wide)
        target = jnp.where(real_J, block, N)
        d_x_NQD = d_x_NQD.at[target].add(jnp.where(mine_JQ1, d_x_JQD, 0), mode="drop")
        return d_x_NQD, d_a_YRD.at[lane].add(d_a_JRD, mode="drop"), tuple(new_bs)

    start = (jnp.zeros(x_NQD.shape, wide), *lanes)
    d_x_NQD, d_a_YRD, d_bs = lax.fori_loop(0, (plan.num_items + span - 1) // span, add_span, start)
    d_x_WD = d_x_NQD.reshape(W, -1)
    d_x_WD = d_x_WD.astype(x_WD.dtype) if add_to is None else add_to + d_x_WD.astype(add_to.dtype)
    return d_x_WD, (d_a_YRD, d_bs)


def _padded(vector_J: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(vector_J, (0, -vector_J.shape[0] % multiple))


def _dot(x_QI: jax.Array, w_OI: jax.Array, wide: jnp.dtype) -> jax.Array:
    return lax.dot_general(x_QI, w_OI, (((1,), (1,)), ((), ())), preferred_element_type=wide)


def dot_blocks(x_JQI: jax.Array, w_JOI: jax.Array, accumulate: jnp.dtype) -> jax.Array:
    """[J, Q, I] x [J, O, I] -> [J, Q, O], item by item."""
    return lax.dot_general(x_JQI, w_JOI, (((2,), (2,)), ((0,), (0,))), preferred_element_type=accumulate)
