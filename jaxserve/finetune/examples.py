"""Turns records into token ids with a weight per token: what is learnt, and what is only read.

Shapes: S tokens of one example. weights_S[t] is the weight of predicting token t from those before it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from jaxserve.errors import InvalidRequest
from jaxserve.finetune.conversations import Chat
from jaxserve.finetune.records import Completion, Record, Text
from jaxserve.finetune.turns import Turns, common
from jaxserve.tokenizer import Tokenizer

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
            start = common(ids, self._plain(record.prompt))
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
        return self.tokenizer.with_template(_VERBATIM)

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after every text."""
        inner, whole = (self.tokenizer.encode("a", add_special_tokens=flag) for flag in (False, True))
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []

    def _encode_chat(self, chat: Chat) -> tuple[list[int], np.ndarray]:
        turns = Turns(self.tokenizer, chat)
        learnt_S = np.full(len(turns.ids), self.loss_on == "all")
        for place, message in enumerate(chat.messages):
            wanted = chat.weights[place] > 0
            if message["role"] == "assistant" and wanted != (self.loss_on == "all"):
                learnt_S[slice(*turns.bounds(place))] = wanted
        return turns.ids, learnt_S.astype(np.float32)
