"""The definition: the ops that it is made of, one after another.

Shapes: T rows, D in, F columns of gate and of up, E = 2F of both, P pages, R ranks per page of both, S blocks of the
pool, Q rows per block, N row blocks.
"""

from jaxtyping import Array, Float, Int

from pallas_kernels.block_write import block_write
from pallas_kernels.gating import gated
from pallas_kernels.lora_matmul import LoraPlan, lora_linear, lora_matmul


def lora_gated(
    gate_up_TE: Float[Array, "T E"],
    x_TD: Float[Array, "T D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P F R"], ...],
    plan: LoraPlan,
    pool_SQE: Float[Array, "S Q E"] | None,
    block_N: Int[Array, "N"] | None,
    *,
    activation: str,
    of: str | None,
) -> tuple[Float[Array, "T F"], Float[Array, "S Q E"] | None]:
    """Args: of: their implementation; None: the best of each."""
    y_TE = lora_matmul(x_TD, a_PRD, members, plan, add_to=gate_up_TE, implementation=of)
    if pool_SQE is not None and block_N is not None:
        (pool_SQE,) = block_write((pool_SQE,), (y_TE,), block_N, implementation=of)
    return gated(y_TE, activation), pool_SQE


def lora_gated_linear(
    x_TD: Float[Array, "T D"],
    w_ED: Float[Array, "E D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P F R"], ...],
    plan: LoraPlan,
    *,
    activation: str,
    of: str | None,
) -> Float[Array, "T F"]:
    return gated(lora_linear(x_TD, w_ED, a_PRD, members, plan, implementation=of), activation)
