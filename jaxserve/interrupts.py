"""Ctrl-C, and SIGTERM, in the middle of what must not be left half done."""

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


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """In the block SIGTERM does as Ctrl-C does; what leaves it then is SystemExit with the status of a process that
    the signal has ended. Only the main thread is interrupted at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        handler = signal.getsignal(signal.SIGINT)
        (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if not asked:
            raise
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)
