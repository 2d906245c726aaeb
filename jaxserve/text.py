"""From one choice's tokens to the text a client sees, piece by piece."""

from collections.abc import Sequence
from typing import Protocol


class TokenStream(Protocol):
    """An incremental detokeniser. One that can also give what it still holds at the end has ``flush() -> str``."""

    def step(self, token_id: int, /) -> str | None: ...


class TextStream:
    """Detokenises, and keeps stop strings from being seen.

    The stop string that is complete first ends the text (of two complete at the same character, the longer), so the
    cut does not depend on where tokens end. What could still become a stop string is held back, never more than the
    longest one. The pieces put together are the whole text.
    """

    def __init__(
        self, stream: TokenStream | None, stop: Sequence[str] = (), include_stop: bool = False, min_tokens: int = 0
    ):
        """stream None gives no text. A stop string completed before the min_tokens-th token is ordinary text."""
        self._stream = stream
        self._stops = tuple(stop)
        self._include_stop = include_stop
        self._tokens_to_min = min_tokens
        self._held = ""
        self._ended = False

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Returns the text that is now certain, and the stop string that this token completed, if one."""
        assert not self._ended, "a token after the end of the text"
        self._tokens_to_min -= 1
        piece = self._stream.step(token_id) if self._stream else None
        return self._take(piece) if piece else ("", None)

    def finish(self) -> str:
        """Returns the rest of the text; nothing once a stop string was hit."""
        if self._ended:
            return ""
        flush = getattr(self._stream, "flush", None)
        text, _ = self._take(flush() if flush else "")
        rest, self._held, self._ended = self._held, "", True
        return text + rest

    def _take(self, piece: str) -> tuple[str, str | None]:
        self._held += piece
        hit = self._first_stop() if self._tokens_to_min <= 0 else None
        if hit is not None:
            begin, stop = hit
            text, self._held, self._ended = self._held[: begin + len(stop) * self._include_stop], "", True
            return text, stop
        certain = len(self._held) - self._unsure()
        text, self._held = self._held[:certain], self._held[certain:]
        return text, None

    def _first_stop(self) -> tuple[int, str] | None:
        found = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(begin + len(stop), begin, stop) for begin, stop in found if begin >= 0]
        return min(ends)[1:] if ends else None

    def _unsure(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(max(map(len, self._stops), default=0) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._begins_a_stop(self._held[-n:])), 0)

    def _begins_a_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
