"""Writes new keys and values to their places in a paged K/V pool."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import COPY_BYTES, COPY_SIDE, Implementation, choose, mosaic_pair
from pallas_kernels.paged_kv_write import reference, xla

__all__ = ["IMPLEMENTATIONS", "paged_kv_write"]

ROW_BYTES = 64 << 10  # of a row's keys, as of its values: both stand in shared memory


def _refuse(*, k_TKC: jax.Array, k_PKGC: jax.Array, **_: Any) -> str | None:
    T, K, C = k_TKC.shape
    if not T:
        return "there are no rows"
    if C * k_PKGC.dtype.itemsize % COPY_BYTES:
        return f"the kernel copies multiples of {COPY_BYTES} bytes, a head has {C * k_PKGC.dtype.itemsize}"
    if max(K, C) > COPY_SIDE:
        return f"the kernel takes at most {COPY_SIDE} kv heads and head dims, there are {K} and {C}"
    if K * C * k_PKGC.dtype.itemsize > ROW_BYTES:
        return f"the kernel takes rows of at most {ROW_BYTES} bytes, these have {K * C * k_PKGC.dtype.itemsize}"
    return None


IMPLEMENTATIONS = (
    *mosaic_pair("pallas_kernels.paged_kv_write.mosaic", _refuse),
    Implementation("xla", xla.paged_kv_write),
    Implementation("reference", reference.paged_kv_write),
)


def paged_kv_write(
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    k_TKC: Float[Array, "T K C"],
    v_TKC: Float[Array, "T K C"],
    page_T: Int[Array, "T"],
    offset_T: Int[Array, "T"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "P K G C"], Float[Array, "P K G C"]]:
    """Returns the pools with each row's key and value at its page and offset; in place where the pools are donated.

    Args:
      k_PKGC, v_PKGC: one layer's pools.
      k_TKC, v_TKC: rows, rounded to the pools' dtype.
      page_T: 0 <= page; a row whose page is P or more is written nowhere.
      offset_T: place in the page, 0 <= offset < G. No two rows that are written have the same place.
      implementation: a name of IMPLEMENTATIONS, or None for the best that runs here.
    """
    chosen = choose("paged_kv_write", IMPLEMENTATIONS, implementation, k_TKC=k_TKC, k_PKGC=k_PKGC)
    k_TKC, v_TKC = k_TKC.astype(k_PKGC.dtype), v_TKC.astype(v_PKGC.dtype)
    return chosen.function(k_PKGC, v_PKGC, k_TKC, v_TKC, page_T, offset_T)
