"""One step's work, as the scheduler hands it to the packer, and what comes back."""

from collections.abc import Sequence as Values
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from jaxserve.scheduler.request import Sequence


class Segment(NamedTuple):
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


@dataclass(kw_only=True, eq=False)
class StepPlan:
    """Valid until the scheduler is called again: pages and slots are read from the sequences, so pack it at once.

    Decode rows come as two columns, because a step has many and host time counts; ``decodes`` and ``samples`` make one
    object of each row. Decode row i is drawn from by its own sequence, in sample i.

    page_copies (src, dst) run before the step writes anything, and all of them read before any of them writes.
    """

    index: int  # of the scheduler's plans; NO_REQUESTS: the step has nothing of the scheduler's
    chunks: tuple[Segment, ...]
    decoding: tuple[Sequence, ...] = ()  # the same object as in the plan before, unless somebody came or went
    positions: Values[int] = ()  # of the decode rows
    chunk_samples: tuple[Sample, ...] = ()  # those drawn behind chunks
    page_copies: tuple[tuple[int, int], ...] = ()
    started: tuple[Sequence, ...] = ()  # hold a slot since this plan, some of them again; followers included
    preempted: tuple[Sequence, ...] = ()
    finetune: Any = None  # a FinetunePlan: windows of finetune sequences beside the requests
    chunk_rows: int  # rows of the chunks, each rounded up to whole row blocks

    @cached_property
    def decodes(self) -> tuple[Segment, ...]:
        return tuple([Segment(seq, start, 1) for seq, start in zip(self.decoding, self.positions, strict=True)])

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        return (*(Sample(seq, row, "decode") for row, seq in enumerate(self.decoding)), *self.chunk_samples)

    @property
    def num_samples(self) -> int:
        return len(self.decoding) + len(self.chunk_samples)

    @property
    def num_rows(self) -> int:
        return self.chunk_rows + len(self.decoding)

    def beside(self, finetune: Any) -> "StepPlan":
        """The same rows of requests with these windows of finetune sequences."""
        return replace(self, finetune=finetune)


class StepResult(NamedTuple):
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


class Read(NamedTuple):
    """What came of a step. The sequences of decode rows that are not ``apart`` have one more token and go on."""

    apart: set[int]  # decode rows whose sequence has ended with this step's token, or was over before
    outcomes: list[Outcome]  # of all but the rows that go on
