"""Ctrl-C and SIGTERM end a run between two steps, so that jobs are saved; a second one ends it at once."""

import signal
from types import FrameType


class Stopping:
    """A context in which signals only ask for an end; calling it tells whether one has."""

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stopping":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __call__(self) -> bool:
        return self.signal is not None

    def _asked(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    @property
    def status(self) -> int:
        """What a shell expects of a process that a signal has ended; 0 where none has."""
        return 0 if self.signal is None else 128 + self.signal
