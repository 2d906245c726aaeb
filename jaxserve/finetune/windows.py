"""A finetune sequence on its way through the step: windows forward, then windows right to left with their backward.

A sequence of S tokens is cut into windows of at most W rows. Phase F runs every window but the last forward, left to
right: only keys and values stay. Phase B runs the windows right to left, forward and backward in one step each. One
that fits in a single window has no phase F.

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
    """One example under way."""

    token_ids: np.ndarray  # [S] int32
    targets: Targets
    lane: Lane
    windows: tuple[tuple[int, int], ...]  # [start, end), left to right
    forward_only: bool = False  # for its loss alone
    dropout: float = 0.0
    drop_key: int = 0  # int32
    slot: int = -1  # 0 .. train_slots - 1
    pages: list[int] = field(default_factory=list)
    acc_pages: list[int] = field(default_factory=list)
    num_forward: int = 0  # windows whose phase F is planned
    num_backward: int = 0  # windows whose phase B is planned
    losses: np.ndarray = field(init=False)  # [S] per predicted token
    logprobs: np.ndarray = field(init=False)

    def __post_init__(self):
        self.losses = np.zeros(len(self.token_ids), np.float32)
        self.logprobs = np.zeros(len(self.token_ids), np.float32)

    @property
    def next_forward(self) -> WindowRows | None:
        """The next phase F window; None when only the last one is left, which runs forward in phase B."""
        if self.num_forward >= len(self.windows) - (not self.forward_only) or self.num_backward:
            return None
        start, end = self.windows[self.num_forward]
        return WindowRows(self, start, end - start)

    @property
    def next_backward(self) -> WindowRows | None:
        """The next phase B window; None while phase F is not through, and at the end."""
        if self.forward_only or self.num_forward < len(self.windows) - 1 or self.done:
            return None
        start, end = self.windows[len(self.windows) - 1 - self.num_backward]
        return WindowRows(self, start, end - start)

    @property
    def done(self) -> bool:
        """Every window is planned."""
        return (self.num_forward if self.forward_only else self.num_backward) == len(self.windows)

    @property
    def num_losses(self) -> int:
        """Windows whose losses the host reads."""
        return len(self.windows)


def cut(length: int, window: int) -> tuple[tuple[int, int], ...]:
    """Windows of ``window`` tokens, a function of the length alone; the last may be shorter.

    The last token has nothing to predict, so it is in no window.
    """
    rows = length - 1
    return tuple((start, min(start + window, rows)) for start in range(0, rows, window))


def example_key(seed: int, epoch: int, example: int) -> int:
    """The int32 that stands for an example in one epoch of a job with this seed."""
    return int(np.random.SeedSequence((seed, epoch, example)).generate_state(1, np.uint32).view(np.int32)[0])


def total_rows(windows: Values[WindowRows], row_block: int) -> int:
    """Rows these windows take in a step, each rounded up to whole blocks."""
    return sum(-(-w.length // row_block) * row_block for w in windows)
