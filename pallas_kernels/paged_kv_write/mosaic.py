"""The write on Hopper: rows come to shared memory together, and each leaves for its page by itself, in bulk copies.

Compiled ahead of time for an H200 with jax 0.11.2, 8 heads of 128 and pages of 64: 14 registers, no spills. A step of
two layers that writes and then attends has no copy of a pool, and as much temporary memory as with XLA's scatter.

Shapes: T rows, P pages, K kv heads, G tokens per page, C head dim.
"""

import math
from functools import partial

import jax
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.mosaic import plgpu

BLOCK_ROWS = 8  # at most
BLOCK_BYTES = 64 << 10  # of the keys, as of the values: at most, where there is more than one row


@partial(jax.jit, static_argnames=("interpret",))  # traced once for all layers
def run(
    k_PKGC: Float[Array, "P K G C"],
    v_PKGC: Float[Array, "P K G C"],
    k_TKC: Float[Array, "T K C"],
    v_TKC: Float[Array, "T K C"],
    page_T: Int[Array, "T"],
    offset_T: Int[Array, "T"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "P K G C"], Float[Array, "P K G C"]]:
    (T, K, C), P, dtype = k_TKC.shape, k_PKGC.shape[0], k_PKGC.dtype
    rows = math.gcd(T, BLOCK_ROWS)
    while rows > 1 and rows * K * C * dtype.itemsize > BLOCK_BYTES:
        rows //= 2

    def paged_kv_write(k_ref, v_ref, page_ref, offset_ref, k_pool_ref, v_pool_ref, *, k_sm, v_sm, full_bar):
        first = lax.axis_index("block") * rows
        for new_ref, new_sm in ((k_ref, k_sm), (v_ref, v_sm)):
            plgpu.copy_gmem_to_smem(new_ref.at[pl.ds(first, rows)], new_sm, full_bar)
        plgpu.barrier_wait(full_bar)
        for i in range(rows):
            page, offset = page_ref[first + i], offset_ref[first + i]

            @pl.when(page < P)
            def _(i=i, page=page, offset=offset):
                for new_sm, pool_ref in ((k_sm, k_pool_ref), (v_sm, v_pool_ref)):
                    plgpu.copy_smem_to_gmem(new_sm.at[i], pool_ref.at[page, :, offset])

        plgpu.wait_smem_to_gmem(0)

    pools = jax.new_ref(k_PKGC), jax.new_ref(v_PKGC)
    mosaic.kernel(
        paged_kv_write,
        scratch={
            "k_sm": plgpu.SMEM((rows, K, C), dtype),
            "v_sm": plgpu.SMEM((rows, K, C), dtype),
            "full_bar": plgpu.Barrier(num_arrivals=2),
        },
        grid={"block": T // rows},
        threads=1,
        interpret=interpret,
    )(k_TKC, v_TKC, page_T, offset_T, *pools)
    return jax.freeze(pools[0]), jax.freeze(pools[1])
