"""The definition: one row after another.

Shapes: T rows, P pages, K kv heads, G tokens per page, C head dim.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def paged_kv_write(
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    k_TKC: Float[Array, "T K C"],
    v_TKC: Float[Array, "T K C"],
    page_T: Int[Array, "T"],
    offset_T: Int[Array, "T"],
) -> tuple[Float[Array, "P K G C"], Float[Array, "P K G C"]]:
    for row in range(k_TKC.shape[0]):
        start = (page_T[row], 0, offset_T[row], 0)
        written_k, written_v = (
            lax.dynamic_update_slice(pool, new[row][None, :, None], start)
            for pool, new in ((k_PKGC, k_TKC), (v_PKGC, v_TKC))
        )
        real = page_T[row] < k_PKGC.shape[0]
        k_PKGC, v_PKGC = jnp.where(real, written_k, k_PKGC), jnp.where(real, written_v, v_PKGC)
    return k_PKGC, v_PKGC
