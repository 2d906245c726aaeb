"""The definition: every work item by itself, added in order.

Shapes: T rows, D in, E out, P pages, R ranks per page, N blocks, Q rows per block, J work items.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.lora_matmul.plan import LoraPlan
from pallas_kernels.numerics import wide_dtype


def lora_matmul(
    x_TD: Float[Array, "T D"], a_PRD: Float[Array, "P R D"], members: tuple[Float[Array, "P E R"], ...], plan: LoraPlan
) -> Float[Array, "T E"]:
    rank = a_PRD.shape[1] // len(members)
    accumulate = wide_dtype(x_TD.dtype)
    y_TE = jnp.zeros((x_TD.shape[0], sum(b.shape[1] for b in members)), accumulate)
    for item in range(plan.block_J.shape[0]):
        row_Q, page = plan.row_NQ[plan.block_J[item]], plan.page_J[item]
        x_QD = x_TD.at[row_Q].get(mode="fill", fill_value=0)
        h_QR = jnp.einsum("qd,rd->qr", x_QD, a_PRD[page], preferred_element_type=accumulate).astype(x_TD.dtype)
        y_QE = jnp.concatenate(
            [
                jnp.einsum("qr,er->qe", h_QR[:, i * rank : (i + 1) * rank], b[page], preferred_element_type=accumulate)
                for i, b in enumerate(members)
            ],
            axis=1,
        )
        real = item < plan.num_items
        y_TE = y_TE.at[row_Q].add(jnp.where(real, y_QE, 0), mode="drop")
    return y_TE.astype(x_TD.dtype)
