"""A job whose process is killed, at any moment and at every named point, ends as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_models
from safetensors.numpy import load_file

from jaxserve import faults
from jaxserve.finetune.folder import read_events, read_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = 20
STEPS = 300
POINTS = [*(p for p in faults.POINTS if p.startswith(("ckpt.", "fs."))), "job.before_adapter", "job.after_adapter"]


class Command:
    """One job's command, in a directory of its own; programs are compiled once for all processes."""

    def __init__(self, place: Path, model: Path, data: Path, cache: Path):
        self.root = place
        self.arguments = [
            "finetune", str(model), str(data), "--adapter", "a", "--output-dir", str(place), "--rank", "4",
            "--max-steps", str(STEPS), "--batch-size", "2", "--save-steps", "1", "--dropout", "0.1",
            "--dtype", "float32",
            "--max-model-len", "128", "--finetune-window", "16", "--block-size", "16", "--validation-fraction", "0.2",
            "--eval-steps", "6", "--json",
        ]  # fmt: skip
        self.environment = {
            **os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip

    def start(self, spec: str = "") -> subprocess.Popen:
        helper = Path(__file__).parents[1] / "killed_job.py"
        return subprocess.Popen(
            [sys.executable, str(helper), spec, *self.arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment,
        )  # fmt: skip

    def finish(self) -> None:
        process = self.start()
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said[-3000:]

    def result(self) -> tuple[list, dict[str, bytes]]:
        assert read_job(self.root)["status"] == "succeeded"
        events = read_events(self.root)
        numbers = [
            (e.kind, {key: value for key, value in e.data.items() if "loss" in key or key == "step"})
            for e in events
            if any("loss" in key for key in e.data)
        ]
        arrays = load_file(self.root / "adapter" / "adapter_model.safetensors")  # its header has no order
        return numbers, {name: array.tobytes() for name, array in arrays.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("sigkill")
    model = tiny_models.build(place / "model", "llama")
    words = ["hello there", "the sea and the bear", "on and on", "a tale", "in the end", "no more", "well", "so it is"]
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": w, "completion": " " + w[::-1] * 3}) + "\n" for w in words))
    commands = {
        name: Command(place / name, model, data, place / "cache") for name in ("undisturbed", "moments", "points")
    }
    commands["undisturbed"].finish()
    return commands


def tells(line: str, saved: int) -> bool:
    """Whether this line of a process's output tells of a checkpoint of step ``saved`` or later; 0: of any step."""
    wanted = '"kind": "checkpoint"' if saved else '"gradient_norm"'
    return wanted in line and json.loads(line)["data"]["step"] >= saved


def test_kills_at_random_moments_change_nothing(made):
    """Spread over the job, however fast its steps and its disk are: before each kill a little more of it is saved."""
    command, rng, done, saved = made["moments"], random.Random(5), 0, 0
    for kill in range(1, KILLS + 1):
        process = command.start()
        assert process.stdout is not None
        early = rng.random() < 0.25  # while it loads and compiles
        timer = threading.Timer(rng.uniform(0.5, 8.0) if early else 600, process.kill)
        timer.start()
        wanted = kill * STEPS // (2 * KILLS)
        for line in process.stdout:
            if tells(line, wanted if wanted > saved else 0):
                break
        time.sleep(rng.uniform(0, 0.1))  # some time into the next steps and checkpoints
        timer.cancel()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        killed = process.returncode == -signal.SIGKILL
        done += killed
        if not killed:  # it was over already
            break
        saved = max((int(path.name.split("-")[1]) for path in command.root.glob("checkpoints/step-*")), default=0)
    assert done >= KILLS - 5
    assert saved > STEPS // 3  # not all of them at the start
    command.finish()
    assert command.result() == made["undisturbed"].result()


def test_kills_at_every_named_point_change_nothing(made):
    command, rng = made["points"], random.Random(6)
    for point in POINTS:
        count = 1 if point.startswith("job.") else rng.randint(1, 2)
        process = command.start(f"{point}=kill@{count}")
        said, _ = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, f"{point} was not reached: {said[-3000:]}"
    command.finish()
    assert command.result() == made["undisturbed"].result()
