"""A gated feed-forward layer's first half: the adapters of gate and up, their gate, and what a later backward needs of
both; for few rows with the base product."""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, choose, mosaic_pair
from pallas_kernels.gating import SLOPES
from pallas_kernels.lora_gated import reference
from pallas_kernels.lora_matmul import LoraPlan, facts_of, refuse, refuse_linear

__all__ = ["IMPLEMENTATIONS", "LINEAR_IMPLEMENTATIONS", "lora_gated", "lora_gated_linear"]


def _refuse_activation(activation: str) -> str | None:
    return None if activation in SLOPES else f"the kernel computes {' and '.join(SLOPES)}, not {activation}"


def _refuse(*, activation: str, pool: jax.Array | None, **facts: Any) -> str | None:
    if pool is not None and pool.dtype != facts["dtype"]:
        return f"the kernel writes blocks as they are, the pool is {pool.dtype} and x {facts['dtype']}"
    if not facts["plan"].chunk_rows:
        return "the kernel is for row blocks, there are none"
    return _refuse_activation(activation) or refuse(**facts)


def _refuse_linear(*, activation: str, **facts: Any) -> str | None:
    return _refuse_activation(activation) or refuse_linear(**facts)


IMPLEMENTATIONS = (
    *mosaic_pair("pallas_kernels.lora_gated.mosaic", _refuse),
    Implementation("separate", partial(reference.lora_gated, of=None)),
    Implementation("xla", partial(reference.lora_gated, of="xla")),
    Implementation("reference", partial(reference.lora_gated, of="reference")),
)
LINEAR_IMPLEMENTATIONS = (
    *mosaic_pair("pallas_kernels.lora_gated.mosaic_linear", _refuse_linear),
    Implementation("separate", partial(reference.lora_gated_linear, of=None)),
    Implementation("xla", partial(reference.lora_gated_linear, of="xla")),
    Implementation("reference", partial(reference.lora_gated_linear, of="reference")),
)


def lora_gated(
    gate_up_TE: Float[Array, "T E"],
    x_TD: Float[Array, "T D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P F R"], ...],
    plan: LoraPlan,
    pool_SQE: Float[Array, "S Q E"] | None = None,
    block_N: Int[Array, "N"] | None = None,
    *,
    activation: str,
    implementation: str | None = None,
) -> tuple[Float[Array, "T F"], Float[Array, "S Q E"] | None]:
    """Returns act(gate) * up, where gate and up are the halves of y = gate_up + the adapters' product, and the pool
    with y's row blocks at their places; in place where it is donated.

    Args:
      gate_up_TE: of x's dtype; what the base gives, gate and up side by side.
      x_TD, a_PRD, members, plan: see ``lora_matmul``; the two members are gate and up.
      pool_SQE: S blocks of the plan's Q rows; None: y is not kept.
      block_N: see ``block_write``; the first N row blocks are written.
      activation: a name of ``gating.ACTIVATIONS``.
      implementation: a name of IMPLEMENTATIONS, or None for the best that runs here.
    """
    assert block_N is None or block_N.shape[0] * plan.row_block <= plan.chunk_rows, f"{block_N=} {plan.chunk_rows=}"
    facts = facts_of(x_TD, members, plan)
    chosen = choose("lora_gated", IMPLEMENTATIONS, implementation, **facts, activation=activation, pool=pool_SQE)
    return chosen.function(gate_up_TE, x_TD, a_PRD, members, plan, pool_SQE, block_N, activation=activation)


def lora_gated_linear(
    x_TD: Float[Array, "T D"],
    w_ED: Float[Array, "E D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P F R"], ...],
    plan: LoraPlan,
    *,
    activation: str,
    implementation: str | None = None,
) -> Float[Array, "T F"]:
    """Returns act(gate) * up, where gate and up are the halves of ``lora_linear``'s result.

    Args:
      w_ED: the base weights of gate and of up, [out, in]; the others as in ``lora_gated``.
      implementation: a name of LINEAR_IMPLEMENTATIONS, or None for the best that runs here.
    """
    facts = facts_of(x_TD, members, plan)
    chosen = choose("lora_gated_linear", LINEAR_IMPLEMENTATIONS, implementation, **facts, activation=activation)
    return chosen.function(x_TD, w_ED, a_PRD, members, plan, activation=activation)
