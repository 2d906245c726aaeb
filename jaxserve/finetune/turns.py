"""Where in a conversation, as the model's chat template writes it, the assistant speaks."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.errors import InvalidRequest
from jaxserve.finetune.conversations import Chat
from jaxserve.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

# two contents that share neither their first nor their last token with each other
_STAND_INS = ("0", "A")


class Turns:
    """A conversation, encoded once."""

    def __init__(self, tokenizer: Tokenizer, chat: Chat):
        """
        Raises:
          InvalidRequest: the template refuses the messages.
          ValueError: it leaves out the tools, or calls of tools.
        """
        self._tokenizer, self._messages = tokenizer, chat.messages
        self._variables = {"tools": chat.tools} if chat.tools else {}
        self._whole = tokenizer.chat_tokens(chat.messages, add_generation_prompt=False, **self._variables)
        if chat.tools and self._is_whole(chat.messages, {}):
            raise ValueError("the model's chat template does not show tools")
        for place, message in enumerate(chat.messages):
            if message.get("tool_calls") and self._is_whole(self._with(place, _renamed(message)), self._variables):
                raise ValueError(f"messages[{place}]: the model's chat template does not show tool_calls")

    @property
    def ids(self) -> list[int]:
        """Token ids of the whole conversation."""
        return self._whole.ids

    def bounds(self, place: int) -> tuple[int, int]:
        """(start, end) of the tokens that the model says as message ``place``: after the generation prompt, to the
        token that ends the turn.

        Templates may write an earlier turn otherwise than a last one, so each end is taken from the conversation cut
        there if that is a beginning of the whole, and else from what stays when the message's content is replaced.

        Raises:
          ValueError: the template shows nothing of the message, or refuses it with another content.
        """
        messages, through = self._messages, self._messages[: place + 1]
        start = self._length_of_beginning(messages[:place], prompt=True)
        end = len(self.ids) if len(through) == len(messages) else self._length_of_beginning(through)
        if start is None:
            start = self._start_of_content(place)
        if end is None:
            end = self._end_of_content(place)
        if not start < end:
            raise ValueError(f"messages[{place}]: the model's chat template leaves nothing of it to learn")
        return start, self._without_tail(start, min(end, len(self.ids)))

    def _text(self, messages: Messages, variables: Mapping[str, Any], prompt: bool = False) -> str | None:
        """None: the template refuses them, as it may without a user's message first, or last."""
        try:
            return self._tokenizer.chat_text(messages, add_generation_prompt=prompt, **variables)
        except InvalidRequest:
            return None

    def _is_whole(self, messages: Messages, variables: Mapping[str, Any]) -> bool:
        return self._text(messages, variables) == self._whole.text

    def _with(self, place: int, message: Mapping[str, Any], cut: bool = False) -> Messages:
        """The messages with another one in this place, ``cut``: which is the last."""
        return [*self._messages[:place], message, *(() if cut else self._messages[place + 1 :])]

    def _length_of_beginning(self, messages: Messages, prompt: bool = False) -> int | None:
        """Number of tokens of ``messages`` if the whole begins with them. Tools may be shown further down."""
        for variables in (self._variables, {}) if self._variables else ({},):
            part = self._text(messages, variables, prompt)
            if part is not None and self._whole.text.startswith(part):
                return self._whole.num_before(len(part))
        return None

    def _start_of_content(self, place: int) -> int:
        """The first token that changes with the message's content, or that has the space before it."""
        whole, same = self._whole, self._num_same(place, self._variables, common)
        if same is None:  # turns must alternate, and calls are none: there is nothing to follow it then
            cut = (self._num_same(place, variables, common, cut=True) for variables in (self._variables, {}))
            same = max((num for num in cut if num is not None), default=None)
        if same is None:
            raise _cannot_change(place)
        return bisect_right(whole.ends, len(whole.text[:same].rstrip(" ")))

    def _end_of_content(self, place: int) -> int:
        """The end of the tokens that change with the message's content, and of the one that ends the turn."""
        whole, same = self._whole, self._num_same(place, self._variables, _common_end)
        if same is None:
            raise _cannot_change(place)
        last = bisect_left(whole.starts, len(whole.text) - same)
        # a call may end in a token of its own
        return last if last and self.ids[last - 1] in self._tokenizer.special_ids else last + 1

    def _num_same(
        self, place: int, variables: Mapping[str, Any], alike: Callable[[str, str], int], cut: bool = False
    ) -> int | None:
        """How many characters stay whatever the message's content is; None where the template refuses another."""
        plain, nums = {**self._messages[place], "tool_calls": None}, []
        for content in _STAND_INS:
            text = self._text(self._with(place, {**plain, "content": content}, cut), variables)
            if text is None:
                return None
            nums.append(alike(self._whole.text, text))
        return min(nums)

    def _without_tail(self, start: int, end: int) -> int:
        """Where the turn ends: after its last control token, if only white space follows that."""
        ids, control = self.ids, self._tokenizer.special_ids
        last = next((at for at in range(end - 1, start - 1, -1) if ids[at] in control), None)
        if last is None or self._tokenizer.decode(ids[last + 1 : end]).strip():
            return end
        return last + 1


def _cannot_change(place: int) -> ValueError:
    return ValueError(f"messages[{place}]: the model's chat template refuses it with another content")


def common(one: Sequence, other: Sequence) -> int:
    """Length of the common beginning."""
    most = min(len(one), len(other))
    return bisect_left(range(most), True, key=lambda at: one[: at + 1] != other[: at + 1])


def _common_end(one: str, other: str) -> int:
    return common(one[::-1], other[::-1])


def _renamed(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with calls of other functions."""
    calls = [
        {**call, "function": {**call["function"], "name": call["function"]["name"] + "_"}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
