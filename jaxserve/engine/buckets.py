"""The finite set of shapes a step may have; all compiled before the engine is ready.

A step has ``grad_rows`` rows whose backward runs in it, then ``chunk_rows`` rows for prefill chunks and finetune
windows that only go forward, then ``decode_rows`` rows of one token each. Buckets differ only in these three numbers.
On XLA's CPU backend the bits of a row do not depend on them (``pallas_kernels.numerics``), so a request's tokens and
log-probabilities are the same in any bucket; on a GPU the matmul library may choose another kernel for another number
of rows, and with it other last bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from jaxserve.engine.hashing import hashed_once
from jaxserve.finetune.windows import rounded

MIN_ROWS = 8
PADDING = 1.03  # a size is worth a program if the next larger one has more than so many times the rows
LEAST_BLOCKS = 1.5  # fewer row blocks forward take as long as so many: the weights are read


@hashed_once
@dataclass(frozen=True, order=True)
class Bucket:
    """One compiled shape: gradient rows, chunk rows, decode rows, in this order."""

    chunk_rows: int
    decode_rows: int
    grad_rows: int = 0
    stashed: bool = False  # gradient rows have been forward in an earlier step: what it left is in the stash

    def __str__(self) -> str:
        return f"step {self.grad_rows}+{self.chunk_rows}+{self.decode_rows}"

    @property
    def block_rows(self) -> int:
        """Rows that come in blocks of one sequence each."""
        return self.grad_rows + self.chunk_rows

    @property
    def rows(self) -> int:
        return self.block_rows + self.decode_rows

    @property
    def finetunes(self) -> bool:
        """There is something here that only finetuning needs."""
        return self.grad_rows > 0 or self.stashed

    @cached_property
    def first_row(self) -> int:
        """The first row that runs forward in this step."""
        return self.grad_rows if self.stashed else 0

    @cached_property
    def forward_block_rows(self) -> int:
        """Those of ``block_rows`` that do."""
        return self.block_rows - self.first_row


def ladder(low: int, high: int, times: int = 2) -> tuple[int, ...]:
    """low, 2 low, 4 low, ... and high at the end; or by other ``times``."""
    steps = []
    while low < high:
        steps.append(low)
        low *= times
    return (*steps, high)


def rungs(high: int) -> tuple[int, ...]:
    """A quarter, three eighths and all of ``high``, as far as they are whole numbers that differ: the first two for
    steps that objectives keep short, where a forward and a backward of about as many rows share the step; all for
    finetuning that has the device to itself."""
    return tuple(sorted({max(high * eighths // 8, 1) for eighths in (2, 3, 8)}))


@dataclass(frozen=True)
class Buckets:
    """Every bucket of an engine: decode-only steps, chunk steps, and steps with gradient rows beside no chunk rows or
    about as many (``beside``); each with as many sizes of decode rows as are worth programs of their own.

    There is no bucket for a long prompt's chunk beside gradient rows: both would fill a step alone.
    """

    chunk_rows: tuple[int, ...]
    decode_rows: tuple[int, ...]
    grad_rows: tuple[int, ...] = ()
    stashed: bool = False  # finetune rows run forward and backward in different steps
    row_block: int = 1

    @classmethod
    def make(
        cls, max_chunk_rows: int, max_num_seqs: int, row_block: int, max_grad_rows: int = 0, stashed: bool = False
    ) -> "Buckets":
        """Sizes up to the limits; chunk and gradient rows are multiples of ``row_block``."""
        most, most_grads, seqs = max(max_chunk_rows // row_block, 1), max_grad_rows // row_block, max(max_num_seqs, 2)
        grads = rungs(most_grads) if most_grads else ()
        chunks = ladder(min(max(64 // row_block, 1), most), most)
        beside = {rows for rows in grads if chunks[0] < rows < most}
        return cls(
            tuple(row_block * n for n in sorted({*chunks, *beside})),
            tuple(sorted({*ladder(min(MIN_ROWS, seqs), seqs), min(_most_beside(seqs), seqs)})),
            tuple(row_block * n for n in grads),
            stashed and most_grads > 0,
            row_block,
        )

    def _bucket(self, chunk_rows: int, decode_rows: int, grad_rows: int = 0) -> Bucket:
        return _one(chunk_rows, decode_rows, grad_rows, self.stashed and chunk_rows + grad_rows > 0)

    def decodes_beside(self, chunk_rows: int, grad_rows: int = 0) -> tuple[int, ...]:
        """Sizes of decode rows in steps with these other rows, smallest first: quarters of 3/8 of the most, and the
        most. Padding costs as much as any row, so one is left out only where the next larger one makes the step no more
        than ``PADDING`` times as long. None is a size too where finetuning alone fills the step, which then has none of
        their kernels."""
        if not chunk_rows and not grad_rows:
            return self.decode_rows
        most, least = self.decode_rows[-1], LEAST_BLOCKS * self.row_block

        def rows(decodes: int) -> float:
            forward = decodes + self._bucket(chunk_rows, decodes, grad_rows).forward_block_rows
            return max(forward, least) + grad_rows

        kept = [most]
        for quarters in (4, 3, 2, 1):
            size = rounded(_most_beside(most) * quarters // 4, MIN_ROWS)
            if size < kept[-1] and rows(kept[-1]) > PADDING * rows(size):
                kept.append(size)
        if chunk_rows and kept[-1] > self.decode_rows[0]:
            kept.append(self.decode_rows[0])  # for finetuning that has the device to itself, or nearly
        if len(kept) > 1 and self._fills_a_step(chunk_rows, grad_rows):
            kept.append(0)
        return tuple(reversed(kept))

    def _fills_a_step(self, chunk_rows: int, grad_rows: int) -> bool:
        most = self.grad_rows[-1] if self.grad_rows else 0
        return most >= MIN_ROWS and chunk_rows == self.beside(most) and grad_rows in (0, most)

    def beside(self, grad_rows: int) -> int:
        """Chunk rows of the buckets with so many gradient rows and any chunk rows at all."""
        return next((rows for rows in self.chunk_rows if rows >= grad_rows), self.chunk_rows[-1])

    @cached_property
    def _blocks(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """(gradient rows, chunk rows) of every bucket to the sizes of decode rows beside them."""
        blocks = [(0, rows) for rows in (0, *self.chunk_rows)]
        blocks += [(grad, rows) for grad in self.grad_rows for rows in (0, self.beside(grad))]
        return {(grad, chunk): self.decodes_beside(chunk, grad) for grad, chunk in blocks}

    def __iter__(self):
        for (grad, chunk), decodes in self._blocks.items():
            yield from (self._bucket(chunk, rows, grad) for rows in decodes)

    def holding(self, chunk_rows: int, decode_rows: int) -> Iterator[Bucket]:
        """The buckets, of each size of gradient and chunk rows one, that hold this many of the other kinds."""
        for (grad, chunk), decodes in self._blocks.items():
            if (grad or chunk) and chunk >= chunk_rows:
                yield self._bucket(chunk, _least(decodes, decode_rows), grad)

    def fit(self, chunk_rows: int, decode_rows: int, grad_rows: int = 0) -> Bucket:
        """The smallest bucket that holds this many rows of each kind."""
        chunk = grad = 0
        if grad_rows:
            fitting = [rows for rows in self.grad_rows if rows >= grad_rows and self.beside(rows) >= chunk_rows]
            assert fitting, f"{chunk_rows=} beside {grad_rows=} {self.grad_rows=}"
            grad = fitting[0]
            chunk = self.beside(grad) if chunk_rows else 0
        elif chunk_rows:
            chunk = _least(self.chunk_rows, chunk_rows)
        return self._bucket(chunk, _least(self._blocks[grad, chunk], decode_rows), grad)


def _most_beside(decode_rows: int) -> int:
    """3/8, in whole ``MIN_ROWS``."""
    return rounded(-(-decode_rows * 3 // 8), MIN_ROWS)


_one = lru_cache(maxsize=None)(Bucket)  # equal buckets are the same object: looking one up compares nothing


def _least(sizes: Sequence[int], wanted: int) -> int:
    for size in sizes:
        if size >= wanted:
            return size
    raise AssertionError(f"{wanted=} {sizes=}")
