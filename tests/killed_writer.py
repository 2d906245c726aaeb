"""Kills writers of checkpoints at named points and at random moments, and looks at what each leaves.

    python killed_writer.py plain|orbax DIRECTORY KILLS SEED [POINT ...]

Prints a JSON object; exits 1 with what is wrong. A writer is a fork of this process, which itself never runs JAX.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jaxserve import faults
from jaxserve.finetune.durable import StepStore, newest, write_file

KEEP = 2
SIZE = 20_000


def content(step: int, name: str) -> bytes:
    return f"{step} {name} ".encode() * (SIZE // 10)


def plain_writer(root: str) -> tuple[int, Callable[[int], object]]:
    store, last = StepStore(root, KEEP), newest(root)

    def fill(step: int) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            (path / "sub").mkdir()
            for name in ("a", "sub/b", "sub/c"):
                write_file(path / name, content(step, name))
                faults.hit("ckpt.mid_files")

        return write

    return last.step if last else 0, lambda step: store.save(step, fill(step))


def check_plain(root: str, step: int) -> bool:
    path = Path(root, f"step-{step:010d}")
    return all((path / name).read_bytes() == content(step, name) for name in ("a", "sub/b", "sub/c"))


def orbax_writer(root: str) -> tuple[int, Callable[[int], object]]:
    import numpy as np

    from jaxserve.finetune.checkpoint import CheckpointWriter

    writer, last = CheckpointWriter(root, {"job": "j"}, KEEP), newest(root)
    return last.step if last else 0, lambda step: writer.save(step, {"a": np.full(3000, step)}, {"step": step})


def check_orbax(root: str, step: int) -> bool:
    pid = os.fork()  # JAX may run in forks alone
    if not pid:
        from jaxserve.finetune.checkpoint import load_latest

        found = load_latest(root, expect={"job": "j"})
        right = found is not None and found.meta == {"step": step} and (found.state["a"] == step).all()
        os._exit(0 if right else 1)
    return os.waitpid(pid, 0)[1] == 0


def write_until_killed(root: str, spec: str, acknowledge: int, writer: Callable) -> None:
    faults.arm(spec)
    step, save = writer(root)
    while True:
        step += 1
        save(step)
        os.write(acknowledge, f"{step}\n".encode())


def kill_once(root: str, spec: str, delay: float, writer: Callable) -> int | None:
    """The last step that the writer said was saved."""
    reader, acknowledge = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            write_until_killed(root, spec, acknowledge, writer)
        finally:
            os._exit(1)
    os.close(acknowledge)
    if not spec:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status), f"the writer ended by itself with {status}, {spec=}"
    with os.fdopen(reader, "rb") as file:
        steps = [int(line) for line in file.read().split(b"\n")[:-1]]
    return steps[-1] if steps else None


def main(kind: str, root: str, kills: str, seed: str, *points: str) -> None:
    writer, check = {"plain": (plain_writer, check_plain), "orbax": (orbax_writer, check_orbax)}[kind]
    if kind == "orbax":
        import jaxserve.finetune.checkpoint  # noqa: F401  (once, for all forks)
    rng, promised, lost = random.Random(int(seed)), 0, []
    longest = 0.08 if kind == "plain" else 0.6
    for number in range(int(kills)):
        point = points[number % len(points)] if points else None
        spec = f"{point}=kill@{rng.randint(1, 3)}" if point else ""
        acknowledged = kill_once(root, spec, rng.uniform(0, longest), writer)
        promised = max(promised, acknowledged or 0)
        found = newest(root)
        step = found.step if found else 0
        # at most the one whose acknowledgement the kill cut off
        if not promised <= step <= promised + 1 or (step and not check(root, step)):
            lost.append([number, spec, promised, step])
        promised = step
    store = StepStore(root, KEEP)
    left = sorted(entry.name for entry in Path(root).iterdir())
    store.close()
    print(json.dumps({"steps": promised, "lost": lost, "left": left}))
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
