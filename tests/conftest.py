"""JAX at its strictest, eight devices, no network: set before anything imports JAX."""

import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # nothing is left in the home of who tests
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models so small torch's other threads only wait
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

if "cuda" in os.environ["JAX_PLATFORMS"]:
    os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"  # tuning takes longer than the tests

gc.set_threshold(50_000, 20, 100)  # tracing makes very many objects that stay

settings.register_profile("dev", deadline=None)  # the first example may compile
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Sample texts and traces kept beside the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data beside the project")
    return SHARED_DATA


MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000  # Linux gives a process 65,530; XLA crashes where a program gets none


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs():
    """Forgets compiled programs when the process holds very many: each of them is a dozen memory maps."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles(request: pytest.FixtureRequest) -> None:
    """Compiles without optimization, in a third of the time, what modules marked so run."""
    quickly = request.node.get_closest_marker("quick_compiles") is not None
    if quickly or "quick" in sys.modules:
        import quick

        quick.compile_all(quickly)


@pytest.fixture(autouse=True)
def _no_config_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's JAXSERVE_SECTION__KEY variables are not part of a test."""
    for name in [name for name in os.environ if name.startswith("JAXSERVE_") and "__" in name]:
        monkeypatch.delenv(name)
