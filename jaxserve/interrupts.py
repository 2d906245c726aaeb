"""Ctrl-C in the middle of what must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block, a second one at once. Only the main thread is interrupted at all."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    asked: list[tuple[int, FrameType | None]] = []

    def defer(*interrupt) -> None:
        if asked:
            handler(*interrupt)
        asked.append(interrupt)

    signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if asked:
            handler(*asked[0])
