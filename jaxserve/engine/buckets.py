"""The finite set of shapes a step may have; all compiled before the engine is ready.

A step has ``chunk_rows`` rows for prefill chunks, then ``decode_rows`` rows of one token each. Buckets differ only in
these two numbers. On XLA's CPU backend the bits of a row do not depend on them (see ``models.layers.dense``), so a
request's tokens and log-probabilities are the same in any bucket; on a GPU the matmul library may choose another
kernel for another number of rows, and with it other last bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MIN_ROWS = 8


@dataclass(frozen=True, order=True)
class Bucket:
    """One compiled shape. Rows [0, chunk_rows) are chunk rows, the rest decode rows."""

    chunk_rows: int
    decode_rows: int

    @property
    def rows(self) -> int:
        return self.chunk_rows + self.decode_rows


def ladder(low: int, high: int) -> tuple[int, ...]:
    """low, 2 low, 4 low, ... and high at the end."""
    steps = []
    while low < high:
        steps.append(low)
        low *= 2
    return (*steps, high)


@dataclass(frozen=True)
class Buckets:
    """Every bucket of an engine: decode-only steps, and chunk steps beside few or many decode rows."""

    chunk_rows: tuple[int, ...]
    decode_rows: tuple[int, ...]

    @classmethod
    def make(cls, max_chunk_rows: int, max_num_seqs: int, row_block: int) -> "Buckets":
        """Powers of two up to the limits; chunk rows are multiples of ``row_block``."""
        most = max(max_chunk_rows // row_block, 1)
        chunks = tuple(row_block * n for n in ladder(min(max(64 // row_block, 1), most), most))
        return cls(chunks, ladder(min(MIN_ROWS, max(max_num_seqs, 2)), max(max_num_seqs, 2)))

    def __iter__(self):
        yield from (Bucket(0, rows) for rows in self.decode_rows)
        for chunk in self.chunk_rows:
            yield from (Bucket(chunk, rows) for rows in sorted({self.decode_rows[0], self.decode_rows[-1]}))

    def fit(self, chunk_rows: int, decode_rows: int) -> Bucket:
        """The smallest bucket that holds this many rows of each kind."""
        if chunk_rows == 0:
            return Bucket(0, _least(self.decode_rows, decode_rows))
        few, many = self.decode_rows[0], self.decode_rows[-1]
        return Bucket(_least(self.chunk_rows, chunk_rows), few if decode_rows <= few else many)


def _least(sizes: Sequence[int], wanted: int) -> int:
    fitting = [size for size in sizes if size >= wanted]
    assert fitting, f"{wanted=} {sizes=}"
    return fitting[0]
