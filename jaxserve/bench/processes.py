"""Other processes to work in: spawned, never forked, since this one has JAX and its threads."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process


def spawned(count: int) -> ProcessPoolExecutor:
    """So many processes, which end with this one, however it ends."""
    return ProcessPoolExecutor(count, get_context("spawn"), _begin)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all, and the parent says so
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a spawned process has one"
    parent.join()
    os._exit(1)
