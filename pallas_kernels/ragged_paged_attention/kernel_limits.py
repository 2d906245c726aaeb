"""What the Mosaic kernels cannot do, said before anything of theirs is imported."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.layout import Accumulators, AttentionLayout

DTYPES = ("bfloat16", "float16")  # what wgmma transposes
HEAD_DIMS = (64, 96, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
MAX_GROUP = 8  # query heads of one kv head
ROW_BLOCK = 64  # rows of a wgmma


def refuse(
    *, q_THC: jax.Array, k_PKGC: jax.Array, layout: AttentionLayout, accumulators: Accumulators | None = None, **_: Any
) -> str | None:
    """Why the kernels can't run this call, or None."""
    (H, C), (K, G) = q_THC.shape[1:], k_PKGC.shape[1:3]
    if q_THC.dtype.name not in DTYPES:
        return f"dtype {q_THC.dtype} is not one of {DTYPES}"
    if k_PKGC.dtype != q_THC.dtype:
        return f"K/V pool dtype {k_PKGC.dtype} is not that of the queries, {q_THC.dtype}"
    if C not in HEAD_DIMS:
        return f"head_dim {C} is not one of {HEAD_DIMS}"
    if G not in PAGE_SIZES:
        return f"page size {G} is not one of {PAGE_SIZES}"
    if H // K > MAX_GROUP:
        return f"{H // K} query heads per kv head, the limit is {MAX_GROUP}"
    if layout.chunk_rows and layout.row_block != ROW_BLOCK:
        return f"row_block {layout.row_block} is not {ROW_BLOCK}"
    if accumulators is not None and accumulators[0].dtype != jnp.float32:
        return f"accumulator dtype {accumulators[0].dtype} is not float32"
    return None
