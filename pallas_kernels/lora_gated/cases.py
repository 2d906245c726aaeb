"""Named shapes of the op, shared by tests and benchmarks.

Shapes: T rows, F columns of gate and of up, E = 2F of both, S blocks of the pool, Q rows per block, N row blocks.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.lora_matmul.cases import BASE, LoraCase


@dataclass(frozen=True, kw_only=True)
class LoraGatedCase:
    """One call: all row blocks but the last ``unplaced`` have a place, that of the last ``padding`` of them is
    nowhere."""

    adapters: LoraCase
    activation: str = "silu"
    unplaced: int = 0
    padding: int = 0
    num_blocks: int = 5

    def __str__(self) -> str:
        return self.adapters.name

    def make(self, dtype: DTypeLike = np.float32, seed: int = 0) -> tuple[Any, ...]:
        """Random arguments of the op; padding has places >= S."""
        rng, case = np.random.default_rng(seed + 1), self.adapters

        def random(*shape: int) -> Any:
            return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

        E, placed = sum(case.dims_out), case.chunk_rows // case.row_block - self.unplaced
        pool = random(self.num_blocks, case.row_block, E)
        places = [*rng.permutation(self.num_blocks)[: placed - self.padding], *[self.num_blocks] * self.padding]
        x, a, members, plan = case.make(dtype, seed)
        return random(case.num_rows, E), x, a, members, plan, pool, jnp.asarray(places, jnp.int32)


_pair = partial(LoraCase, dim_in=64, dims_out=(64, 64), row_block=64)
CASES = (
    LoraGatedCase(adapters=_pair(name="one-item", ranks=(16,), chunks=((0, 64),))),
    LoraGatedCase(
        adapters=_pair(
            name="mixed",
            ranks=(40, 16, 8),
            chunks=((0, 30), (2, 20), (1, 50), (BASE, 92)),
            packed=True,
            singles=(*[1] * 3, BASE, *[2] * 4),
            dims_out=(128, 128),
        ),
        unplaced=1,
        padding=1,
    ),
    LoraGatedCase(
        adapters=_pair(name="gelu-tanh", ranks=(16, 24), chunks=((1, 50),), singles=(0,) * 72),
        activation="gelu_tanh",
    ),
    LoraGatedCase(adapters=_pair(name="nowhere", ranks=(16,), chunks=((0, 20),)), padding=1),
)

# with the base product: single rows
LINEAR_CASES = (
    LoraGatedCase(
        adapters=LoraCase(
            name="linear-8", ranks=(16, 40), singles=(0, 0, 1, *[BASE] * 5), dim_in=448, dims_out=(64, 64)
        )
    ),
    LoraGatedCase(
        adapters=LoraCase(
            name="linear-24", ranks=(24, 16), singles=(1,) * 3 + (BASE,) * 20 + (0,), dim_in=192, dims_out=(128, 128)
        ),
        activation="gelu_tanh",
    ),
)

_llama_8b = partial(LoraCase, ranks=(16, 16), dim_in=4096, dims_out=(14336, 14336), row_block=64)
BENCH_CASES = (  # no single rows: a loop would copy gate and up for them
    LoraGatedCase(adapters=_llama_8b(name="stash-2048", chunks=((0, 1024), (1, 1024))), num_blocks=40),
)
LINEAR_BENCH_CASES = (LoraGatedCase(adapters=_llama_8b(name="linear-64", singles=(BASE,) * 64)),)
