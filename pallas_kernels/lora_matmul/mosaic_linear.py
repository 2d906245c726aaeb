"""A linear layer of few rows on Hopper in three kernels: the product's partial sums, shrink, and an expand that starts
from the partial sums, so that y is written, and rounded, once.

Shapes: T rows, D in, E out, P pages, R ranks per page (of all members together in A).
"""

from jaxtyping import Array, Float

from pallas_kernels.lora_matmul.mosaic import expand_singles, shrink_singles
from pallas_kernels.lora_matmul.mosaic_product import partial_sums
from pallas_kernels.lora_matmul.plan import LoraPlan


def run(
    x_TD: Float[Array, "T D"],
    w_ED: Float[Array, "E D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    *,
    interpret: bool,
) -> Float[Array, "T E"]:
    (part,) = plan.parts(x_TD.shape[0])
    first_N1 = plan.first_items(part.num_blocks)
    sums = partial_sums(x_TD, w_ED, [b.shape[1] for b in members], interpret)
    h_JS = shrink_singles(x_TD, a_PRD, plan, first_N1, part, interpret)
    return expand_singles(h_JS, members, plan, first_N1, part, interpret, sums=sums)
