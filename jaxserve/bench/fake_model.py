"""A model for the simulator whose tokens can be told beforehand: wrong pages and wrong adapters change them.

A place of a page holds a hidden state: a hash of the token, its adapter, the state of the token before it and that of
one more earlier token, both as read through the sequence's page table. So a row costs the same however long its context
is, and depends on all of it. The token that a choice draws is a hash of a row's state; so is the loss of a row that is
trained on.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Values
from functools import lru_cache
from hashlib import blake2b

from jaxserve.finetune.windows import FinetunePlan, Lane
from jaxserve.scheduler.plan import Segment, StepPlan
from jaxserve.scheduler.request import Sequence

VOCAB_SIZE = 32_000
ROOT = 0  # the state that the first token follows


def expected(
    prompt_ids: Iterable[int], adapter_digest: bytes, count: int, choice: int = 0, vocab_size: int = VOCAB_SIZE
) -> list[int]:
    """The first ``count`` tokens of a choice, without any pages."""
    adapter = _adapter(adapter_digest)
    states: list[int] = []
    outputs: list[int] = []
    for token in prompt_ids:
        states.append(_follow(states, token, adapter))
    while len(outputs) < count:
        outputs.append(_draw(states[-1], choice, vocab_size))
        states.append(_follow(states, outputs[-1], adapter))
    return outputs


def expected_losses(token_ids: Iterable[int], lane: Lane) -> list[float]:
    """What a training sequence's ``losses`` are at the end, the entry of its first token left out."""
    adapter = _adapter(_lane_digest(lane))
    states: list[int] = []
    for token in token_ids:
        states.append(_follow(states, token, adapter))
    return [_loss(state) for state in states[:-1]]


class FakeModel:
    """Carries out plans over pages of its own, in the order in which they are made, as a device does.

    Args:
      num_slots: of the sequences that draw tokens.
    """

    def __init__(self, num_pages: int, page_size: int, num_slots: int, vocab_size: int = VOCAB_SIZE):
        self.page_size, self.vocab_size = page_size, vocab_size
        self._states = [[ROOT] * page_size for _ in range(num_pages)]
        self._adapters = [0] * num_slots
        self._last_tokens = [0] * num_slots  # drawn, whether the host has read them or not

    def run(self, plan: StepPlan) -> list[int]:
        """One step; must be called before anything else is planned. Returns the token of each of the plan's samples.
        Training sequences get the losses of their gradient rows."""
        copied = [(target, self._states[source].copy()) for source, target in plan.page_copies]
        for target, states in copied:
            self._states[target] = states
        for seq in plan.started:
            self._admit(seq)
        if plan.finetune is not None:
            self._train(plan.finetune)
        last = {"chunk": self._segments(plan.chunks), "decode": self._segments(plan.decodes)}
        tokens = [_draw(last[kind][i], seq.index, self.vocab_size) for seq, i, kind in plan.samples]
        for sample, token in zip(plan.samples, tokens, strict=True):
            self._last_tokens[_slot(sample.seq.slot)] = token
        return tokens

    def _admit(self, seq: Sequence) -> None:
        self._adapters[_slot(seq.slot)] = _adapter(seq.request.adapter_digest)

    def _segments(self, segments: Iterable[Segment]) -> list[int]:
        """Returns the state of each one's last row."""
        found = []
        for segment in segments:
            seq, start = segment.seq, segment.start
            slot = _slot(seq.slot)
            tokens = seq.tokens[start : segment.end] or [self._last_tokens[slot]]
            assert len(tokens) == segment.length, f"{segment}: {len(tokens)} tokens"
            found.append(self._rows(seq.pages, start, tokens, self._adapters[slot])[-1])
        return found

    def _train(self, windows: FinetunePlan) -> None:
        for seq, start, length in windows.forwards:
            tokens = seq.token_ids[start : start + length].tolist()
            self._rows(seq.pages, start, tokens, _adapter(_lane_digest(seq.lane)))
        for seq, start, length in windows.grads:
            tokens = seq.token_ids[start : start + length].tolist()
            states = self._rows(seq.pages, start, tokens, _adapter(_lane_digest(seq.lane)))
            seq.losses[start + 1 : start + length + 1] = [_loss(state) for state in states]

    def _rows(self, pages: Values[int], start: int, tokens: Iterable[int], adapter: int) -> list[int]:
        """Writes the states of these tokens, and returns them."""
        table = [self._states[page] for page in pages]
        size, found = self.page_size, []
        for position, token in enumerate(tokens, start):
            before = seen = ROOT
            if position:
                earlier = _earlier(position)
                before = table[(position - 1) // size][(position - 1) % size]
                seen = table[earlier // size][earlier % size]
            table[position // size][position % size] = state = _state(before, seen, token, adapter)
            found.append(state)
        return found


def _follow(states: Values[int], token: int, adapter: int) -> int:
    """The state of a token behind these."""
    position = len(states)
    if not position:
        return _state(ROOT, ROOT, token, adapter)
    return _state(states[-1], states[_earlier(position)], token, adapter)


def _earlier(position: int) -> int:
    """Which other token a row looks at: any of those before it, so that in the end no page goes unread."""
    return (position * 2654435761 >> 16) % position


def _state(before: int, seen: int, token: int, adapter: int) -> int:
    return hash((before, seen, token, adapter))  # of integers: the same in every process


def _draw(state: int, choice: int, vocab_size: int) -> int:
    return hash((state, choice)) % vocab_size


def _loss(state: int) -> float:
    return (state & 0xFFFFFF) / 2**24  # float32 holds it exactly


@lru_cache(maxsize=4096)
def _adapter(digest: bytes) -> int:
    return int.from_bytes(blake2b(digest, digest_size=8).digest(), "little")


def _lane_digest(lane: Lane) -> bytes:
    return b"lane %d" % lane.index


def _slot(slot: int | None) -> int:
    assert slot is not None, "a planned sequence holds a slot"
    return slot
