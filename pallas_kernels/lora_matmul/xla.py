"""Runs anywhere: a loop over work items, as many turns as there is work; a batch without adapters skips it all.

Weights are taken by page, never selected by multiplying with a mask: a NaN adapter reaches only its own rows.
The matmuls contract last axes and have Q >= 2 rows, so on XLA's CPU backend a row's bits depend on nothing but itself.
There an item at a time is fastest, its weights are read where they lie; but where all blocks have the same adapter, as
those of a prompt or of a job have, all rows at once, a page at a time: only so do all cores work on a product. Either
way gives the same bits. Elsewhere a span of items shares each launch.

Shapes: T rows, W gradient rows, D in, E out, P bank pages, Y lane pages, R ranks per page (of all members together in
A), N blocks, Q rows per block, J items.
"""

from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.lora_matmul.plan import LoraPlan, Part, SharedPages, among_all
from pallas_kernels.numerics import contract, wide_dtype

SPAN_ITEMS = 16  # work items per turn of the span loop
UNROLLED = 8  # blocks that are summed in one pass


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
        shared = plan.shared or plan.find_shared(T)
        y_TE = lax.platform_dependent(
            x_TD, y_TE, a_PRD, members, plan,
            cpu=partial(_on_cpu, part=part, shared=shared),
            default=partial(_span_by_span, part=part),
        )  # fmt: skip
    return y_TE.astype(x_TD.dtype if add_to is None else add_to.dtype)


def _blocks(x_TD: jax.Array, part: Part) -> Float[Array, "N Q D"]:
    x_TD = x_TD[part.first_row : part.stop_row]
    missing = part.num_blocks * part.block_rows - x_TD.shape[0]
    x_TD = jnp.pad(x_TD, ((0, missing), (0, 0))) if missing else x_TD
    return x_TD.reshape(part.num_blocks, part.block_rows, -1)


def _on_cpu(x_TD, y_TE, a_PRD, members, plan: LoraPlan, part: Part, shared: SharedPages) -> Float[Array, "T E"]:
    args, (first_item, stop_item) = (x_TD, a_PRD, members, plan), plan.items_of(part)
    if part == plan.main_part(x_TD.shape[0]):
        y_TE = _page_by_page(y_TE, *args, first_item, shared)
        first_item = jnp.where(shared.count > 0, stop_item, first_item)
    return _item_by_item(y_TE, *args, first_item, stop_item, part)


def _page_by_page(
    y_TE, x_TD, a_PRD, members, plan: LoraPlan, first_item: jax.Array, shared: SharedPages
) -> Float[Array, "T E"]:
    """Adds the pages that all rows share to y, over all rows at once."""
    rank, wide = a_PRD.shape[1] // len(members), wide_dtype(x_TD.dtype)

    def add_page(index, y_TE):
        page = plan.page_J[first_item + index]
        h_TR = _dot(x_TD, lax.dynamic_index_in_dim(a_PRD, page, keepdims=False), wide).astype(x_TD.dtype)
        return jnp.where(shared.mine_T[:, None], y_TE + _expand(h_TR, members, page, rank, wide), y_TE)

    return lax.fori_loop(0, shared.count, add_page, y_TE)


def _expand(h_QR: jax.Array, members, page: jax.Array, rank: int, wide) -> jax.Array:
    """Each member's ranks through its B of a page, one member after another."""
    parts = [
        _dot(h_QR[:, i * rank : (i + 1) * rank], lax.dynamic_index_in_dim(b_PER, page, keepdims=False), wide)
        for i, b_PER in enumerate(members)
    ]
    return jnp.concatenate(parts, axis=1)


def _item_by_item(
    y_TE, x_TD, a_PRD, members, plan: LoraPlan, first_item: jax.Array, stop_item: jax.Array, part: Part
) -> Float[Array, "T E"]:
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
        mine_Q = (row_Q >= plan.first_J[item]) & (row_Q < plan.stop_J[item])
        y_QE = jnp.where(mine_Q[:, None], y_QE + _expand(h_QR, members, page, rank, wide), y_QE)
        return lax.dynamic_update_slice_in_dim(y_TE, y_QE, row, axis=0)

    return lax.fori_loop(first_item, stop_item, add_item, y_TE)[:T]


def _span_by_span(x_TD, y_TE, a_PRD, members, plan: LoraPlan, part: Part) -> Float[Array, "T E"]:
    """Adds the items to their rows of y; nothing is touched where there are none."""
    first_item, stop_item = plan.items_of(part)
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
    add_to: Float[Array, "W D"] | None,
    first_page: Int[Array, ""] | int,
    num_pages: int,
) -> tuple[Float[Array, "W D"], tuple[Float[Array, "Y R D"], tuple[Float[Array, "Y E R"], ...]]]:
    wide, lane_J = wide_dtype(x_WD.dtype), among_all(lane_J, first_page, num_pages, lanes[0].shape[0])
    start_WD = jnp.zeros(x_WD.shape, wide) if add_to is None else add_to.astype(wide)
    d_x_WD, *new_lanes = lax.platform_dependent(
        x_WD, d_y_WE, a_PRD, members, plan, lane_J, (start_WD, *lanes),
        cpu=partial(_backward_on_cpu, shared=plan.shared or plan.find_shared(x_WD.shape[0])),
        default=_backward_by_span,
    )  # fmt: skip
    return d_x_WD.astype(x_WD.dtype if add_to is None else add_to.dtype), tuple(new_lanes)


def _backward_on_cpu(x_WD, d_y_WE, a_PRD, members, plan: LoraPlan, lane_J, carry, shared: SharedPages):
    """All rows at once where they share their pages, and item by item where they do not."""
    Q, weights = plan.row_block, (a_PRD, members)
    row_Q = jnp.arange(Q, dtype=jnp.int32)

    def add_page(index, carry):
        d_x_WD, *lanes = carry
        return _add_rows(x_WD, d_y_WE, shared.mine_T, plan.page_J[index], lane_J[index], weights, Q, d_x_WD, lanes)

    def add_item(item, carry):
        d_x_WD, *lanes = carry
        x_QD, d_y_QE, d_x_QD = (
            lax.dynamic_slice_in_dim(array, plan.block_J[item] * Q, Q) for array in (x_WD, d_y_WE, d_x_WD)
        )
        mine_Q = (row_Q >= plan.first_J[item]) & (row_Q < plan.stop_J[item])
        d_x_QD, *lanes = _add_rows(x_QD, d_y_QE, mine_Q, plan.page_J[item], lane_J[item], weights, Q, d_x_QD, lanes)
        return lax.dynamic_update_slice_in_dim(d_x_WD, d_x_QD, plan.block_J[item] * Q, axis=0), *lanes

    carry = lax.fori_loop(0, shared.count, add_page, carry)
    return lax.fori_loop(jnp.where(shared.count > 0, plan.num_items, 0), plan.num_items, add_item, carry)


def _add_rows(x_WD, d_y_WE, mine_W, page, lane, weights, row_block: int, d_x_WD, lanes):
    """d_x and the lanes with these rows' part of a page added. Sums of dA and dB are made a row block after another.
    Rows that are not its own add zeros, as long as they are finite."""
    (a_PRD, members), (d_a_YRD, d_bs) = weights, lanes
    rank, wide, mine_W1 = a_PRD.shape[1] // len(members), wide_dtype(x_WD.dtype), mine_W[:, None]

    def plus_blocks(sum_XZ, left_WX, right_WZ):
        """sum + left^T right; a product of few rows X and many columns Z is the fast one."""
        left_NQX, right_NQZ = (x.reshape(-1, row_block, x.shape[1]) for x in (left_WX, right_WZ))
        added_NXZ = _sum_rows(left_NQX, right_NQZ, wide)
        N = added_NXZ.shape[0]
        return lax.fori_loop(0, N, lambda n, sum_XZ: sum_XZ + added_NXZ[n], sum_XZ, unroll=min(N, UNROLLED))

    a_RD = lax.dynamic_index_in_dim(a_PRD, page, keepdims=False)
    h_WR = jnp.where(mine_W1, _dot(x_WD, a_RD, wide), 0).astype(x_WD.dtype)
    d_h, new_bs = [], []
    for i, (b_PER, d_y_We) in enumerate(zip(members, jnp.split(d_y_WE, _splits(members), axis=1), strict=True)):
        d_h.append(contract(d_y_We, lax.dynamic_index_in_dim(b_PER, page, keepdims=False), wide))
        d_b_RE = plus_blocks(d_bs[i].at[lane].get(mode="clip").T, h_WR[:, i * rank : (i + 1) * rank], d_y_We)
        new_bs.append(d_bs[i].at[lane].set(d_b_RE.T, mode="drop"))
    d_h_WR = jnp.where(mine_W1, jnp.concatenate(d_h, axis=1), 0).astype(x_WD.dtype)
    d_x_WD = d_x_WD + jnp.where(mine_W1, contract(d_h_WR, a_RD, wide), 0)
    d_a_RD = plus_blocks(d_a_YRD.at[lane].get(mode="clip"), d_h_WR, x_WD)
    return d_x_WD, d_a_YRD.at[lane].set(d_a_RD, mode="drop"), tuple(new_bs)


def _splits(members: tuple[jax.Array, ...]) -> list[int]:
    """Where one member's outputs end and the next one's begin."""
    return list(accumulate(b.shape[1] for b in members))[:-1]


def _backward_by_span(x_WD, d_y_WE, a_PRD, members, plan: LoraPlan, lane_J, carry):
    d_x_WD, *lanes = carry
    num_lane_pages = lanes[0].shape[0]
    W, Q = x_WD.shape[0], plan.row_block
    rank, wide = a_PRD.shape[1] // len(members), wide_dtype(x_WD.dtype)
    span = min(SPAN_ITEMS, plan.block_J.shape[0])
    x_NQD, d_y_NQE = x_WD.reshape(-1, Q, x_WD.shape[1]), d_y_WE.reshape(-1, Q, d_y_WE.shape[1])
    N, row_Q = x_NQD.shape[0], jnp.arange(Q, dtype=jnp.int32)
    fields = [_padded(v, span) for v in (plan.block_J, plan.page_J, plan.first_J, plan.stop_J, lane_J)]
    splits = _splits(members)

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
            d_b_JER = _sum_rows(d_y_JQe, h_JQR[..., i * rank : (i + 1) * rank], wide)
            new_bs.append(d_bs[i].at[lane].add(d_b_JER, mode="drop"))
        d_h_JQR = jnp.concatenate(d_h, axis=-1).astype(x_WD.dtype)
        d_a_JRD = _sum_rows(d_h_JQR, x_JQD, wide)
        d_x_JQD = lax.dot_general(d_h_JQR, a_JRD, (((2,), (1,)), ((0,), (0,))), preferred_element_type=wide)
        target = jnp.where(real_J, block, N)
        d_x_NQD = d_x_NQD.at[target].add(jnp.where(mine_JQ1, d_x_JQD, 0), mode="drop")
        return d_x_NQD, d_a_YRD.at[lane].add(d_a_JRD, mode="drop"), tuple(new_bs)

    start = (d_x_WD.reshape(x_NQD.shape), *lanes)
    d_x_NQD, *new_lanes = lax.fori_loop(0, (plan.num_items + span - 1) // span, add_span, start)
    return d_x_NQD.reshape(W, -1), *new_lanes


def _padded(vector_J: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(vector_J, (0, -vector_J.shape[0] % multiple))


def _dot(x_QI: jax.Array, w_OI: jax.Array, wide: jnp.dtype) -> jax.Array:
    return lax.dot_general(x_QI, w_OI, (((1,), (1,)), ((), ())), preferred_element_type=wide)


def _sum_rows(x_NQI: jax.Array, y_NQO: jax.Array, wide: jnp.dtype) -> jax.Array:
    """[N, Q, I] x [N, Q, O] -> [N, I, O], block by block."""
    return lax.dot_general(x_NQI, y_NQO, (((1,), (1,)), ((0,), (0,))), preferred_element_type=wide)


def dot_blocks(x_JQI: jax.Array, w_JOI: jax.Array, accumulate: jnp.dtype) -> jax.Array:
    """[J, Q, I] x [J, O, I] -> [J, Q, O], item by item."""
    return lax.dot_general(x_JQI, w_JOI, (((2,), (2,)), ((0,), (0,))), preferred_element_type=accumulate)
