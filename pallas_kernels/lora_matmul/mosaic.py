"""The adapters' product on Hopper in two kernels: shrink, h = x A^T, and expand, y += h B^T, in place.

Row blocks have the 64 rows of wgmma. Single rows come eight to a block, and there the weights' own rows, ranks and
outputs, take wgmma's 64: h^T = A x^T and y^T += B h^T. Little work is spread over the whole device by cutting the long
sum of a shrink into splits, which are added up in order: for single rows by the expand itself, since there every kernel
counts, for row blocks between the two.

Weights are read by page and a row takes only what its own items add: a NaN adapter reaches no other row.

Shapes: T rows, D in, E out, P pages, R ranks per page (of all members together in A), J items, S splits.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.dispatch import num_cores
from pallas_kernels.lora_matmul.mosaic_sums import PartialSums
from pallas_kernels.lora_matmul.plan import PAGE_RANK, SINGLE_ROWS, LoraPlan, Part, num_blocks
from pallas_kernels.mosaic import WARPGROUP_ROWS, divisor, full, index, plgpu

MAX_SPLIT = 512  # columns of a shrink's split, where there are enough of them
# h is stored so wide, and a page of B fills so many columns of shared memory, the rest of them zeros: wgmma takes both
# operands in one swizzle, and in that of B's 16 ranks x would come in pieces of 32 bytes, at half of a copy's rate
RANK_COLUMNS = 64
SHRINK_A, SHRINK_B = (256, 2), (128, 3)  # most columns of a shrink's tile of row blocks, and tiles under way
WIDTH, STRIP = 128, 64  # columns of an expand's tile of row blocks, and of what of it is in registers at one time
SINGLES_WIDTH = 1024  # most columns of an expand's tile of single rows


def run(
    x_TD: Float[Array, "T D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    add_to: Float[Array, "T E"] | None = None,
    *,
    interpret: bool,
) -> Float[Array, "T E"]:
    T, E = x_TD.shape[0], sum(b.shape[1] for b in members)
    y_ref = jax.new_ref(jnp.zeros((T, E), x_TD.dtype) if add_to is None else add_to)
    first_N1 = plan.first_items(num_blocks(T, plan.chunk_rows, plan.row_block))
    for part in plan.parts(T):
        if part.block_rows == SINGLE_ROWS:
            h_JS = shrink_singles(x_TD, a_PRD, plan, first_N1, part, interpret)
            expand_singles(h_JS, members, plan, first_N1, part, interpret, y_ref=y_ref)
        else:
            h_JQR = shrink_blocks(x_TD, (a_PRD,), plan, first_N1, part, interpret, rank_major=True)
            expand_blocks(h_JQR, members, plan, first_N1, part, y_ref, interpret, rank_major=False)
    return jax.freeze(y_ref)


# single rows


class ShrinkSingles:
    """h^T of each item's block, in splits to be added up, as a part of a kernel that has x; rows past the page's ranks
    hold anything."""

    def __init__(self, x_TD, a_PRD, plan: LoraPlan, first_N1: Int[Array, "N1"], part: Part):
        R, D = a_PRD.shape[1:]
        self.ranks, self.part, self.width = R, part, divisor(D, MAX_SPLIT)
        self.splits = D // self.width
        self.inputs = a_PRD, plan.block_J, plan.page_J, first_N1
        shape = (plan.block_J.shape[0], self.splits, WARPGROUP_ROWS, SINGLE_ROWS)
        self.out = jax.ShapeDtypeStruct(shape, jnp.float32)
        self.scratch = {
            "block_sm": mosaic.operand(1, SINGLE_ROWS, self.width, dtype=x_TD.dtype),
            "a_sm": mosaic.operand(1, WARPGROUP_ROWS, self.width, dtype=x_TD.dtype),
            "a_full": plgpu.Barrier(num_arrivals=2),
        }

    def units(
        self, workers: int, x_ref, a_ref, block_ref, page_ref, first_ref, out_ref, *, block_sm, a_sm, a_full
    ) -> tuple[jax.Array, Callable[[Any], None], Callable[[Any], None]]:
        """This worker's share of them: their number, what starts the i-th one's copies, and what does the rest of it
        before the next one starts."""
        begin, end = first_ref[self.part.first_block], first_ref[self.part.first_block + self.part.num_blocks]
        worker = lax.axis_index("worker")

        def place(i):
            unit = worker + i * workers
            return begin + lax.div(unit, self.splits), lax.rem(unit, self.splits)

        def fetch(i):
            item, split = place(i)
            rows, page = rows_of(self.part, block_ref[item]), page_ref[item]
            columns = pl.ds(split * self.width, self.width)
            plgpu.copy_gmem_to_smem(x_ref.at[rows, columns], block_sm.at[0], a_full)
            plgpu.copy_gmem_to_smem(a_ref.at[page, :, columns], a_sm.at[0, pl.ds(0, self.ranks)], a_full)

        def write(i):
            only = mosaic.opaque(jnp.int32(0))
            plgpu.barrier_wait(a_full)
            mosaic.put(out_ref.at[place(i)], mosaic.matmul(a_sm.at[only], block_sm.at[only].T))

        return lax.div((end - begin) * self.splits - worker + workers - 1, workers), fetch, write


def shrink_singles(
    x_TD, a_PRD, plan: LoraPlan, first_N1: Int[Array, "N1"], part: Part, interpret: bool
) -> Float[Array, "J S 64 8"]:
    shrink = ShrinkSingles(x_TD, a_PRD, plan, first_N1, part)
    workers = _workers(math.prod(shrink.out.shape[:2]), per_core=3)

    def lora_shrink_singles(*refs, **scratch):
        count, fetch, write = shrink.units(workers, *refs, **scratch)

        def one(i, _):
            fetch(i)
            write(i)

        lax.fori_loop(0, count, one, None)

    return mosaic.kernel(
        lora_shrink_singles,
        out=shrink.out,
        scratch=shrink.scratch,
        grid={"worker": workers},
        threads=1,
        interpret=interpret,
    )(x_TD, *shrink.inputs)


def h_operand(dtype: DTypeLike) -> Any:
    """Shared memory of an item's h."""
    return mosaic.operand(SINGLE_ROWS, WARPGROUP_ROWS, dtype=dtype, filled=PAGE_RANK)


def load_h(splits_ref: Any, h_sm: Any) -> None:
    """Adds up a shrink's splits of an item, and rounds them: h, to shared memory."""
    h_RQ = full((WARPGROUP_ROWS, SINGLE_ROWS), 0)
    for s in range(splits_ref.shape[0]):  # no loop: they are all on their way at once
        h_RQ += plgpu.load(splits_ref.at[s], layout=plgpu.Layout.WGMMA, optimized=False)
    h_sm.T[...] = h_RQ.astype(h_sm.dtype)
    plgpu.commit_smem()


def expand_singles(
    h_JS,
    members,
    plan: LoraPlan,
    first_N1,
    part: Part,
    interpret: bool,
    *,
    y_ref: Any = None,
    sums: PartialSums | None = None,
) -> Any:
    """y += h B^T, in place; or returns y = sums + h B^T, of all rows: each member is written by itself, so that nothing
    is copied where y is taken apart."""
    dtype = members[0].dtype
    dims = [b.shape[1] for b in members]
    most = min(sum(dims) * part.num_blocks // num_cores(), SINGLES_WIDTH)
    tiles = Tiles(dims, most if sums is None else divisor(sums.tile_rows, most))
    width = tiles.width

    def lora_expand_singles(h_ref, *refs, y_sm, b_sm, h_sm, y_full, b_full):
        b_refs, refs = refs[: len(members)], refs[len(members) :]
        *sums_refs, page_ref, from_ref, to_ref, first_ref = refs[: len(added) + 4]
        y_refs = refs[len(added) + 4 :]
        block, tile = lax.axis_index("block"), lax.axis_index("tile")
        begin, end = first_ref[part.first_block + block], first_ref[part.first_block + block + 1]
        rows = rows_of(part, part.first_block + block)

        def fetch(item):
            slot = lax.rem(item - begin, 2)
            tiles.each(
                tile,
                lambda member, at: plgpu.copy_gmem_to_smem(
                    b_refs[member].at[page_ref[item], at], b_sm.at[slot], b_full.at[slot]
                ),
            )

        def add_items(sum_EQ):
            ranks = pl.ds(tiles.member_of(tile) * PAGE_RANK, PAGE_RANK)

            def add_item(item, sum_EQ):
                slot = lax.rem(item - begin, 2)
                pl.when(item + 1 < end)(lambda: fetch(item + 1))
                load_h(h_ref.at[item], h_sm)
                plgpu.barrier_wait(b_full.at[slot])
                part_EQ = mosaic.matmul(b_sm.at[slot], h_sm.at[:, ranks].T)
                row_EQ = index(1, (width, SINGLE_ROWS))
                return jnp.where((row_EQ >= from_ref[item]) & (row_EQ < to_ref[item]), sum_EQ + part_EQ, sum_EQ)

            return lax.fori_loop(begin, end, add_item, sum_EQ)

        def put(y_EQ):
            y_sm.T[...] = y_EQ.astype(dtype)
            plgpu.commit_smem()

        if sums is not None:
            pl.when(end > begin)(lambda: fetch(begin))
            put(add_items(sums.load(sums_refs[0], tile * width, width, rows)))
            tiles.each(tile, lambda member, at: plgpu.copy_smem_to_gmem(y_sm, y_refs[member].at[rows, at]))
            plgpu.wait_smem_to_gmem(0)
            return

        @pl.when(end > begin)
        def _():
            place = y_refs[0].at[rows, pl.ds(tile * width, width)]
            plgpu.copy_gmem_to_smem(place, y_sm, y_full)
            fetch(begin)
            sum_EQ = add_items(full((width, SINGLE_ROWS), 0))
            plgpu.barrier_wait(y_full)
            y_EQ = plgpu.load(y_sm.T, layout=plgpu.Layout.WGMMA, optimized=False)
            put(y_EQ.astype(jnp.float32) + sum_EQ)
            plgpu.copy_smem_to_gmem(y_sm, place)
            plgpu.wait_smem_to_gmem(0)

    written = () if y_ref is None else (y_ref,)
    added = () if sums is None else (sums.parts_IET,)
    made = () if written else [jax.ShapeDtypeStruct((part.num_blocks * SINGLE_ROWS, dim), dtype) for dim in dims]
    ys = mosaic.kernel(
        lora_expand_singles,
        out=made,
        scratch={
            "y_sm": mosaic.operand(SINGLE_ROWS, width, dtype=dtype),
            "b_sm": mosaic.operand(2, width, PAGE_RANK, dtype=dtype),
            "h_sm": h_operand(dtype),
            "y_full": plgpu.Barrier(),
            "b_full": plgpu.Barrier(num_barriers=2),
        },
        grid={"block": part.num_blocks, "tile": tiles.count},
        threads=1,
        interpret=interpret,
    )(h_JS, *members, *added, plan.page_J, plan.first_J, plan.stop_J, first_N1, *written)
    return jnp.concatenate(ys, axis=1) if made else None


# row blocks


def shrink_blocks(
    x_TD,
    weights: tuple[jax.Array, ...],
    plan: LoraPlan,
    first_N1: Int[Array, "N1"],
    part: Part,
    interpret: bool,
    *,
    rank_major: bool,
) -> Float[Array, "J 64 64"]:
    """The products of each item's rows with its page, rounded; zeros past the ranks.

    Args:
      weights: [P, R, D] if ``rank_major``; else [P, D', 16] of each member, and the members' D' side by side are D.
    """
    dims = [w.shape[2 if rank_major else 1] for w in weights]
    R = weights[0].shape[1 if rank_major else 2]
    J, Q, dtype = plan.block_J.shape[0], part.block_rows, x_TD.dtype
    most, stages = SHRINK_A if rank_major else SHRINK_B
    tiles, N = Tiles(dims, most), R if rank_major else RANK_COLUMNS
    width = tiles.width
    # splits of equal length, none over the border of two members, and about two for each core
    steps = divisor(math.gcd(*dims) // width, -(-tiles.count * part.num_blocks // (2 * num_cores())), unit=1)
    splits = tiles.count // steps
    workers = _workers(J * splits, per_core=2)

    def lora_shrink_blocks(x_ref, *refs, x_sm, w_sm, full_bar):
        *w_refs, block_ref, page_ref, first_ref, out_ref = refs
        begin = first_ref[part.first_block]

        def one(unit):
            item, split = begin + lax.div(unit, splits), lax.rem(unit, splits)
            rows, page, first = rows_of(part, block_ref[item]), page_ref[item], split * steps
            ranks = slice(None) if rank_major else mosaic.columns(N, R, page)

            def fetch(step):
                slot, tile = lax.rem(step, stages), first + step
                plgpu.copy_gmem_to_smem(x_ref.at[rows, pl.ds(tile * width, width)], x_sm.at[slot], full_bar.at[slot])
                tiles.each(
                    tile,
                    lambda member, columns: plgpu.copy_gmem_to_smem(
                        w_refs[member].at[in_pool(rank_major, page, columns, ranks)],
                        w_sm.at[slot],
                        full_bar.at[slot],
                    ),
                )

            def multiply(acc):
                for step in range(min(stages, steps)):
                    fetch(step)

                def add_tile(step, _):
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(full_bar.at[slot])
                    w = w_sm.at[slot]
                    plgpu.wgmma(acc, x_sm.at[slot], w.T if rank_major else w)
                    plgpu.wgmma_wait(0)
                    pl.when(step + stages < steps)(lambda: fetch(step + stages))

                lax.fori_loop(0, steps, add_tile, None)
                return acc[...]

            mosaic.put(out_ref.at[item, split], pl.run_scoped(multiply, plgpu.ACC((Q, N), jnp.float32)))

        _share((first_ref[part.first_block + part.num_blocks] - begin) * splits, workers, one)

    w_shape = (stages, R, width) if rank_major else (stages, width, N)
    parts_JSQR = mosaic.kernel(
        lora_shrink_blocks,
        out=jax.ShapeDtypeStruct((J, splits, Q, N), jnp.float32),
        scratch={
            "x_sm": mosaic.operand(stages, Q, width, dtype=dtype),
            "w_sm": mosaic.operand(*w_shape, dtype=dtype),
            "full_bar": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        },
        grid={"worker": workers},
        threads=1,
        interpret=interpret,
    )(x_TD, *weights, plan.block_J, plan.page_J, first_N1)
    ends = [end // steps for end in tiles.ends]
    h_JQR = jnp.concatenate(
        [parts_JSQR[:, s:e, :, :R].sum(axis=1) for s, e in zip([0, *ends], ends, strict=False)], axis=2
    ).astype(dtype)
    return jnp.pad(h_JQR, ((0, 0), (0, 0), (0, RANK_COLUMNS - h_JQR.shape[2])))


def expand_blocks(
    h_JQR: Float[Array, "J 64 64"],
    weights: tuple[jax.Array, ...],
    plan: LoraPlan,
    first_N1: Int[Array, "N1"],
    part: Part,
    y_ref: Any,
    interpret: bool,
    *,
    rank_major: bool,
) -> None:
    """y += h W, in place; ``weights`` are as in ``shrink_blocks``, and a member has its own 16 columns of h."""
    dims = [w.shape[2 if rank_major else 1] for w in weights]
    R = weights[0].shape[1 if rank_major else 2]
    Q, dtype = part.block_rows, h_JQR.dtype
    tiles = Tiles(dims, WIDTH)
    strips = tiles.width // STRIP

    def lora_expand_blocks(h_ref, *refs, y_sm, h_sm, w_sm, y_full, full_bar):
        *w_refs, page_ref, from_ref, to_ref, first_ref, y_ref = refs
        block, tile = lax.axis_index("block"), lax.axis_index("tile")
        begin, end = first_ref[part.first_block + block], first_ref[part.first_block + block + 1]

        def place(strip):
            first = pl.multiple_of(tile * tiles.width + strip * STRIP, STRIP)
            return y_ref.at[rows_of(part, part.first_block + block), pl.ds(first, STRIP)]

        def slot_of(strip, item):
            return lax.rem(strip * (end - begin) + item - begin, 2)

        def fetch(strip, item):
            slot = slot_of(strip, item)
            ranks = pl.ds(tiles.member_of(tile) * PAGE_RANK, R)
            plgpu.copy_gmem_to_smem(h_ref.at[item, :, ranks], h_sm.at[slot], full_bar.at[slot])

            def fetch_w(member, columns):
                mine = pl.ds(columns.start + strip * STRIP, STRIP)
                w = w_refs[member].at[in_pool(rank_major, page_ref[item], mine)]
                plgpu.copy_gmem_to_smem(w, w_sm.at[slot], full_bar.at[slot])

            tiles.each(tile, fetch_w)

        def add_item(strip, item, sum_QE):
            slot = slot_of(strip, item)
            pl.when(item + 1 < end)(lambda: fetch(strip, item + 1))
            if strip + 1 < strips:
                pl.when(item + 1 == end)(lambda: fetch(strip + 1, begin))
            plgpu.barrier_wait(full_bar.at[slot])
            w = w_sm.at[slot]
            part_QE = mosaic.matmul(h_sm.at[slot], w if rank_major else w.T)
            row_QE = index(0, (Q, STRIP))
            return jnp.where((row_QE >= from_ref[item]) & (row_QE < to_ref[item]), sum_QE + part_QE, sum_QE)

        @pl.when(end > begin)
        def _():
            for strip in range(strips):
                plgpu.copy_gmem_to_smem(place(strip), y_sm.at[strip], y_full.at[strip])
            fetch(0, begin)
            for strip in range(strips):
                sum_QE = lax.fori_loop(begin, end, partial(add_item, strip), full((Q, STRIP), 0))
                plgpu.barrier_wait(y_full.at[strip])
                y_QE = plgpu.load(y_sm.at[strip], layout=plgpu.Layout.WGMMA, optimized=False)
                y_sm.at[strip][...] = (y_QE.astype(jnp.float32) + sum_QE).astype(y_sm.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_sm.at[strip], place(strip))
            plgpu.wait_smem_to_gmem(0)

    w_shape = (2, R, STRIP) if rank_major else (2, STRIP, R)
    mosaic.kernel(
        lora_expand_blocks,
        scratch={
            "y_sm": mosaic.operand(strips, Q, STRIP, dtype=y_ref.dtype),
            "h_sm": mosaic.operand(2, Q, R, dtype=dtype),
            "w_sm": mosaic.operand(*w_shape, dtype=dtype, filled=R),
            "y_full": plgpu.Barrier(num_barriers=strips),
            "full_bar": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        },
        grid={"block": part.num_blocks, "tile": tiles.count},
        threads=1,
        interpret=interpret,
    )(h_JQR, *weights, plan.page_J, plan.first_J, plan.stop_J, first_N1, y_ref)


# what they share


class Tiles:
    """The columns of the members side by side, cut into tiles that each lie in one member."""

    def __init__(self, dims: Sequence[int], most: int):
        self.width = divisor(math.gcd(*dims), most)
        self.counts = [dim // self.width for dim in dims]
        self.ends = [sum(self.counts[: i + 1]) for i in range(len(dims))]

    @property
    def count(self) -> int:
        return self.ends[-1]

    def each(self, tile: jax.Array, do: Callable[[int, Any], None]) -> None:
        """``do(member, columns of the member)``, of the member that the tile lies in."""
        for member, (end, count) in enumerate(zip(self.ends, self.counts, strict=True)):
            columns = pl.ds((tile - (end - count)) * self.width, self.width)
            inside = (tile >= end - count) & (tile < end)
            pl.when(inside)(partial(do, member, columns)) if len(self.counts) > 1 else do(member, columns)

    def member_of(self, tile: jax.Array) -> jax.Array:
        return sum(((tile >= end).astype(jnp.int32) for end in self.ends[:-1]), jnp.int32(0))


def in_pool(rank_major: bool, page: jax.Array, columns: Any, ranks: Any = slice(None)) -> tuple:
    """Where a page's columns are in a pool of A or of B."""
    return (page, ranks, columns) if rank_major else (page, columns, ranks)


def rows_of(part: Part, block: jax.Array) -> Any:
    start = part.first_row + (block - part.first_block) * part.block_rows
    return pl.ds(pl.multiple_of(start, SINGLE_ROWS), part.block_rows)


def _share(units: jax.Array, workers: int, one: Callable[[jax.Array], None]) -> None:
    """Does ``one(unit)`` for this worker's share of the units."""
    worker = lax.axis_index("worker")
    mine = lax.div(units - worker + workers - 1, workers)
    lax.fori_loop(0, mine, lambda i, _: one(worker + i * workers), None)


def _workers(units: int, per_core: int) -> int:
    return min(units, per_core * num_cores())
