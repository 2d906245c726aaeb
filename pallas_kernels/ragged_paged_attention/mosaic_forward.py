"""Attention on Hopper: row blocks by one kernel, decode rows by another.

Compiled ahead of time for an H200 with jax 0.11.2, Llama-3.1-8B's 32 and 8 heads of 128, pages of 64 (16 to 128 are the
same); no kernel spills, at other head dims neither. 168 registers are the average over a block's three warpgroups:

    kernel                    registers  shared memory (bytes)
    block_attention                 168                166,912
    attention_decode_parts           72                 72,704
    attention_decode_sum             48                  2,048

Shapes: T rows, H query heads, K kv heads, C head dim, P pages, G tokens per page.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.ragged_paged_attention.layout import AttentionLayout
from pallas_kernels.ragged_paged_attention.mosaic_blocks import BlockShape, block_attention
from pallas_kernels.ragged_paged_attention.mosaic_decode import DecodeShape, decode_attention
from pallas_kernels.ragged_paged_attention.mosaic_pages import operand_sizes
from pallas_kernels.ragged_paged_attention.work import block_work, decode_work, num_cores

TILE_ROWS = 8  # rows that a copy takes at one time: an array that is copied from or to has a multiple of them


def run(
    q_THC: Float[Array, "T H C"],
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    layout: AttentionLayout,
    *,
    interpret: bool,
    **settings: Any,
) -> tuple[Float[Array, "T H C"], Float[Array, "T H"]]:
    """The op; ``settings`` are its scale, softcap and window."""
    return _attend(q_THC, k_PKGC, v_PKGC, layout, **settings, cores=num_cores(interpret), interpret=interpret)


@partial(jax.jit, static_argnames=("scale", "softcap", "window", "cores", "interpret"))  # traced once for all layers
def _attend(
    q_THC: Float[Array, "T H C"],
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    layout: AttentionLayout,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    cores: int,
    interpret: bool,
) -> tuple[Float[Array, "T H C"], Float[Array, "T H"]]:
    # the work lists are the same in every layer with this window: the compiler keeps one copy
    sizes, settings = operand_sizes(q_THC, k_PKGC), {"scale": scale, "softcap": softcap}
    pools, first_decode = (k_PKGC, v_PKGC, layout.page_table_BM), layout.chunk_rows
    out_THC, lse_TH = None, jnp.zeros(q_THC.shape[:2], jnp.float32)
    if first_decode:
        shape = BlockShape(**sizes, **settings, window=window)
        work = block_work(layout, window=window, group=shape.group, block_keys=shape.block_keys)
        rest = ((0, -q_THC.shape[0] % TILE_ROWS), (0, 0), (0, 0))
        out_THC, lse_TH = block_attention(jnp.pad(q_THC, rest), *pools, work, shape, interpret=interpret)
        lse_TH = lse_TH[: q_THC.shape[0]]
    if first_decode < q_THC.shape[0]:
        shape = DecodeShape(**sizes, **settings)
        work = decode_work(
            layout,
            window=window,
            num_kv_heads=shape.num_kv_heads,
            block_keys=shape.block_keys,
            workers=cores * shape.workers_per_core,
        )
        out_THC, lse_RH = decode_attention(
            q_THC[first_decode:], *pools, work, shape, out_THC=out_THC, first_row=first_decode, interpret=interpret
        )
        lse_TH = lse_TH.at[first_decode:].set(lse_RH)
    # cut last: XLA may hand a kernel a part of an array, and then loses what it writes there in place
    return q_THC if out_THC is None else out_THC[: q_THC.shape[0]], lse_TH  # no rows: no kernel
