"""``jaxserve finetune``: one job, alone on an engine, with checkpoints; the same command goes on after a kill."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.bench.engine import NO_MODEL, load_engine, room_alone, tokenizer_of
from jaxserve.cli.coserve import Planned, begun, check_adapters, check_data, close, job_state, plan
from jaxserve.cli.progress import Progress, make_progress
from jaxserve.cli.stopping import Stopping
from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.finetune.control import Controls
from jaxserve.finetune.folder import ADAPTER
from jaxserve.finetune.job import TERMINAL

if TYPE_CHECKING:
    from jaxserve import Engine, FinetuneJob

IDLE_SECONDS = 0.1


def main(config: Config, json_lines: bool) -> int:
    """Runs the job; 0 where it succeeded, 1 where it failed or was cancelled, 128 + the number of a signal."""
    job, root = check(config)
    progress = make_progress(json_lines, config.coserve.progress_seconds)
    with progress.stage("compiling the step's shapes"):
        engine = make_engine(config, job)
    with progress.stage("preparing the job"):
        handle = engine.finetune(job.data, job.adapter, job.config)
    with Stopping() as stopping:
        speed = train(engine, handle, root, progress, stopping)
    close(engine, {job.adapter: handle}, progress)
    result = {**job_state(job.adapter, handle), **speed, "id": handle.id, "error": handle.error, "output_dir": root}
    progress.finish(result, summary(result))
    return stopping.status or int(handle.status != "succeeded")


def check(config: Config) -> tuple[Planned, str]:
    """The job and its directory; refuses what cannot be run before a model is loaded."""
    root = config.job.output_dir
    missing = {
        NO_MODEL: config.model.path,
        "DATA: name a JSONL file, or set job.data": config.job.data,
        "--adapter: name the adapter, or set job.adapter": config.job.adapter,
        "--output-dir: name a directory for checkpoints and the adapter, or set job.output_dir": root,
    }
    wrong = [text for text, value in missing.items() if value is None]
    if not config.lora.enable_lora:
        wrong.append("lora.enable_lora is off; an adapter is trained where adapters are served")
    if wrong or config.job.adapter is None or config.job.data is None or root is None:
        raise ConfigError(wrong)
    job = plan(config, config.job.adapter, config.job.data, {}, own_dir=False)
    check_data(job, tokenizer_of(config))
    check_adapters(config, [job], _room(config, job))
    return job, root


def make_engine(config: Config, job: Planned) -> "Engine":
    """An engine for one job, as small as the user left open: few shapes are compiled."""
    return load_engine(config, _room(config, job), [job.config])


def _room(config: Config, job: Planned) -> dict[str, Any]:
    return room_alone(config, job.config.rank if job.config.start == "init" else None)


def train(engine: "Engine", job: "FinetuneJob", root: str, progress: Progress, stopped: Stopping) -> dict[str, Any]:
    """Steps until the job is over or a signal comes; returns how fast it went."""
    controls, told, start, before = Controls({root: job}), begun(job), time.monotonic(), job.trained_tokens
    while job.status not in TERMINAL and not stopped():
        if engine.has_work():
            engine.step()
        else:  # paused
            time.sleep(IDLE_SECONDS)
        for line in controls.poll():
            progress.say(line)
        for event in job.events(told):
            told = event.number
            progress.event(job.adapter, event)
        if progress.due():
            progress.update(state(job, start, before))
    progress.update(end := state(job, start, before))
    for event in job.events(told):
        progress.event(job.adapter, event)
    return {"seconds": end["at"], "tokens_per_s": end["finetune_tokens_per_s"]}


def state(job: "FinetuneJob", start: float, before: int) -> dict[str, Any]:
    """How the job goes, for the display."""
    seconds = time.monotonic() - start
    return {
        "at": seconds,
        "requests": 0,
        "done": 0,
        "attainment": None,
        "output_tokens_per_s": 0.0,
        "finetune_tokens_per_s": (job.trained_tokens - before) / max(seconds, 1e-6),
        "jobs": [job_state(job.adapter, job)],
    }


def summary(result: dict[str, Any]) -> str:
    loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
    if result["validation_loss"] is not None:
        loss += f", validation loss {result['validation_loss']:.4f}"
    text = (
        f"{result['adapter']}: {result['status']}, step {result['step']}/{result['total_steps']}{loss}, "
        f"{result['tokens_per_s']:.0f} trained tokens/s"
    )
    if result["status"] == "succeeded":
        return f"{text}\nadapter: {Path(result['output_dir']) / ADAPTER}"
    if result["status"] in ("paused", "queued", "running"):
        return f"{text}\nthe same command goes on from the newest checkpoint in {result['output_dir']}"
    return text + (f": {result['error']}" if result["error"] else "")
