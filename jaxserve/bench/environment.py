"""What must be set before JAX is imported."""

import os


def prepare_environment() -> None:
    """For compiling ahead of time: the process needs no GPU, and the compiler times nothing."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if "xla_gpu_autotune_level" not in os.environ.get("XLA_FLAGS", ""):  # there is nothing to time kernels on
        os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()
