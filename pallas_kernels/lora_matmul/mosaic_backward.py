"""The adapters' backward on Hopper: h and dh by the forward's shrink, dx by its expand, and the sums of dA and dB.

A lane page's gradient has one owner per 64 of its columns, who adds its items one after another to what the lane holds:
no atomics, and the same bits however the items were dealt to steps.

Shapes: W gradient rows, D in, E out, P bank pages, Y lane pages, Z of them that items may have, R ranks per page (of
all members together in A), J items, Q rows per block.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.lora_matmul.mosaic import RANK_COLUMNS, Tiles, expand_blocks, in_pool, rows_of, shrink_blocks
from pallas_kernels.lora_matmul.plan import PAGE_RANK, LoraPlan, Part
from pallas_kernels.mosaic import index, plgpu

WIDTH = 64  # columns of an owner's tile: narrow, so that one lane already keeps many cores busy
STAGES = 4  # items on their way to an owner


class ByLane(NamedTuple):
    """The items lane by lane, in order; those of lane page first_page + z are item_J[first[z] : first[z + 1]]."""

    item_J: Int[Array, "J"]
    first_Z1: Int[Array, "Z1"]
    first_page_1: Int[Array, "1"]


def run(
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
    *,
    interpret: bool,
) -> tuple[Float[Array, "W D"], tuple[Float[Array, "Y R D"], tuple[Float[Array, "Y E R"], ...]]]:
    (part,) = plan.parts(x_WD.shape[0])
    first_N1 = plan.first_items(part.num_blocks)
    d_x_ref = jax.new_ref(jnp.zeros_like(x_WD) if add_to is None else add_to)
    d_a_ref, *d_b_refs = map(jax.new_ref, (lanes[0], *lanes[1]))
    h_JQR = shrink_blocks(x_WD, (a_PRD,), plan, first_N1, part, interpret, rank_major=True)
    d_h_JQR = shrink_blocks(d_y_WE, members, plan, first_N1, part, interpret, rank_major=False)
    expand_blocks(d_h_JQR, (a_PRD,), plan, first_N1, part, d_x_ref, interpret, rank_major=True)
    by_lane = ByLane(*_by_lane(plan, lane_J, num_pages), jnp.reshape(jnp.int32(first_page), 1))
    h_JMQR, d_h_JMQR = _by_member(_of_items(h_JQR, plan), len(members)), _of_items(d_h_JQR, plan)[:, None]
    _add_products((x_WD, d_h_JMQR, [d_a_ref]), (d_y_WE, h_JMQR, d_b_refs), plan, by_lane, part, interpret)
    return jax.freeze(d_x_ref), (jax.freeze(d_a_ref), tuple(map(jax.freeze, d_b_refs)))


def _by_lane(plan: LoraPlan, lane_J: Int[Array, "J"], num_pages: int) -> tuple[Int[Array, "J"], Int[Array, "Z1"]]:
    """A stable counting sort: it makes two small fusions, and the layers of a step share them."""
    lane_J = jnp.where(plan.real_J(), jnp.minimum(lane_J, num_pages), num_pages)
    index_J = jnp.arange(lane_J.shape[0], dtype=jnp.int32)
    earlier_JJ = (lane_J[:, None] == lane_J[None]) & (index_J[:, None] < index_J[None])
    place_J = jnp.sum((lane_J[:, None] < lane_J[None]) | earlier_JJ, axis=0, dtype=jnp.int32)
    item_J = jnp.sum(jnp.where(place_J[None] == index_J[:, None], index_J[None], 0), axis=1, dtype=jnp.int32)
    lane_Z1 = jnp.arange(num_pages + 1, dtype=jnp.int32)
    return item_J, jnp.sum(lane_J[None] < lane_Z1[:, None], axis=1, dtype=jnp.int32)


def _of_items(h_JQR: Float[Array, "J Q R"], plan: LoraPlan) -> Float[Array, "J Q R"]:
    """Zeros in the rows that are not the item's."""
    row_Q = jnp.arange(h_JQR.shape[1], dtype=jnp.int32)[None]
    mine_JQ = (row_Q >= plan.first_J[:, None]) & (row_Q < plan.stop_J[:, None])
    return jnp.where(mine_JQ[..., None], h_JQR, jnp.zeros_like(h_JQR))


def _by_member(h_JQR: Float[Array, "J Q 64"], members: int) -> Float[Array, "J M Q 64"]:
    """Each member's columns, and zeros."""
    columns = (h_JQR[:, :, i * PAGE_RANK : (i + 1) * PAGE_RANK] for i in range(members))
    return jnp.pad(jnp.stack(list(columns), axis=1), ((0, 0), (0, 0), (0, 0), (0, RANK_COLUMNS - PAGE_RANK)))


def _add_products(
    a_side: tuple[Float[Array, "W D"], Float[Array, "J 1 Q 64"], Sequence[Any]],
    b_side: tuple[Float[Array, "W E"], Float[Array, "J M Q 64"], Sequence[Any]],
    plan: LoraPlan,
    by_lane: ByLane,
    part: Part,
    interpret: bool,
) -> None:
    """Adds x^T dh of every item to its lane page of A, and dy^T h to those of B, in place. One kernel does both: either
    alone has work for half of the cores.

    Args:
      a_side: x, dh, and the lanes [Y, R, D].
      b_side: dy, each member's h, and its lanes [Y, D', 16]; the members' D' side by side are E.
    """
    Q, dtype = part.block_rows, a_side[0].dtype
    a_tiles = Tiles([ref.shape[2] for ref in a_side[2]], WIDTH)
    b_tiles = Tiles([ref.shape[1] for ref in b_side[2]], WIDTH)

    def lora_add_products(x_ref, d_h_ref, d_y_ref, h_ref, *refs, x_sm, h_sm, sum_sm, sum_full, full):
        block_ref, from_ref, to_ref, item_ref, first_ref, page_ref, a_lane, *b_lanes = refs
        lane = lax.axis_index("lane")
        begin, end, page = first_ref[lane], first_ref[lane + 1], page_ref[0] + lane

        def add(tile: jax.Array, tiles: Tiles, x_ref: Any, h_ref: Any, lanes: Sequence[Any], rank_major: bool) -> None:
            member = tiles.member_of(tile)
            filled = mosaic.columns(RANK_COLUMNS, lanes[0].shape[1 if rank_major else 2], page)

            def each_place(do: Callable[[Any], None]) -> None:
                tiles.each(tile, lambda member, at: do(lanes[member].at[in_pool(rank_major, page, at, filled)]))

            def fetch(place):
                slot, item = lax.rem(place - begin, STAGES), item_ref[place]
                x = x_ref.at[rows_of(part, block_ref[item]), pl.ds(tile * WIDTH, WIDTH)]
                plgpu.copy_gmem_to_smem(x, x_sm.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(h_ref.at[item, member], h_sm.at[slot], full.at[slot])

            def add_item(place, total):
                slot, item = lax.rem(place - begin, STAGES), item_ref[place]
                plgpu.barrier_wait(full.at[slot])
                x, h = x_sm.at[slot], h_sm.at[slot]
                whole = (from_ref[item] == 0) & (to_ref[item] == Q)
                pl.when(jnp.logical_not(whole))(lambda: _keep_rows(x, from_ref[item], to_ref[item]))
                total += mosaic.matmul(h.T, x) if rank_major else mosaic.matmul(x.T, h)
                pl.when(place + STAGES < end)(lambda: fetch(place + STAGES))
                return total

            each_place(lambda place: plgpu.copy_gmem_to_smem(place, sum_sm, sum_full))
            for ahead in range(STAGES):
                pl.when(begin + ahead < end)(lambda ahead=ahead: fetch(begin + ahead))
            plgpu.barrier_wait(sum_full)
            start = plgpu.load(sum_sm, layout=plgpu.Layout.WGMMA, optimized=False)
            sum_sm[...] = lax.fori_loop(begin, end, add_item, start)
            plgpu.commit_smem()
            each_place(lambda place: plgpu.copy_smem_to_gmem(sum_sm, place))
            plgpu.wait_smem_to_gmem(0)

        tile, of_a = lax.axis_index("tile"), lax.axis_index("tile") < a_tiles.count

        @pl.when((end > begin) & of_a)
        def _():
            add(tile, a_tiles, x_ref, d_h_ref, [a_lane], rank_major=True)

        @pl.when((end > begin) & jnp.logical_not(of_a))
        def _():
            add(tile - a_tiles.count, b_tiles, d_y_ref, h_ref, b_lanes, rank_major=False)

    mosaic.kernel(
        lora_add_products,
        scratch={
            "x_sm": mosaic.operand(STAGES, Q, WIDTH, dtype=dtype),
            "h_sm": mosaic.operand(STAGES, Q, RANK_COLUMNS, dtype=dtype),
            "sum_sm": plgpu.SMEM((RANK_COLUMNS, WIDTH), jnp.float32),  # of B its transpose, which is as wide
            "sum_full": plgpu.Barrier(),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        },
        grid={"tile": a_tiles.count + b_tiles.count, "lane": by_lane.first_Z1.shape[0] - 1},
        threads=1,
        interpret=interpret,
    )(*a_side[:2], *b_side[:2], plan.block_J, plan.first_J, plan.stop_J, *by_lane, *a_side[2], *b_side[2])


def _keep_rows(x_sm: Any, first: jax.Array, stop: jax.Array) -> None:
    """Sets the other rows to zero: what they hold must not reach the sums, not even as 0 * NaN."""
    x = plgpu.load(x_sm, layout=plgpu.Layout.WGMMA, optimized=False)
    row = index(0, x.shape)
    x_sm[...] = jnp.where((row >= first) & (row < stop), x, jnp.zeros_like(x))
    plgpu.commit_smem()
