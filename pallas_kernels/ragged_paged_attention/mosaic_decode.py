"""Decode rows on Hopper: split-KV flash decoding (FlashDecoding, Dao et al. 2023) over paged keys.

A row's query heads of one kv head are a few columns, so keys and head dim take the 64 rows of wgmma: the scores are
S^T = K q^T and the output is O^T = V^T P^T. One warpgroup copies pages, one computes; each thread block walks its share
of all rows' key blocks (``work.DecodeWork``) and writes partial sums, which a second kernel adds up.

Shapes: R decode rows, K kv heads, g query heads of one kv head, N columns (g up to a multiple of 8), C head dim,
P pages, G tokens per page, B sequences, M pages per sequence, S keys per block, I partial sums, X workers.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.mosaic import COLUMN, LN2, LOG2E, MASKED, along, full, index, plgpu
from pallas_kernels.ragged_paged_attention.mosaic_pages import KernelShape, Pages, num_copies
from pallas_kernels.ragged_paged_attention.work import DecodeWork

COMPUTE, COPY = 0, 1  # the block's two warpgroups


@dataclass(frozen=True, kw_only=True)
class DecodeShape(KernelShape):
    """What the kernel is compiled for."""

    @property
    def columns(self) -> int:
        return -(-self.group // 8) * 8

    @property
    def width(self) -> int:
        """Head dim as wgmma wants it; copies fill the rest with zeros."""
        return -(-self.head_dim // 64) * 64

    @property
    def block_keys(self) -> int:
        return 128 if self.width <= 64 else 64

    @property
    def workers_per_core(self) -> int:
        """A block of keys is a chain of waits and small products: several chains at once hide each other's."""
        return 3 if self.width <= 128 else 1

    @property
    def stages(self) -> int:
        return 2 if self.width <= 128 else 3


def decode_attention(
    q_RHC: Float[Array, "R H C"],
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    page_table_BM: Int[Array, "B M"],
    work: DecodeWork,
    shape: DecodeShape,
    *,
    out_THC: Float[Array, "T H C"] | None = None,
    first_row: int = 0,
    interpret: bool,
) -> tuple[Float[Array, "T H C"], Float[Array, "R H"]]:
    """Returns each decode row's attention, in place in ``out_THC`` from ``first_row`` on, and its scores' log-sum-exp.

    Without ``out_THC`` there are no other rows.
    """
    R, H, C = q_RHC.shape
    K, N = shape.num_kv_heads, shape.columns
    workers = work.lead_X.shape[0]
    partials = R * K + workers
    copies = num_copies(shape.page_size, shape.block_keys)
    lists = (work.sequence_R, work.position_R, work.low_R, work.row_R, work.stop_R1)
    out_ICN, top_total_I2N = mosaic.kernel(
        _partial_sums(shape, R),
        out=(
            jax.ShapeDtypeStruct((partials, shape.width, N), jnp.float32),
            jax.ShapeDtypeStruct((partials, 2, N), jnp.float32),
        ),
        scratch={
            "q_sm": mosaic.operand(shape.stages, N, shape.width, dtype=shape.dtype, filled=C),
            "k_sm": mosaic.operand(shape.stages, shape.block_keys, shape.width, dtype=shape.dtype, filled=C),
            "v_sm": mosaic.operand(shape.stages, shape.block_keys, shape.width, dtype=shape.dtype, filled=C),
            "weight_sm": plgpu.SMEM((N, shape.block_keys), shape.dtype),
            "k_full": plgpu.Barrier(num_arrivals=copies + 1, num_barriers=shape.stages),
            "v_full": plgpu.Barrier(num_arrivals=copies, num_barriers=shape.stages),
            "free": plgpu.Barrier(num_barriers=shape.stages),
        },
        grid={"worker": workers},
        threads=2,
        interpret=interpret,
    )(q_RHC.reshape(R, K, shape.group, C), k_PKGC, v_PKGC, page_table_BM, *lists, work.lead_X, work.share_1)
    written = () if out_THC is None else (jax.new_ref(out_THC),)
    made = () if written else (jax.ShapeDtypeStruct((R, H, C), q_RHC.dtype),)
    *outs, lse_RKN = mosaic.kernel(
        _combine(shape, first_row),
        out=(*made, jax.ShapeDtypeStruct((R, K, N), jnp.float32)),
        scratch={"out_sm": plgpu.SMEM((N, shape.width), q_RHC.dtype)},
        grid={"place": R, "head": K},
        threads=1,
        interpret=interpret,
    )(out_ICN, top_total_I2N, work.row_R, work.stop_R1, work.share_1, *written)
    (out_THC,) = map(jax.freeze, written) if written else outs
    return out_THC, lse_RKN[:, :, : shape.group].reshape(R, H)


def _partial_sums(shape: DecodeShape, num_rows: int):
    K, S, N, width, stages = shape.num_kv_heads, shape.block_keys, shape.columns, shape.width, shape.stages
    row_scale = shape.scale * LOG2E

    def attention_decode_parts(
        q_ref, k_ref, v_ref, table_ref, sequence_ref, position_ref, low_ref, row_ref, stop_ref, lead_ref, share_ref,
        out_ref, top_total_ref, *, q_sm, k_sm, v_sm, weight_sm, k_full, v_full, free,
    ):  # fmt: skip
        worker, share = lax.axis_index("worker"), share_ref[0]
        begin = worker * share
        end = jnp.minimum(begin + share, stop_ref[num_rows] * K)

        def start():
            """Place, head and block where this worker's share begins."""
            place = lead_ref[worker]
            before, blocks = begin - stop_ref[place] * K, jnp.maximum(num_blocks(place), 1)
            return place, lax.div(before, blocks), lax.rem(before, blocks)

        def num_blocks(place):
            return stop_ref[place + 1] - stop_ref[place]

        def past(place, head):
            """The next head, or the next place's first."""
            last = head + 1 == K
            return jnp.where(last, place + 1, place), jnp.where(last, 0, head + 1)

        @pl.when(lax.axis_index("warpgroup") == COPY)
        def _():
            heads, columns = (mosaic.columns(size, q_ref.shape[i], worker) for size, i in ((N, 2), (width, 3)))

            def copy_block(step, at):
                place, head, block = at
                slot = lax.rem(step - begin, stages)

                @pl.when(step - begin >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(q_ref.at[row_ref[place], head, heads, columns], q_sm.at[slot], k_full.at[slot])
                pages = Pages(table_ref, sequence_ref[place], head, position_ref[place], shape.page_size)
                first_key = (lax.div(low_ref[place], S) + block) * S
                pages.fetch(k_ref, k_sm.at[slot], k_full.at[slot], first_key, columns)
                pages.fetch(v_ref, v_sm.at[slot], v_full.at[slot], first_key, columns)
                last_block = block + 1 == num_blocks(place)
                next_place, next_head = past(place, head)
                return (
                    jnp.where(last_block, next_place, place),
                    jnp.where(last_block, next_head, head),
                    jnp.where(last_block, 0, block + 1),
                )

            lax.fori_loop(begin, end, copy_block, start())

        @pl.when(lax.axis_index("warpgroup") == COMPUTE)
        def _():
            def attend(at):
                """One head of one row, or what of it is in this worker's share."""
                step, place, head, block = at
                blocks = jnp.minimum(num_blocks(place) - block, end - step)
                position, low = position_ref[place], low_ref[place]
                first_key = (lax.div(low, S) + block) * S

                def add_block(i, carry):
                    top_N, total_SN, out_CN = carry
                    slot = lax.rem(step + i - begin, stages)
                    plgpu.barrier_wait(k_full.at[slot])
                    score_SN = mosaic.matmul(k_sm.at[slot], q_sm.at[slot].T)
                    if shape.softcap is None:
                        score_SN *= row_scale
                    else:
                        score_SN = jnp.tanh(score_SN * (shape.scale / shape.softcap)) * (shape.softcap * LOG2E)
                    key_SN = index(0, (S, N)) + (first_key + i * S)
                    score_SN = jnp.where((key_SN <= position) & (key_SN >= low), score_SN, MASKED)
                    new_top_N = jnp.maximum(top_N, score_SN.max(axis=0))
                    decay_N = jnp.exp2(top_N - new_top_N)
                    weight_SN = jnp.exp2(score_SN - along(1, new_top_N, (S, N)))
                    mosaic.put(weight_sm.T, weight_SN.astype(shape.dtype))
                    total_SN = total_SN * along(1, decay_N, (S, N)) + weight_SN
                    plgpu.barrier_wait(v_full.at[slot])
                    seen = position + 1 - (first_key + i * S)

                    @pl.when(seen < S)
                    def _():  # what lies past the row's own keys may be NaN, and 0 x NaN is NaN
                        mosaic.keep_rows(v_sm.at[slot], seen)

                    plgpu.commit_smem()
                    out_CN = out_CN * along(1, decay_N, (width, N)) + mosaic.matmul(v_sm.at[slot].T, weight_sm.T)

                    @pl.when(step + i + stages < end)
                    def _():
                        plgpu.barrier_arrive(free.at[slot])

                    return new_top_N, total_SN, out_CN

                init = full((N,), MASKED, COLUMN), full((S, N), 0), full((width, N), 0)
                top_N, total_SN, out_CN = lax.fori_loop(0, blocks, add_block, init)
                partial = place * K + head + worker
                mosaic.put(out_ref.at[partial], out_CN)
                mosaic.put(top_total_ref.at[partial, 0], top_N)
                mosaic.put(top_total_ref.at[partial, 1], total_SN.sum(axis=0))
                return step + blocks, *past(place, head), jnp.int32(0)

            lax.while_loop(lambda at: at[0] < end, attend, (begin, *start()))

    return attention_decode_parts


def _combine(shape: DecodeShape, first_row: int):
    K, N, width = shape.num_kv_heads, shape.columns, shape.width

    def attention_decode_sum(out_part_ref, top_total_ref, row_ref, stop_ref, share_ref, out_ref, lse_ref, *, out_sm):
        place, head, share = lax.axis_index("place"), lax.axis_index("head"), share_ref[0]
        blocks = stop_ref[place + 1] - stop_ref[place]
        begin = stop_ref[place] * K + head * blocks
        first_worker, last_worker = lax.div(begin, share), lax.div(begin + blocks - 1, share)

        def add_partial(worker, carry):
            top_N, total_N, out_CN = carry
            partial = place * K + head + worker
            new_N, part_total_N = (
                plgpu.load(top_total_ref.at[partial, i], layout=COLUMN, optimized=False) for i in (0, 1)
            )
            new_top_N = jnp.maximum(top_N, new_N)
            decay_N, weight_N = jnp.exp2(top_N - new_top_N), jnp.exp2(new_N - new_top_N)
            total_N = total_N * decay_N + part_total_N * weight_N
            part_CN = plgpu.load(out_part_ref.at[partial], layout=plgpu.Layout.WGMMA, optimized=False)
            return (
                new_top_N,
                total_N,
                out_CN * along(1, decay_N, (width, N)) + part_CN * along(1, weight_N, (width, N)),
            )

        init = full((N,), MASKED, COLUMN), full((N,), 0, COLUMN), full((width, N), 0)
        stop = jnp.where(blocks > 0, last_worker + 1, first_worker)
        top_N, total_N, out_CN = lax.fori_loop(first_worker, stop, add_partial, init)
        nothing_N = total_N == 0
        out_CN /= along(1, jnp.where(nothing_N, 1.0, total_N), (width, N))
        mosaic.put(out_sm.T, out_CN.astype(out_sm.dtype))
        lse_N = (top_N + jnp.log2(jnp.where(nothing_N, 1.0, total_N))) * LN2
        row = row_ref[place]
        mosaic.put(lse_ref.at[row, head], jnp.where(nothing_N, -jnp.inf, lse_N))
        plgpu.commit_smem()
        heads, columns = pl.ds(head * shape.group, shape.group), mosaic.columns(width, out_ref.shape[2], row)
        plgpu.copy_smem_to_gmem(out_sm.at[pl.ds(0, shape.group)], out_ref.at[first_row + row, heads, columns])
        plgpu.wait_smem_to_gmem(0)

    return attention_decode_sum
