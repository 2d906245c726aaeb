"""Attention of packed rows over a paged K/V pool: decode rows, prefill chunks and finetune windows in one call."""

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, choose, mosaic_pair
from pallas_kernels.ragged_paged_attention import reference, xla
from pallas_kernels.ragged_paged_attention.backward import (
    BACKWARD_IMPLEMENTATIONS,
    clear_rows,
    ragged_paged_attention_backward,
    read_rows,
)
from pallas_kernels.ragged_paged_attention.kernel_limits import refuse
from pallas_kernels.ragged_paged_attention.layout import AttentionLayout

__all__ = [
    "BACKWARD_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "AttentionLayout",
    "clear_rows",
    "ragged_paged_attention",
    "ragged_paged_attention_backward",
    "read_rows",
]

IMPLEMENTATIONS = (
    *mosaic_pair("pallas_kernels.ragged_paged_attention.mosaic_forward", refuse),
    Implementation("xla", xla.ragged_paged_attention),
    Implementation("reference", reference.ragged_paged_attention),
)


def ragged_paged_attention(
    q_THC: Float[Array, "T H C"],
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    layout: AttentionLayout,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T H C"], Float[Array, "T H"]]:
    """Returns softmax(scale * q k^T) v over each row's own visible keys, and the log-sum-exp of its scores.

    Args:
      q_THC: queries, rotated. H is a multiple of the pool's K heads (grouped-query attention).
      k_PKGC, v_PKGC: one layer's pools, this step's own keys and values already written.
      layout: which rows belong to which sequence.
      scale: multiplies the scores; ``softcap`` c then maps s to c * tanh(s / c) (Gemma 2).
      window: a row at position p sees positions > p - window only.
      implementation: a name of IMPLEMENTATIONS, or None for the best that runs here.

    Padding rows are exact zeros with a log-sum-exp of -inf. Sums are kept in float32 or wider.
    """
    settings: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
    chosen = choose(
        "ragged_paged_attention", IMPLEMENTATIONS, implementation, q_THC=q_THC, k_PKGC=k_PKGC, layout=layout
    )
    return chosen.function(q_THC, k_PKGC, v_PKGC, layout, **settings)
