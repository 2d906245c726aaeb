"""A finetune sequence on its way through the step: windows forward, then windows right to left with their backward.

A sequence is cut into windows of at most W rows. Phase F runs all but the last forward, left to right: only keys and
values stay. Phase B runs the windows right to left, forward and backward in one step each. One that fits in a single
window has no phase F.

With a stash phase F runs all windows forward, their activations stay until phase B, and phase B has no forward. Windows
then begin at whole blocks of rows, which is what the stash is made of.

Shapes: S tokens.
"""

from collections.abc import Sequence as Values
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pallas_kernels.cross_entropy import CROSS_ENTROPY


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """What a sequence is to learn, per token; entry t is about predicting token t. Entry 0 is never used."""

    weights: np.ndarray  # [S] float32; 0: nothing to learn
    kind: int = CROSS_ENTROPY
    sampled_logprobs: np.ndarray | None = None  # [S] float32
    advantages: np.ndarray | None = None  # [S] float32
    clip: tuple[float, float] = (0.8, 1.2)


@dataclass(frozen=True)
class Lane:
    """Where the adapter of a job that is training lives."""

    index: int
    adapter_pages: tuple[int, ...]  # of the bank
    sites: tuple[int, ...]
    lane_pages: tuple[int, ...]  # of the gradients, one per bank page
    scaled: bool = False  # the adapter has scales: (IA)3, DoRA
    fused_inputs: bool = False  # and they differ between linear layers of one input


class WindowRows(NamedTuple):
    """Rows [start, start + length) of a finetune sequence, in one step."""

    seq: "TrainSequence"
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class FinetunePlan(NamedTuple):
    """Windows of one step: in the gradient rows, and forward only beside the prefill chunks."""

    grads: tuple[WindowRows, ...] = ()
    forwards: tuple[WindowRows, ...] = ()


@dataclass(eq=False)
class TrainSequence:
    """One example under way. Row t predicts token t + 1, so S tokens make S - 1 rows.

    How many rows a window has is decided step by step: phase F moves ``forwarded`` to the right, phase B moves
    ``remaining`` to the left, and any cut gives the same gradient but for rounding.
    """

    token_ids: np.ndarray  # [S] int32
    targets: Targets
    lane: Lane
    window: int = 1 << 30  # most rows of a window of phase B
    fixed: bool = False  # windows of phase B begin at multiples of ``window``, whatever a step has room for
    alone: bool = False  # no other sequence of its lane has gradient rows in the same step
    forward_only: bool = False  # for its loss alone
    dropout: float = 0.0
    drop_key: int = 0  # int32
    slot: int = -1  # 0 .. train_slots - 1
    pages: list[int] = field(default_factory=list)
    acc_pages: list[int] = field(default_factory=list)
    stash_blocks: list[int] = field(default_factory=list)  # of the rows' activations, block by block; none: no stash
    row_block: int = 1  # rows of one
    forwarded: int = 0  # rows [0, forwarded) have phase F planned
    num_rows: int = field(init=False)
    remaining: int = field(init=False)  # rows [0, remaining) have no phase B planned
    num_losses: int = 0  # planned windows whose losses the host reads
    num_read: int = 0  # of those, the ones that it has read
    losses: np.ndarray = field(init=False)  # [S] per predicted token
    logprobs: np.ndarray = field(init=False)

    def __post_init__(self):
        self.num_rows = self.remaining = len(self.token_ids) - 1
        self.losses = np.zeros(len(self.token_ids), np.float32)
        self.logprobs = np.zeros(len(self.token_ids), np.float32)

    @property
    def backward_begun(self) -> bool:
        return self.remaining < self.num_rows

    @property
    def done(self) -> bool:
        """Every row is planned."""
        return self.forwarded == self.num_rows if self.forward_only else self.remaining == 0

    def first_backward(self, rows: int) -> int:
        """Where phase B's first window that runs forward itself begins when a step has room for ``rows``."""
        if self.stash_blocks:
            return self.num_rows
        if self.fixed:
            return (self.num_rows - 1) // self.window * self.window
        first = self.num_rows - (rows if rows < self.window else self.window)
        return first if first > 0 else 0

    def backward_window(self, room: int) -> WindowRows | None:
        """The next window of phase B that ``room`` rows allow. Its earlier rows must have been forward by then, with a
        stash its own as well."""
        remaining = self.remaining
        if self.forward_only or not remaining or room <= 0:
            return None
        block = self.row_block if self.stash_blocks else 1
        window = rounded(self.window, block)
        start = remaining - (room if room < window else window)
        if start < 0:
            start = 0
        if self.fixed:
            boundary = (remaining - 1) // window * window
            if boundary < start:
                return None
            start = boundary
        start = rounded(start, block)
        return WindowRows(self, start, remaining - start) if start < remaining else None

    def forward_window(self, room: int, last: int) -> WindowRows | None:
        """The next window of phase F, or None where nothing is left for it.

        Args:
          last: rows that phase B's first window will have; it runs them forward itself.
        """
        if self.backward_begun:
            return None
        end = self.num_rows if self.forward_only else self.first_backward(last)
        left = end - self.forwarded
        if left <= 0 or room <= 0:
            return None
        return WindowRows(self, self.forwarded, left if left < room else room)

    def take_backward(self, window: WindowRows) -> None:
        """Notes that a window of phase B is in a step."""
        assert window.end == self.remaining, f"rows up to {self.remaining} are due, not {window.end}"
        needed = window.end if self.stash_blocks else window.start
        assert self.backward_begun or needed <= self.forwarded, f"rows before {needed} are not forward yet"
        self.remaining = window.start
        self.num_losses += 1

    def take_forward(self, window: WindowRows) -> None:
        """Notes that a window of phase F is in a step."""
        assert window.start == self.forwarded, f"rows from {self.forwarded} are due, not {window.start}"
        assert not self.backward_begun, "phase F is over"
        self.forwarded = window.end
        self.num_losses += self.forward_only


def example_key(seed: int, epoch: int, example: int) -> int:
    """The int32 that stands for an example in one epoch of a job with this seed."""
    return int(np.random.SeedSequence((seed, epoch, example)).generate_state(1, np.uint32).view(np.int32)[0])


def total_rows(windows: Values[WindowRows], row_block: int) -> int:
    """Rows these windows take in a step, each rounded up to whole blocks."""
    return sum([-(-length // row_block) * row_block for _, _, length in windows])


def rounded(rows: int, row_block: int) -> int:
    """Rows in whole blocks."""
    return -(-rows // row_block) * row_block
