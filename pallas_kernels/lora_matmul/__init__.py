"""Multi-adapter LoRA: each row through its own adapter's A and B."""

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.lora_matmul import reference, xla
from pallas_kernels.lora_matmul.backward import lora_matmul_backward
from pallas_kernels.lora_matmul.plan import PAGE_RANK, LoraPlan

__all__ = ["IMPLEMENTATIONS", "PAGE_RANK", "LoraPlan", "lora_matmul", "lora_matmul_backward"]

IMPLEMENTATIONS = (Implementation("xla", xla.lora_matmul), Implementation("reference", reference.lora_matmul))


def lora_matmul(
    x_TD: Float[Array, "T D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    *,
    implementation: str | None = None,
) -> Float[Array, "T E"]:
    """Returns, for each row, sum over its adapter's pages of (x A^T) B^T; zeros for rows without an adapter.

    Several linear layers that share an input (q, k, v; gate, up) go together: A holds their ranks one after another
    (R = len(members) * 16) and ``members`` holds one B each; the outputs are concatenated, E = sum of the members'.

    Args:
      x_TD: rows.
      a_PRD: the bank's A pages, PEFT's layout [rank, in].
      members: the bank's B pages, PEFT's layout [out, rank], scaling alpha / r folded in.
      plan: which rows, which pages.
      implementation: a name of IMPLEMENTATIONS, or None for the best that runs here.
    """
    return choose("lora_matmul", IMPLEMENTATIONS, implementation).function(x_TD, a_PRD, members, plan)
