"""Nothing in the packages executes data: no pickle, no eval, no loader that would run what it reads."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("jaxserve", "pallas_kernels", "sharding")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {"torch.load", "os.system", "os.popen", "subprocess.getoutput", "ctypes.CDLL"}
FALSE_KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}


def banned(source: str) -> list[str]:
    """What of the source is banned, as ``line: what``."""
    return [f"{node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in _of(node)]  # pyright: ignore


def _of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        if (node.module or "").split(".")[0] in MODULES or names & METHODS:
            yield f"from {node.module} import"
    elif isinstance(node, ast.Name) and node.id in BUILTINS:
        yield node.id
    elif isinstance(node, ast.Attribute) and ast.unparse(node) in METHODS:
        yield ast.unparse(node)
    elif isinstance(node, ast.keyword) and node.arg in FALSE_KEYWORDS and ast.unparse(node.value) != "False":
        yield f"{node.arg}={ast.unparse(node.value)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_execute_no_data(package):
    sources = sorted((ROOT / package).rglob("*.py"))
    found = {str(path.relative_to(ROOT)): banned(path.read_text(encoding="utf-8")) for path in sources}
    assert sources
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal",
        "from yaml import load",
        "def f():\n    from cloudpickle.sub import x",
        "eval('1')",
        "f = exec",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "torch.load(path)",
        "from torch import load",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_gate_sees(source):
    assert len(banned(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "re.compile('x')",
        "model.eval()",
        "np.load(path, allow_pickle=False)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=False)",
        "from ruamel.yaml import YAML",
        "jax.jit(f).lower(x).compile()",
    ],
)
def test_the_gate_lets_pass(source):
    assert banned(source) == []
