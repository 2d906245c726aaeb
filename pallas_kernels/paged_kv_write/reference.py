"""The definition: one row after another.

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
    for row, (page, offset) in enumerate(zip(page_T, offset_T, strict=True)):
        k_PKGC = k_PKGC.at[page, :, offset].set(k_TKC[row], mode="drop")
        v_PKGC = v_PKGC.at[page, :, offset].set(v_TKC[row], mode="drop")
    return k_PKGC, v_PKGC
