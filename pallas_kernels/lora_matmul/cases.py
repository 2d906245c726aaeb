"""Named shapes of the op, shared by tests and benchmarks.

Shapes: T rows, D in, E out, P pages, Y lane pages, R ranks per page (of all members together in A), J work items.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.lora_matmul.plan import PAGE_RANK, SINGLE_ROWS, LoraPlan

BASE = -1  # rows without an adapter


@dataclass(frozen=True, kw_only=True)
class LoraCase:
    """One call. An adapter is named by its place in ``ranks``; BASE is none."""

    name: str
    ranks: tuple[int, ...] = ()  # of each adapter
    chunks: tuple[tuple[int, int], ...] = ()  # (adapter, rows), each padded to whole row blocks
    packed: bool = False  # chunks are padded together
    singles: tuple[int, ...] = ()  # the adapter of each single row
    dim_in: int = 32
    dims_out: tuple[int, ...] = (24,)  # of each member
    row_block: int = 8
    spare_items: int = 3

    def __str__(self) -> str:
        return self.name

    @property
    def chunk_rows(self) -> int:
        return len(self._chunk_adapters())

    @property
    def num_rows(self) -> int:
        return self.chunk_rows + len(self.singles)

    def pages(self) -> list[range]:
        """Bank pages of each adapter; page 0 is nobody's."""
        counts = [-(-rank // PAGE_RANK) for rank in self.ranks]
        starts = np.cumsum([1, *counts])
        return [range(start, start + count) for start, count in zip(starts, counts, strict=False)]

    def adapter_rows(self) -> np.ndarray:
        """The adapter of each row [T]; BASE for padding."""
        return np.array([*self._chunk_adapters(), *self.singles], int)

    def _chunk_adapters(self) -> list[int]:
        rows = []
        for i, (adapter, count) in enumerate(self.chunks):
            rows += [adapter] * count
            if not self.packed or i + 1 == len(self.chunks):
                rows += [BASE] * (-len(rows) % self.row_block)
        return rows

    def make(
        self, dtype: DTypeLike = np.float32, seed: int = 0
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], LoraPlan]:
        """Random (x [T, D], A [P, R, D], one B [P, E, 16] per member, plan). Ranks past an adapter's own are zero."""
        rng = np.random.default_rng(seed)
        pages = self.pages()
        num_pages = pages[-1].stop if pages else 1
        x_TD = rng.standard_normal((self.num_rows, self.dim_in))
        a_PRD = np.zeros((num_pages, PAGE_RANK * len(self.dims_out), self.dim_in))
        members = [np.zeros((num_pages, out, PAGE_RANK)) for out in self.dims_out]
        for rank, mine in zip(self.ranks, pages, strict=True):
            for k, page in enumerate(mine):
                width = min(PAGE_RANK, rank - k * PAGE_RANK)
                for m, b_PER in enumerate(members):
                    place = slice(m * PAGE_RANK, m * PAGE_RANK + width)
                    a_PRD[page, place] = rng.standard_normal((width, self.dim_in)) / self.dim_in**0.5
                    b_PER[page, :, :width] = rng.standard_normal((b_PER.shape[1], width)) / rank**0.5
        arrays = [jnp.asarray(array, dtype) for array in (x_TD, a_PRD, *members)]
        return arrays[0], arrays[1], tuple(arrays[2:]), self.plan()

    def make_linear(self, dtype: DTypeLike = np.float32) -> tuple:
        """Random arguments of an op with the base product: ``make``'s, and the weight after x."""
        x, *adapters = self.make(dtype)
        return x, self.make_base(x.dtype), *adapters

    def make_base(self, dtype: DTypeLike = np.float32, seed: int = 0) -> jax.Array:
        """The members' base weights [E, D]."""
        shape = (sum(self.dims_out), self.dim_in)
        return jnp.asarray(np.random.default_rng(seed + 300).standard_normal(shape) / self.dim_in**0.5, dtype)

    def plan(self) -> LoraPlan:
        """An item for each run of neighbours of one adapter in a block, and for each page of the adapter."""
        adapter_T, pages, items = self.adapter_rows(), self.pages(), []
        blocks = [(start, self.row_block) for start in range(0, self.chunk_rows, self.row_block)]
        blocks += [(start, SINGLE_ROWS) for start in range(self.chunk_rows, self.num_rows, SINGLE_ROWS)]
        for block, (start, size) in enumerate(blocks):
            mine = adapter_T[start : start + size]
            ends = [*np.flatnonzero(np.diff(mine)) + 1, len(mine)]
            for first, stop in zip([0, *ends], ends, strict=False):
                items += [(block, page, first, stop) for page in (pages[mine[first]] if mine[first] != BASE else ())]
        fields = np.array(items + [(0, 0, 0, 0)] * max(self.spare_items, 1 - len(items)), np.int32).T
        block_J, page_J, first_J, stop_J = map(jnp.asarray, fields)
        return LoraPlan(
            block_J=block_J,
            page_J=page_J,
            first_J=first_J,
            stop_J=stop_J,
            num_items=jnp.int32(len(items)),
            chunk_rows=self.chunk_rows,
            row_block=self.row_block,
        )

    # for the backward, which knows row blocks alone

    def lane_items(self) -> np.ndarray:
        """The lane page of each work item [J]: adapters that are trained have one per page, the last adapter none."""
        plan, pages = self.plan(), [page for mine in self.pages()[:-1] for page in mine]
        lane_of = {page: lane for lane, page in enumerate(reversed(pages))}
        return np.array([lane_of.get(int(page), self.num_lane_pages) for page in plan.page_J], np.int32)

    @property
    def num_lane_pages(self) -> int:
        return max(sum(map(len, self.pages()[:-1])), 1)

    def make_lanes(self, seed: int = 0) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Random sums so far: dA [Y, R, D] and one dB [Y, E, 16] per member, in float32."""
        rng, Y = np.random.default_rng(seed + 100), self.num_lane_pages
        shapes = [(PAGE_RANK * len(self.dims_out), self.dim_in), *((out, PAGE_RANK) for out in self.dims_out)]
        a, *members = (jnp.asarray(rng.standard_normal((Y, *shape)), jnp.float32) for shape in shapes)
        return a, tuple(members)

    def make_cotangent(self, dtype: DTypeLike = np.float32, seed: int = 0) -> jax.Array:
        """Random dy [T, E]."""
        shape = (self.num_rows, sum(self.dims_out))
        return jnp.asarray(np.random.default_rng(seed + 200).standard_normal(shape), dtype)


_MIXED_ROWS = (*[0] * 3, *[1] * 20, BASE, 2, *[3] * 8, *[4] * 9, *[BASE] * 6)
CASES = (
    LoraCase(name="one-adapter", ranks=(16,), singles=(0,) * 5),
    LoraCase(name="rank-1", ranks=(1,), singles=(BASE, 0, BASE)),
    LoraCase(name="no-adapter", singles=(BASE,) * 6),
    LoraCase(name="idle-adapter", ranks=(8, 8), singles=(*[1] * 9, BASE)),
    LoraCase(name="mixed-ranks", ranks=(4, 64, 17, 16, 33), singles=_MIXED_ROWS),
    LoraCase(name="blocks", ranks=(4, 40, 16), chunks=((1, 20), (BASE, 8), (0, 5), (2, 8))),
    LoraCase(
        name="blocks-and-singles", ranks=(4, 40, 16), chunks=((2, 3), (1, 16)), singles=(1, 1, BASE, *[0] * 9, 2, 1)
    ),
    LoraCase(name="members", ranks=(4, 40), chunks=((0, 9),), singles=(*[1] * 6, *[BASE] * 4), dims_out=(32, 8, 8)),
    LoraCase(name="one-row-each", ranks=(4, 8, 16, 24, 32, 48, 64, 40, 20), singles=tuple(range(9)), dims_out=(24, 24)),
    LoraCase(
        name="odd-sizes",
        ranks=(5, 70),
        chunks=((0, 7), (1, 1)),
        singles=(1,) * 3,
        dim_in=20,
        dims_out=(7, 3),
        row_block=5,
    ),
)
# what a kernel takes: columns in 64s, row blocks of 64 rows
_wide = partial(LoraCase, dim_in=128, dims_out=(128,), row_block=64)
KERNEL_CASES = (
    _wide(name="kernel-singles", ranks=(16, 8, 40), singles=(0, 0, 1, BASE, 2, 2, 2, BASE)),
    _wide(name="kernel-blocks", ranks=(16, 40), chunks=((1, 70), (BASE, 64), (0, 64))),
    LoraCase(
        name="kernel-members",
        ranks=(16, 24),
        chunks=((1, 64), (0, 9)),
        singles=(*[0] * 9, *[1] * 5, BASE, BASE),
        dim_in=192,
        dims_out=(256, 64, 64),
        row_block=64,
    ),
    _wide(name="kernel-pair", ranks=(48, 16), chunks=((0, 64),), singles=(1,) * 8, dims_out=(64, 64)),
    _wide(  # more items for a lane than are on their way at once, in an order of lanes that is not theirs
        name="kernel-long",
        ranks=(24, 16, 8),
        chunks=((0, 330), (1, 64), (2, 50), (0, 40)),
        dim_in=64,
        dims_out=(64,),
    ),
    _wide(name="kernel-nobody", ranks=(16,), chunks=((BASE, 64),), singles=(BASE,) * 8),
)
# what a kernel with the base product takes: single rows
LINEAR_CASES = (
    LoraCase(name="linear-8", ranks=(16, 40), singles=(0, 0, 1, *[BASE] * 5), dim_in=640, dims_out=(64,)),
    LoraCase(name="linear-24", ranks=(16, 40), singles=(1,) * 3 + (BASE,) * 21, dim_in=448, dims_out=(128, 64, 64)),
    LoraCase(name="linear-64", ranks=(8, 24), singles=(BASE,) * 59 + (0, 1, 1, 0, 1), dim_in=64, dims_out=(256,)),
    LoraCase(name="linear-128", ranks=(16,), singles=(BASE,) * 126 + (0,) * 2, dim_in=192, dims_out=(64, 64)),
)

_llama_8b = partial(LoraCase, dim_in=4096, dims_out=(4096, 1024, 1024), row_block=64)
BENCH_CASES = (
    _llama_8b(name="decode-64-of-1", ranks=(16,), singles=(0,) * 64),
    _llama_8b(name="decode-64-of-8", ranks=(16,) * 8, singles=tuple(np.repeat(range(8), 8))),
    _llama_8b(name="decode-64-of-32", ranks=(16,) * 32, singles=tuple(np.repeat(range(32), 2))),
    _llama_8b(name="decode-64-of-64", ranks=(16,) * 64, singles=tuple(range(64))),
    _llama_8b(name="decode-64-mixed-ranks", ranks=(8, 16, 32, 64) * 8, singles=tuple(np.repeat(range(32), 2))),
    _llama_8b(
        name="decode-64-gate-up",
        ranks=(16,) * 32,
        singles=tuple(np.repeat(range(32), 2)),
        dims_out=(14336, 14336),
    ),
    _llama_8b(
        name="decode-64-down",
        ranks=(16,) * 32,
        singles=tuple(np.repeat(range(32), 2)),
        dim_in=14336,
        dims_out=(4096,),
    ),
    _llama_8b(name="prefill-2048-of-4", ranks=(16,) * 4, chunks=tuple((a, 512) for a in range(4))),
    _llama_8b(name="finetune-1024", ranks=(16, 16), chunks=((0, 1024),)),
)
LINEAR_BENCH_CASES = (
    _llama_8b(name="qkv-64", singles=(BASE,) * 64),
    _llama_8b(name="o-64", singles=(BASE,) * 64, dims_out=(4096,)),
    _llama_8b(name="down-64", singles=(BASE,) * 64, dim_in=14336, dims_out=(4096,)),
)
