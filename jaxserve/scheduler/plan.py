"""One step's work, as the scheduler hands it to the packer, and what comes back."""

from collections.abc import Sequence as Values
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxserve.scheduler.request import Sequence


class Segment(NamedTuple):  # a tuple, because a step makes one per row and host time counts
    """Rows [start, start + length) of a sequence. A row at or past len(seq.tokens) takes the slot's last token."""

    seq: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Sample(NamedTuple):
    """``seq`` draws a token from the last row of ``plan.chunks[i]`` or ``plan.decodes[i]``, i = segment_index.

    With n > 1 several sequences draw from one row. The token goes to seq's own slot; segment.end - seq.prompt_len
    outputs come before it.
    """

    seq: Sequence
    segment_index: int
    kind: Literal["chunk", "decode"]


NO_REQUESTS = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """Valid until the scheduler is called again: pages and slots are read from the sequences, so pack it at once.

    page_copies (src, dst) run before the step writes anything, and all of them read before any of them writes.
    """

    index: int  # of the scheduler's plans; NO_REQUESTS: the step has nothing of the scheduler's
    chunks: tuple[Segment, ...]
    decodes: tuple[Segment, ...]
    samples: tuple[Sample, ...]
    page_copies: tuple[tuple[int, int], ...] = ()
    started: tuple[Sequence, ...] = ()  # hold a slot since this plan, some of them again; followers included
    preempted: tuple[Sequence, ...] = ()
    finetune: Any = None  # a FinetunePlan: windows of finetune sequences beside the requests
    chunk_rows: int  # rows of the chunks, each rounded up to whole row blocks

    @property
    def num_rows(self) -> int:
        return self.chunk_rows + len(self.decodes)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepResult:
    """What commit() needs from a step; the engine keeps logprobs and the like under the same sample indices."""

    tokens: Values[int]  # one per sample
    finite: Values[bool]  # one per sample: the row's logits are finite
    chunk_finite: Values[bool] = ()  # one per chunk: all its rows are finite; empty when the step does not say


class Outcome(NamedTuple):
    """News of one sequence. ``sample`` is the index into plan.samples, None for a chunk that failed as such."""

    seq: Sequence
    token: int | None
    finish_reason: str | None
    sample: int | None
