"""The finite set of shapes a step may have; all compiled before the engine is ready.

A step has ``grad_rows`` rows whose backward runs in it, then ``chunk_rows`` rows for prefill chunks and finetune
windows that only go forward, then ``decode_rows`` rows of one token each. Buckets differ only in these three numbers.
On XLA's CPU backend the bits of a row do not depend on them (``models.layers.matmul``, ``pallas_kernels.numerics``), so
a request's tokens and log-probabilities are the same in any bucket; on a GPU the matmul library may choose another
kernel for another number of rows, and with it other last bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

MIN_ROWS = 8


@dataclass(frozen=True, order=True)
class Bucket:
    """One compiled shape: gradient rows, chunk rows, decode rows, in this order."""

    chunk_rows: int
    decode_rows: int
    grad_rows: int = 0
    stashed: bool = False  # gradient rows have been forward in an earlier step: what it left is in the stash

    def __post_init__(self):
        object.__setattr__(self, "_hash", hash((self.chunk_rows, self.decode_rows, self.grad_rows, self.stashed)))

    def __hash__(self) -> int:  # buckets are looked up many times in a step
        return self._hash  # pyright: ignore[reportAttributeAccessIssue]

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
    """1/4, 1/2, 3/4 and all of ``high``, as far as they are whole numbers that differ: close to each other where a step
    is long, because what a step's time has room for lies between two of them."""
    return tuple(sorted({max(high * quarters // 4, 1) for quarters in (1, 2, 3, 4)}))


@dataclass(frozen=True)
class Buckets:
    """Every bucket of an engine: decode-only steps, chunk steps beside few or many decode rows, and steps with
    gradient rows beside no chunk rows or about as many (``beside``), and few or many decode rows.

    There is no bucket for a long prompt's chunk beside gradient rows: both would fill a step alone.
    """

    chunk_rows: tuple[int, ...]
    decode_rows: tuple[int, ...]
    grad_rows: tuple[int, ...] = ()
    stashed: bool = False  # finetune rows run forward and backward in different steps

    @classmethod
    def make(
        cls, max_chunk_rows: int, max_num_seqs: int, row_block: int, max_grad_rows: int = 0, stashed: bool = False
    ) -> "Buckets":
        """Sizes up to the limits; chunk and gradient rows are multiples of ``row_block``."""
        most = max(max_chunk_rows // row_block, 1)
        chunks = tuple(row_block * n for n in ladder(min(max(64 // row_block, 1), most), most))
        decodes = ladder(min(MIN_ROWS, max(max_num_seqs, 2)), max(max_num_seqs, 2))
        grads = max_grad_rows // row_block
        return cls(chunks, decodes, tuple(row_block * n for n in rungs(grads)) if grads else (), stashed and grads > 0)

    def _bucket(self, chunk_rows: int, decode_rows: int, grad_rows: int = 0) -> Bucket:
        return _one(chunk_rows, decode_rows, grad_rows, self.stashed and chunk_rows + grad_rows > 0)

    @property
    def beside_chunks(self) -> tuple[int, ...]:
        """Decode rows beside chunk rows: few or many, and sizes between them where many are a lot more, since padding
        costs as much as any row."""
        return ladder(self.decode_rows[0], self.decode_rows[-1], 8)

    @property
    def beside_gradients(self) -> tuple[int, ...]:
        """Decode rows beside gradient rows: few are worth programs of their own only where many are a lot more."""
        few, many = self.decode_rows[0], self.decode_rows[-1]
        return self.beside_chunks if many > 2 * few else (many,)

    def beside(self, grad_rows: int) -> int:
        """Chunk rows of the buckets with so many gradient rows and any chunk rows at all."""
        return next((rows for rows in self.chunk_rows if rows >= grad_rows), self.chunk_rows[-1])

    def __iter__(self):
        yield from (self._bucket(0, rows) for rows in self.decode_rows)
        for chunk in self.chunk_rows:
            yield from (self._bucket(chunk, rows) for rows in self.beside_chunks)
        for grad in self.grad_rows:
            for chunk in (0, self.beside(grad)):
                yield from (self._bucket(chunk, rows, grad) for rows in self.beside_gradients)

    def holding(self, chunk_rows: int, decode_rows: int) -> Iterator[Bucket]:
        """The buckets, of each size of gradient and chunk rows one, that hold this many of the other kinds."""
        few = _least(self.beside_chunks, decode_rows)
        yield from (self._bucket(rows, few) for rows in self.chunk_rows if rows >= chunk_rows)
        few = _least(self.beside_gradients, decode_rows)
        for grad in self.grad_rows:
            for rows in (0, self.beside(grad)):
                if rows >= chunk_rows:
                    yield self._bucket(rows, few, grad)

    def fit(self, chunk_rows: int, decode_rows: int, grad_rows: int = 0) -> Bucket:
        """The smallest bucket that holds this many rows of each kind."""
        if grad_rows:
            fitting = [rows for rows in self.grad_rows if rows >= grad_rows and self.beside(rows) >= chunk_rows]
            assert fitting, f"{chunk_rows=} beside {grad_rows=} {self.grad_rows=}"
            chunk = self.beside(fitting[0]) if chunk_rows else 0
            return self._bucket(chunk, _least(self.beside_gradients, decode_rows), fitting[0])
        if chunk_rows == 0:
            return self._bucket(0, _least(self.decode_rows, decode_rows))
        return self._bucket(_least(self.chunk_rows, chunk_rows), _least(self.beside_chunks, decode_rows))


_one = lru_cache(maxsize=None)(Bucket)  # equal buckets are the same object: looking one up compares nothing


def _least(sizes: Sequence[int], wanted: int) -> int:
    for size in sizes:
        if size >= wanted:
            return size
    raise AssertionError(f"{wanted=} {sizes=}")
