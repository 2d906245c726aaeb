"""Counts compilations: after start-up there must be none, or one request's odd shape stalls everybody. Keeps what is
compiled for the next start."""

import hashlib
import logging
import os
import platform
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)

CACHE_BYTES = 4 << 30

_EVENT = "/jax/core/compile/backend_compile_duration"
_counters: "weakref.WeakSet[CompileCounter]" = weakref.WeakSet()
_listening = False
_watchers: list[Callable[[int, int], None]] = []
_thread = threading.local()


class CompileCounter:
    """Backend compilations in this process since ``mark_ready``, but for those that a thread has said it expects."""

    def __init__(self):
        global _listening
        self.before_ready = self.after_ready = 0
        self.ready = False
        _counters.add(self)
        if not _listening:
            listener: Any = _count
            jax.monitoring.register_event_duration_secs_listener(listener)
            _listening = True

    def mark_ready(self) -> None:
        self.ready = True

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """What this thread compiles in here is no surprise: it makes something ready that was asked for just now."""
        outer, _thread.preparing = getattr(_thread, "preparing", False), True
        try:
            yield
        finally:
            _thread.preparing = outer


def _count(event: str, duration: float, **details: str | int) -> None:
    if event == _EVENT:
        expected = getattr(_thread, "preparing", False)
        for counter in list(_counters):
            if counter.ready and not expected:
                counter.after_ready += 1
            else:
                counter.before_ready += 1


@contextmanager
def watched(told: Callable[[int, int], None]) -> Iterator[None]:
    """Whenever an engine has compiled one of its programs, calls ``told`` with how many are done, of how many."""
    _watchers.append(told)
    try:
        yield
    finally:
        _watchers.remove(told)


def tell(done: int, total: int) -> None:
    """Passes on how far an engine is."""
    for told in list(_watchers):
        told(done, total)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, small ones as well, so that the next start of the same engine is short.

    They lie where JAX_COMPILATION_CACHE_DIR says or else below the user's cache directory, at most CACHE_BYTES of them,
    least recently used first to go. JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    if not jax.config.values["jax_compilation_cache_dir"]:
        try:
            directory = _cache_dir()
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # no home, or not to be written
            logger.info("compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _cache_dir() -> Path:
    """Machines that share a home directory, but not their instructions, have one each."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    processor = hashlib.sha256(f"{platform.machine()} {_instructions()}".encode()).hexdigest()[:12]
    return home / "jaxserve" / f"programs-{processor}"


def _instructions() -> str:
    """What the processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
