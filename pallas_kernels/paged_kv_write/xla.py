"""Runs anywhere: one scatter for the keys and one for the values.

Shapes: T rows, P pages, K kv heads, G tokens per page, C head dim.
"""

from jaxtyping import Array, Float, Int


def paged_kv_write(
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    k_TKC: Float[Array, "T K C"],
    v_TKC: Float[Array, "T K C"],
    page_T: Int[Array, "T"],
    offset_T: Int[Array, "T"],
) -> tuple[Float[Array, "P K G C"], Float[Array, "P K G C"]]:
    def write(pool, new):
        return pool.at[page_T, :, offset_T].set(new, mode="drop", unique_indices=True)

    return write(k_PKGC, k_TKC), write(v_PKGC, v_TKC)
