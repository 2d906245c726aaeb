"""Counts compilations: after start-up there must be none, or one request's odd shape stalls everybody."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_counters: "weakref.WeakSet[CompileCounter]" = weakref.WeakSet()
_listening = False


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


def use_compilation_cache() -> None:
    """Keeps compiled programs in JAX's persistent cache if JAX_COMPILATION_CACHE_DIR names one, small ones as well."""
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
