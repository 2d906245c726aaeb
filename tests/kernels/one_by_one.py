"""The multi-adapter matmul and its gradients, row by row and adapter by adapter in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora_matmul import PAGE_RANK
from pallas_kernels.lora_matmul.cases import BASE, LoraCase

PAGES_BEFORE = 2


def one_by_one(case: LoraCase, x_TD, a_PRD, members) -> np.ndarray:
    """y[t] = sum over the adapter's pages of B (A x[t]), member by member."""
    x_TD, a_PRD, *members = (np.asarray(array, np.float64) for array in (x_TD, a_PRD, *members))
    y_TE = np.zeros((case.num_rows, sum(case.dims_out)))
    for t, adapter in enumerate(case.adapter_rows()):
        for page in case.pages()[adapter] if adapter != BASE else ():
            h_R = a_PRD[page] @ x_TD[t]
            parts = [b_PER[page] @ h_R[m * PAGE_RANK : (m + 1) * PAGE_RANK] for m, b_PER in enumerate(members)]
            y_TE[t] += np.concatenate(parts)
    return y_TE


def one_by_one_backward(case: LoraCase, x_WD, a_PRD, members, d_y_WE, lanes) -> list[np.ndarray]:
    """dx, and the lanes with dA and each member's dB added: lane pages as ``case.lane_items`` gives them out."""
    x_WD, a_PRD, d_y_WE = (np.asarray(array, np.float64) for array in (x_WD, a_PRD, d_y_WE))
    members = [np.asarray(b_PER, np.float64) for b_PER in members]
    d_x_WD, d_a_YRD, *d_bs = np.zeros_like(x_WD), *(np.array(lane, np.float64) for lane in (lanes[0], *lanes[1]))
    lane_of = dict(zip(case.plan().page_J.tolist(), case.lane_items().tolist(), strict=True))
    ends = np.cumsum(case.dims_out)[:-1]
    for t, adapter in enumerate(case.adapter_rows()):
        for page in case.pages()[adapter] if adapter != BASE else ():
            d_ys = np.split(d_y_WE[t], ends)
            d_h_R = np.concatenate([d_y @ b_PER[page] for d_y, b_PER in zip(d_ys, members, strict=True)])
            d_x_WD[t] += d_h_R @ a_PRD[page]
            lane = lane_of[page]
            if lane < case.num_lane_pages:
                h_R = a_PRD[page] @ x_WD[t]
                d_a_YRD[lane] += np.outer(d_h_R, x_WD[t])
                for m, d_b_YER in enumerate(d_bs):
                    d_b_YER[lane] += np.outer(d_ys[m], h_R[m * PAGE_RANK : (m + 1) * PAGE_RANK])
    return [d_x_WD, d_a_YRD, *d_bs]


def among_others(lanes):
    """The lanes as one layer's of several: pages of other layers before and behind."""

    def widened(sums):
        before, behind = jnp.full((PAGES_BEFORE, *sums.shape[1:]), 7.0), jnp.full(sums.shape, -7.0)
        return jnp.concatenate([before, sums, behind])

    return jax.tree.map(widened, lanes)
