"""What the text of an optimized program says: kernels, collectives, copies; and what ptxas says of Pallas kernels."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
TYPES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "float64": "f64", "int16": "s16", "int32": "s32"}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
# the shape may be a tuple, with spaces in it
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_FUSED = re.compile(r"calls=%?([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_NOT_KERNELS = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-done", "async-update",
}  # fmt: skip


@dataclass(frozen=True)
class KernelResources:
    """One Pallas kernel as ptxas compiled it."""

    name: str
    registers: int  # per thread; the average over a block's warpgroups where they differ
    spill_bytes: int
    shared_bytes: int  # per block

    def __str__(self) -> str:
        return f"{self.name}: {self.registers} registers, {self.spill_bytes} bytes spilled, {self.shared_bytes} shared"


def _instructions(text: str) -> Iterator[tuple[str, str, str]]:
    """(opcode, shape, line) of what runs for itself, in the entry and in the loops and branches that it runs: not what
    lies inside of a fusion or of a reduction."""
    lines, entry = _computations(text)
    waiting, seen = [entry], {entry}
    while waiting:
        for line in lines.get(waiting.pop(), ()):
            if (found := _INSTRUCTION.match(line)) is None:
                continue
            yield found[2], found[1], line
            if found[2] in ("while", "conditional", "call"):
                called = [name for names in _CALLED.findall(line) for name in re.findall(r"[\w.\-]+", ",".join(names))]
                waiting += [name for name in called if name not in seen]
                seen |= set(called)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that is run."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            lines[name] = []
            entry = name if found[1] else entry
        elif name:
            lines[name].append(line)
    return lines, entry


def kernels(text: str) -> Counter[str]:
    """How many kernels of each kind a step starts; what lies in a loop counts once."""
    count: Counter[str] = Counter()
    lines, _ = _computations(text)
    pallas = {name for name, inside in lines.items() if any("mosaic" in line for line in inside)}
    for opcode, _, line in _instructions(text):
        base = opcode.removesuffix("-start")
        if opcode in _NOT_KERNELS or opcode.endswith("-done") or base in COLLECTIVES:
            continue
        if opcode == "fusion" and (called := _FUSED.search(line)) and called[1] in pallas:
            count["Pallas"] += 1  # with the slices that it reads and writes in place
            continue
        target = _TARGET.search(line) if opcode == "custom-call" else None
        name = opcode if target is None else target[1]
        count["Pallas" if "mosaic" in name else "matrix product" if "gemm" in name or name == "dot" else name] += 1
    return count


def collectives(text: str) -> Counter[str]:
    """How many collectives of each kind a step has."""
    bases = (opcode.removesuffix("-start") for opcode, _, _ in _instructions(text) if not opcode.endswith("-done"))
    return Counter(base for base in bases if base in COLLECTIVES)


def copies(text: str, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Counter[str]:
    """Copies of arrays of these (dtype, local shape): of a weight or of the K/V pool there must be none."""
    wanted = {f"{TYPES[dtype]}[{','.join(map(str, shape))}]" for dtype, shape in shapes}
    found: Counter[str] = Counter()
    for opcode, shape, _ in _instructions(text):
        if opcode in ("copy", "copy-start"):
            found.update(sorted(wanted & set(re.findall(r"\w+\[[\d,]*\]", shape)))[:1])
    return found


def resources(folder: Path) -> tuple[KernelResources, ...]:
    """What was dumped while Pallas kernels were compiled, one line for each kernel that differs."""
    found = {}
    for path in sorted(folder.glob("*.ptxas")):
        said, scratch = path.read_text(), path.with_suffix(".resources.txt")
        if (used := re.search(r"Used (\d+) registers", said)) is None:
            continue
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
        shared = re.search(r"smem_scratch_bytes=(\d+)", scratch.read_text()) if scratch.exists() else None
        name = re.sub(r"_\d+$", "", path.stem)
        kernel = KernelResources(name, int(used[1]), spilled, int(shared[1]) if shared else 0)
        found[kernel] = None
    return tuple(found)
