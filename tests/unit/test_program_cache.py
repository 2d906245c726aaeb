"""Compiled programs stay on disk from one start to the next."""

import os
import subprocess
import sys

import pytest

CODE = """
import jax
from jaxserve.engine.compiles import use_compilation_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
use_compilation_cache()
jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(2.0))
print(any(hits))
"""


def ran(**environment: str) -> str:
    """What it says: whether a program came from the disk."""
    env = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "Error" not in done.stderr
    return done.stdout.strip()


def test_a_second_start_finds_the_programs_of_the_first(tmp_path):
    assert [ran(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)] == ["False", "True"]
    (programs,) = (tmp_path / "jaxserve").iterdir()
    assert programs.name.startswith("programs-")
    assert programs.stat().st_mode & 0o77 == 0  # they are run, so nobody else may write there


def test_a_directory_that_is_named_is_taken(tmp_path):
    named = tmp_path / "named"
    assert ran(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(named)) == "False"
    assert list(named.iterdir())
    assert not (tmp_path / "jaxserve").exists()


@pytest.mark.parametrize("environment", [{"JAX_ENABLE_COMPILATION_CACHE": "false"}, {"XDG_CACHE_HOME": "/dev/null/x"}])
def test_without_a_place_nothing_is_kept_and_nothing_fails(tmp_path, environment):
    assert ran(**{"XDG_CACHE_HOME": str(tmp_path), **environment}) == "False"
    assert not list(tmp_path.iterdir())
