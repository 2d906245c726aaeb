"""What an import costs and pulls in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 2.5
HEAVY = ("torch", "transformers", "peft", "jax")

CODE = """
import sys, time
start = time.process_time()
import {module}
seconds = time.process_time() - start
import json
print(json.dumps([seconds, [name for name in {heavy!r} if name in sys.modules]]))
"""


def imported(module: str) -> tuple[float, list[str]]:
    """Least of three processor times in seconds, and the heavy modules that came with it."""
    code = CODE.format(module=module, heavy=HEAVY)
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
        for _ in range(3)
    ]
    results = [json.loads(run) for run in runs]
    return min(seconds for seconds, _ in results), results[0][1]


def test_import_jaxserve_is_quick_and_brings_nothing_heavy():
    seconds, heavy = imported("jaxserve")
    assert seconds < SECONDS
    assert heavy == []


def test_import_of_the_engine_is_quick_and_brings_no_torch():
    seconds, heavy = imported("jaxserve.llm")
    assert seconds < SECONDS
    assert heavy == ["jax"]


@pytest.mark.parametrize("module", ["jaxserve.config", "jaxserve.cli", "jaxserve.scheduler.scheduler", "jaxserve.text"])
def test_what_needs_no_jax_does_not_import_it(module):
    assert imported(module)[1] == []


def test_the_import_contracts_hold():
    pytest.importorskip("importlinter", reason="the dev extra has import-linter")
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(cache_dir=None))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
