"""Backward of the gradient rows, with dK and dV accumulated over a paged pool.

A window's queries reach keys of its own rows and of every earlier row of the sequence. Both kinds of contribution are
added to the accumulators; because windows run right to left, after its own turn a row's sum is final, is read out as
the cotangent of that row's key and value, and is set back to zero. A page of the accumulators that nobody owns is
therefore always zero.

Shapes: W gradient rows, H query heads, K kv heads, C head dim, P pages, A accumulator pages, G tokens per page,
B sequences, M pages per sequence.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, choose, mosaic_pair
from pallas_kernels.numerics import after, never
from pallas_kernels.ragged_paged_attention import reference, xla_backward
from pallas_kernels.ragged_paged_attention.kernel_limits import refuse
from pallas_kernels.ragged_paged_attention.layout import Accumulators, AttentionLayout

BACKWARD_IMPLEMENTATIONS = (
    *mosaic_pair("pallas_kernels.ragged_paged_attention.mosaic_backward", refuse),
    Implementation("xla", xla_backward.ragged_paged_attention_backward),
    Implementation("reference", reference.ragged_paged_attention_backward),
)


def ragged_paged_attention_backward(
    d_out_WHC: Float[Array, "W H C"],
    q_WHC: Float[Array, "W H C"],
    out_WHC: Float[Array, "W H C"],
    lse_WH: Float[Array, "W H"],
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    layout: AttentionLayout,
    accumulators: Accumulators,
    acc_table_BM: Int[Array, "B M"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "W H C"], Accumulators]:
    """Returns dQ and the accumulators with this window's dK and dV added.

    Args:
      d_out_WHC: cotangent of the output; anything finite in padding rows.
      out_WHC, lse_WH: what the forward returned for these rows.
      layout: of the gradient rows alone; all of them in blocks (chunk_rows == W).
      accumulators: pools like K and V, in float32 or wider.
      acc_table_BM: the accumulator page of each of a sequence's pages; an entry of A or more is dropped. No page is in
        it twice, but for dropped ones and past a sequence's length.
      implementation: a name of BACKWARD_IMPLEMENTATIONS, or None for the best that runs here.
    """
    chosen = choose(
        "ragged_paged_attention_backward",
        BACKWARD_IMPLEMENTATIONS,
        implementation,
        q_THC=q_WHC,
        k_PKGC=k_PKGC,
        layout=layout,
        accumulators=accumulators,
    )
    arrays = d_out_WHC, q_WHC, out_WHC, lse_WH, k_PKGC, v_PKGC, layout, accumulators, acc_table_BM
    return chosen.function(*arrays, scale=scale, softcap=softcap, window=window)


def read_rows(
    accumulators: Accumulators, page_W: Int[Array, "W"], offset_W: Int[Array, "W"]
) -> tuple[Float[Array, "W K C"], Float[Array, "W K C"]]:
    """The rows' finished sums. A page of A or more reads zero."""
    d_k, d_v = (pool.at[page_W, :, offset_W].get(mode="fill", fill_value=0) for pool in accumulators)
    return d_k, d_v


def clear_rows(
    accumulators: Accumulators, page_W: Int[Array, "W"], offset_W: Int[Array, "W"], made_of_them: list[jax.Array]
) -> Accumulators:
    """Sets the rows that were read back to zero.

    A pool that may be written before it was read is copied. So what is written depends on what was read, or, where a
    fusion would read it once more for that, on ``made_of_them``.
    """
    read = read_rows(accumulators, page_W, offset_W)

    def on_cpu(read, _):
        return tuple(jnp.where(never(rows_WKC), -0.0, jnp.zeros_like(rows_WKC)) for rows_WKC in read)

    def elsewhere(read, made_of_them):
        zero = after(jnp.zeros((), read[0].dtype), made_of_them)
        return tuple(jnp.broadcast_to(zero, rows_WKC.shape) for rows_WKC in read)

    zeros = lax.platform_dependent(read, made_of_them, cpu=on_cpu, default=elsewhere)
    d_k, d_v = (
        pool.at[page_W, :, offset_W].set(zeros_WKC, mode="drop")
        for pool, zeros_WKC in zip(accumulators, zeros, strict=True)
    )
    return d_k, d_v
