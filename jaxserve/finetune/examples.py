"""Turns records into token ids with a weight per token: what is learnt, and what is only read.

Shapes: S tokens of one example. weights_S[t] is the weight of predicting token t from those before it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from jaxserve.errors import InvalidRequest
from jaxserve.finetune.records import Chat, Completion, Record, Text
from jaxserve.tokenizer import Tokenizer, Tokens

# two contents that share neither their first nor their last token with each other
_STAND_INS = ("0", "A")
_VERBATIM = "{{ messages[0]['content'] }}"


@dataclass(frozen=True, eq=False)
class Example:
    """One training sequence."""

    token_ids: np.ndarray  # [S] int32
    weights: np.ndarray  # [S] float32; the first is 0, nothing predicts the first token
    index: int  # place in the data as it was given
    sampled_logprobs: np.ndarray | None = None  # [S] float32, under the policy that drew the tokens
    advantages: np.ndarray | None = None  # [S] float32

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """Tokens with a weight other than 0."""
        return int(np.count_nonzero(self.weights))


def example(token_ids: Any, weights: Any, index: int, vocab_size: int) -> Example:
    """Checks and fixes one sequence.

    Args:
      token_ids: S integers from 0 to below ``vocab_size``.
      weights: S finite numbers from 0; None weighs every token 1.

    Raises:
      ValueError: anything else, with the reason.
    """
    ids_S = _array(token_ids)
    if ids_S.ndim != 1 or not np.issubdtype(ids_S.dtype, np.integer) or not len(ids_S):
        raise ValueError("token ids must be a list of at least one integer")
    if ids_S.min() < 0 or ids_S.max() >= vocab_size:
        raise ValueError(f"token ids must be from 0 to {vocab_size - 1}, the model's vocabulary")
    weights_S = np.ones(len(ids_S), np.float32) if weights is None else _weights(weights, len(ids_S))
    weights_S[0] = 0.0
    ids_S = ids_S.astype(np.int32)
    ids_S.flags.writeable = weights_S.flags.writeable = False
    return Example(ids_S, weights_S, index)


def _array(values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except (ValueError, TypeError):  # ragged
        return np.empty((), object)


def _weights(weights: Any, length: int) -> np.ndarray:
    weights_S = _array(weights)
    if weights_S.dtype.kind not in "biuf" or weights_S.shape != (length,):
        raise ValueError(f"weights must be a list of {length} numbers, one per token")
    with np.errstate(over="ignore"):
        weights_S = weights_S.astype(np.float32)  # a copy
    if not np.isfinite(weights_S).all() or weights_S.min() < 0:
        raise ValueError("weights must be finite and not negative")
    return weights_S


class Encoder:
    """Records to token ids and weights, by the model's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, loss_on: Literal["assistant", "all"] = "assistant"):
        self.tokenizer = tokenizer
        self.loss_on = loss_on

    def encode(self, record: Record) -> tuple[list[int], np.ndarray]:
        """(ids, weights [S] float32 of 0 and 1).

        Raises:
          ValueError: the chat template refuses the messages, or does not show the assistant's turn.
        """
        try:
            if isinstance(record, Chat):
                return self._encode_chat(record)
            return self._encode_text(record)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None

    def _encode_text(self, record: Completion | Text) -> tuple[list[int], np.ndarray]:
        if isinstance(record, Text):
            ids, start = self._plain(record.text), 0
        else:
            # together, as a prompt that goes on; a token that holds the seam belongs to the completion
            ids = self._plain(record.prompt + record.completion)
            start = _common(ids, self._plain(record.prompt))
        before, after = self._ends
        end = self.tokenizer.eos_token_id
        closing = after or ([] if end is None else [end])
        weights_S = np.ones(len(before) + len(ids) + len(closing), np.float32)
        if self.loss_on == "assistant":
            weights_S[: len(before) + start] = 0.0
        return [*before, *ids, *closing], weights_S

    def _plain(self, text: str) -> list[int]:
        """Ids of ``text`` alone; control tokens written in it are text."""
        return self._verbatim.apply_chat_template([{"role": "user", "content": text}], False) if text else []

    @cached_property
    def _verbatim(self) -> Tokenizer:
        return Tokenizer(self.tokenizer._backend, {}, _VERBATIM)

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after every text."""
        inner, whole = (self.tokenizer.encode("a", add_special_tokens=flag) for flag in (False, True))
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []

    def _encode_chat(self, chat: Chat) -> tuple[list[int], np.ndarray]:
        whole = self.tokenizer.chat_tokens(chat.messages, add_generation_prompt=False)
        learnt_S = np.full(len(whole.ids), self.loss_on == "all")
        for place, message in enumerate(chat.messages):
            wanted = chat.weights[place] > 0
            if message["role"] == "assistant" and wanted != (self.loss_on == "all"):
                learnt_S[slice(*self._turn(whole, chat.messages, place))] = wanted
        return whole.ids, learnt_S.astype(np.float32)

    def _turn(self, whole: Tokens, messages: Sequence[Mapping[str, str]], place: int) -> tuple[int, int]:
        """(start, end) of what the model says in its turn: after the generation prompt, to the token that ends it.

        Templates may write an earlier turn otherwise than a last one, so each end is taken from the conversation cut
        there if that is a beginning of the whole, and else from what stays when the message's content is replaced.
        """
        ids, through = whole.ids, messages[: place + 1]
        start = self._length_of_beginning(whole, messages[:place], prompt=True)
        end = len(ids) if len(through) == len(messages) else self._length_of_beginning(whole, through)
        if start is None or end is None:
            first, last = self._content(whole, messages, place)
            start = first if start is None else start
            end = last + 1 if end is None else end  # and the token that ends the turn
        if not start < end:
            raise ValueError(f"messages[{place}]: the model's chat template leaves nothing of it to learn")
        return start, self._without_tail(ids, start, min(end, len(ids)))

    def _length_of_beginning(
        self, whole: Tokens, messages: Sequence[Mapping[str, str]], prompt: bool = False
    ) -> int | None:
        """Number of tokens of ``messages`` if the whole begins with them."""
        try:
            part = self.tokenizer.chat_text(messages, add_generation_prompt=prompt)
        except InvalidRequest:  # templates may want a user's message first, or last
            return None
        return whole.num_before(len(part)) if whole.text.startswith(part) else None

    def _content(self, whole: Tokens, messages: Sequence[Mapping[str, str]], place: int) -> tuple[int, int]:
        """(start, end) of the tokens that change with the message's content, and of the space that a first word may
        have in its token."""
        others = [
            [*messages[:place], {**messages[place], "content": content}, *messages[place + 1 :]]
            for content in _STAND_INS
        ]
        text, variants = whole.text, [self.tokenizer.chat_text(other, add_generation_prompt=False) for other in others]
        start = min(_common(text, variant) for variant in variants)
        end = len(text) - min(_common(text[::-1], variant[::-1]) for variant in variants)
        return bisect_right(whole.ends, len(text[:start].rstrip(" "))), bisect_left(whole.starts, end)

    def _without_tail(self, ids: Sequence[int], start: int, end: int) -> int:
        """Where the turn ends: after its last control token, if only white space follows that."""
        control = self.tokenizer.special_ids
        last = next((at for at in range(end - 1, start - 1, -1) if ids[at] in control), None)
        if last is None or self.tokenizer.decode(ids[last + 1 : end]).strip():
            return end
        return last + 1


def _common(one: Sequence, other: Sequence) -> int:
    """Length of the common beginning."""
    most = min(len(one), len(other))
    return bisect_left(range(most), True, key=lambda at: one[: at + 1] != other[: at + 1])
