"""Compiling in a third of the time, without optimization: for programs whose bits are not compared with others'."""

from typing import Any

import jax
from jax._src import compiler

OPTIONS: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if jax.__version_info__ < (0, 11):  # newer ones have no other emitter
    OPTIONS["xla_cpu_use_fusion_emitters"] = False

_given = compiler.get_compile_options
_all_programs = False


def compile_all(quickly: bool) -> None:
    """Whether all programs are compiled with these options from here on."""
    global _all_programs
    if quickly != _all_programs:
        jax.clear_caches()  # they do not tell the two kinds apart
    _all_programs = quickly


def _get_compile_options(*args: Any, env_options_overrides: dict[str, Any] | None = None, **fields: Any):
    options = (OPTIONS if _all_programs else {}) | (env_options_overrides or {})
    return _given(*args, env_options_overrides=options, **fields)


compiler.get_compile_options = _get_compile_options
