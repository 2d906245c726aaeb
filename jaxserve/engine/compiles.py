"""Counts compilations: after start-up there must be none, or one request's odd shape stalls everybody."""

import weakref
from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_counters: "weakref.WeakSet[CompileCounter]" = weakref.WeakSet()
_listening = False


class CompileCounter:
    """Backend compilations in this process since ``mark_ready``."""

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


def _count(event: str, duration: float, **details: str | int) -> None:
    if event == _EVENT:
        for counter in list(_counters):
            if counter.ready:
                counter.after_ready += 1
            else:
                counter.before_ready += 1


def use_compilation_cache() -> None:
    """Keeps compiled programs in JAX's persistent cache if JAX_COMPILATION_CACHE_DIR names one, small ones as well."""
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
