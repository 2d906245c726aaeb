"""Who computes what in the kernels: lists made once per step from the layout, and used by every layer.

Shapes: R decode rows, X workers or tiles, N row blocks, Q rows per block, g query heads of one kv head, G tokens per
page, M pages per sequence.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels import dispatch
from pallas_kernels.ragged_paged_attention.layout import AttentionLayout

INTERPRETED_CORES = 3  # enough for rows and tiles to be shared out, few enough to be quick
MIN_SHARE = 2  # key blocks below which a worker is not worth its partial sums


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["row_R", "position_R", "low_R", "sequence_R", "stop_R1", "lead_X", "share_1"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class DecodeWork:
    """The key blocks of all decode rows in a line, cut into equal shares.

    The line goes row by row, head by head, block by block; rows that see nothing come last. Worker x takes the steps
    [x * share, (x + 1) * share), so that every worker reads equally much whatever the lengths are.
    """

    row_R: Int[Array, "R"]  # the decode row at each place of the line
    position_R: Int[Array, "R"]  # this and the next two go by place as well
    low_R: Int[Array, "R"]  # first position that the row sees
    sequence_R: Int[Array, "R"]
    stop_R1: Int[Array, "R1"]  # blocks of one head before each place, and in all
    lead_X: Int[Array, "X"]  # the place where each worker starts
    share_1: Int[Array, "1"]  # steps per worker


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["unit_X2", "first_X", "stop_X", "last_X", "sequence_X", "start_N", "rows_N"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class BlockWork:
    """Pairs of units that go over the same keys together; a unit is one query head of one row block.

    Units of a sequence's blocks follow each other, block by block, and are paired in that order: with an odd group the
    last head of a block meets the first of the next. The tile with the most key blocks comes first.
    """

    unit_X2: Int[Array, "X 2"]  # block * group + head in its group; twice the same: alone; -1: no tile
    first_X: Int[Array, "X"]  # key blocks [first, stop) have keys that a row of the tile sees
    stop_X: Int[Array, "X"]
    last_X: Int[Array, "X"]  # position of the tile's last row
    sequence_X: Int[Array, "X"]
    start_N: Int[Array, "N"]  # position of each block's first row
    rows_N: Int[Array, "N"]  # its rows that are not padding


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["key_X", "first_X", "stop_X", "last_X", "sequence_X", "start_N", "rows_N", "tiles_1"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class KeyWork:
    """Tiles of the keys that row blocks see, those that most blocks see first: workers get equal shares of them."""

    key_X: Int[Array, "X"]  # first key of each tile
    first_X: Int[Array, "X"]  # row blocks [first, stop) see keys of the tile
    stop_X: Int[Array, "X"]
    last_X: Int[Array, "X"]  # position of the sequence's last row
    sequence_X: Int[Array, "X"]
    start_N: Int[Array, "N"]
    rows_N: Int[Array, "N"]
    tiles_1: Int[Array, "1"]  # how many there are


def num_cores(interpret: bool) -> int:
    """Multiprocessors that the work is shared out over."""
    return INTERPRETED_CORES if interpret else dispatch.num_cores()


def decode_work(
    layout: AttentionLayout, *, window: int | None, num_kv_heads: int, block_keys: int, workers: int
) -> DecodeWork:
    position_R, sequence_R = (x[layout.chunk_rows :] for x in (layout.position_T, layout.sequence_T))
    low_R = _low(position_R, window)
    blocks_R = jnp.where(position_R < 0, 0, position_R // block_keys + 1 - low_R // block_keys)
    row_R = jnp.argsort(blocks_R == 0, stable=True).astype(jnp.int32)
    stop_R1 = jnp.pad(jnp.cumsum(blocks_R[row_R], dtype=jnp.int32), (1, 0))
    share = jnp.maximum(-(-stop_R1[-1] * num_kv_heads // workers), MIN_SHARE)
    start_X = jnp.arange(workers, dtype=jnp.int32) * share
    lead_X = _owner(stop_R1[1:] * num_kv_heads, start_X)
    return DecodeWork(
        row_R=row_R,
        position_R=position_R[row_R],
        low_R=low_R[row_R],
        sequence_R=_in_table(sequence_R, layout)[row_R],
        stop_R1=stop_R1,
        lead_X=lead_X,
        share_1=share[None],
    )


def block_work(layout: AttentionLayout, *, window: int | None, group: int, block_keys: int) -> BlockWork:
    blocks = _blocks(layout, window)
    block_N = jnp.arange(len(blocks.run_N), dtype=jnp.int32)
    opened_N = (block_N - blocks.run_N + 1) * group + 1 >> 1  # tiles of the run up to and with this block
    added_N = opened_N - jnp.where(blocks.leads_N, 0, jnp.roll(opened_N, 1))
    tile_N = jnp.cumsum(added_N, dtype=jnp.int32) - opened_N  # first tile of the run
    unit_Ng = block_N[:, None] * group + jnp.arange(group, dtype=jnp.int32)[None]
    in_run_Ng = unit_Ng - blocks.run_N[:, None] * group
    unit_X2 = jnp.full((len(block_N) * (group + 1) // 2, 2), -1, jnp.int32)
    unit_X2 = unit_X2.at[tile_N[:, None] + (in_run_Ng >> 1), in_run_Ng & 1].set(unit_Ng)
    unit_X2 = unit_X2.at[:, 1].set(jnp.where(unit_X2[:, 1] < 0, unit_X2[:, 0], unit_X2[:, 1]))
    block_X2 = jnp.maximum(unit_X2, 0) // group
    last_X = blocks.last_N[block_X2].max(axis=1)
    first_X = blocks.low_N[block_X2].min(axis=1) // block_keys
    stop_X = jnp.where(last_X < 0, first_X, last_X // block_keys + 1)
    order_X = jnp.argsort(jnp.where(unit_X2[:, 0] < 0, 1, first_X - stop_X), stable=True)
    return BlockWork(
        unit_X2=unit_X2[order_X],
        first_X=first_X[order_X],
        stop_X=stop_X[order_X],
        last_X=last_X[order_X],
        sequence_X=blocks.sequence_N[block_X2[:, 0]][order_X],
        start_N=blocks.start_N,
        rows_N=blocks.rows_N,
    )


def key_work(layout: AttentionLayout, *, window: int | None, page_size: int, tile_keys: int) -> KeyWork:
    blocks = _blocks(layout, window)
    N, max_keys = len(blocks.run_N), layout.page_table_BM.shape[1] * page_size
    in_run_NN = blocks.run_N[:, None] == blocks.run_N[None]
    last_N = jnp.where(in_run_NN, blocks.last_N[None], -1).max(axis=1)  # of the run
    first_tile_N = blocks.low_N // tile_keys
    tiles_N = jnp.where(blocks.leads_N & (blocks.rows_N > 0), last_N // tile_keys + 1 - first_tile_N, 0)
    stop_N = jnp.cumsum(tiles_N, dtype=jnp.int32)
    tile_X = jnp.arange(N * -(-max_keys // tile_keys), dtype=jnp.int32)
    run_X = _owner(stop_N, tile_X)
    key_X = (first_tile_N[run_X] + tile_X - (stop_N - tiles_N)[run_X]) * tile_keys
    sees_XN = (blocks.run_N[None] == run_X[:, None]) & (blocks.rows_N > 0)[None]
    sees_XN &= (blocks.last_N[None] >= key_X[:, None]) & (blocks.low_N[None] < key_X[:, None] + tile_keys)
    first_X = jnp.argmax(sees_XN, axis=1).astype(jnp.int32)
    count_X = jnp.sum(sees_XN, axis=1, dtype=jnp.int32)
    order_X = jnp.argsort(-count_X, stable=True)  # none past the last tile sees any block
    return KeyWork(
        key_X=key_X[order_X],
        first_X=first_X[order_X],
        stop_X=(first_X + count_X)[order_X],
        last_X=last_N[run_X][order_X],
        sequence_X=blocks.sequence_N[run_X][order_X],
        start_N=blocks.start_N,
        rows_N=blocks.rows_N,
        tiles_1=stop_N[-1:],
    )


class _Blocks(NamedTuple):
    start_N: Int[Array, "N"]  # position of the first row
    rows_N: Int[Array, "N"]  # rows that are not padding
    last_N: Int[Array, "N"]  # position of the last row; -1: a block of padding
    low_N: Int[Array, "N"]  # first position that a row sees
    sequence_N: Int[Array, "N"]
    run_N: Int[Array, "N"]  # the first of the blocks side by side that are of the same sequence
    leads_N: Bool[Array, "N"]  # this is it


def _blocks(layout: AttentionLayout, window: int | None) -> _Blocks:
    position_NQ, sequence_NQ = (
        x[: layout.chunk_rows].reshape(-1, layout.row_block) for x in (layout.position_T, layout.sequence_T)
    )
    rows_N = jnp.sum(position_NQ >= 0, axis=1, dtype=jnp.int32)
    start_N = jnp.where(rows_N > 0, position_NQ[:, 0], 0)
    sequence_N = _in_table(sequence_NQ[:, 0], layout)
    own_N = jnp.where(rows_N > 0, sequence_N, -1)  # padding does not belong to its neighbours
    block_N = jnp.arange(len(own_N), dtype=jnp.int32)
    leads_N = (own_N != jnp.roll(own_N, 1)) | (block_N == 0)
    run_N = lax.cummax(jnp.where(leads_N, block_N, 0))
    return _Blocks(start_N, rows_N, start_N + rows_N - 1, _low(start_N, window), sequence_N, run_N, leads_N)


def _low(position: jax.Array, window: int | None) -> jax.Array:
    return jnp.zeros_like(position) if window is None else jnp.maximum(position - (window - 1), 0)


def _in_table(sequence: jax.Array, layout: AttentionLayout) -> jax.Array:
    return jnp.clip(sequence, 0, layout.page_table_BM.shape[0] - 1)


def _owner(stop_N: Int[Array, "N"], x_X: Int[Array, "X"]) -> Int[Array, "X"]:
    """The range that each x falls into, where range n ends before ``stop_N[n]``; past them all: the last."""
    owner_X = jnp.searchsorted(stop_N, x_X, side="right", method="compare_all")
    return jnp.minimum(owner_X, len(stop_N) - 1).astype(jnp.int32)
