"""``jaxserve coserve``: requests are served while jobs are finetuned, by one engine in one process."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxserve.assets import locate
from jaxserve.bench.coserve_numbers import Answer, Coserved, numbers, recent, so_far, text_block
from jaxserve.bench.coserve_page import REPORT, write
from jaxserve.bench.engine import NO_MODEL, load_engine, model_path, options_of, room_for, tokenizer_of
from jaxserve.bench.load import BASE, Bursts, check_prompts, make_load, unknown_answers
from jaxserve.bench.replay import Replay
from jaxserve.bench.serving import (
    NOT_SAMPLED,
    check_result_file,
    check_results_dir,
    circumstances,
    goodput_of,
    not_timed,
    rows_of,
    run_load,
    sampling,
    trace_rows,
    unused,
    warm_up_load,
    write_config,
    write_result,
)
from jaxserve.bench.workload import Workload
from jaxserve.cli.progress import Progress, make_progress
from jaxserve.cli.stopping import Stopping
from jaxserve.config import Config
from jaxserve.errors import AdapterNotFound, ConfigError
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.control import Controls
from jaxserve.finetune.data import check_file
from jaxserve.finetune.errors import CheckpointError, DataError
from jaxserve.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxserve import Engine, FinetuneJob
    from jaxserve.tokenizer import Tokenizer

ANSWER_TOKENS = 40
RECENT_SECONDS = 2.0  # what "tokens/s" of the display looks back on
UNUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "bench.against", "bench.repeats", "bench.num_adapters", "bench.adapter_rank", "bench.adapter_targets",
            "bench.save_detailed",
        ),
        "jaxserve coserve has no use for it",
    ),
    **dict.fromkeys(("job.adapter", "job.data"), "the jobs are in coserve.jobs (--finetune-jobs)"),
}  # fmt: skip


class Planned(NamedTuple):
    """A job to be run."""

    adapter: str
    data: str
    config: FinetuneConfig


def main(config: Config, json_lines: bool) -> int:
    """Runs it; 0, 1 where a request or a job did not succeed, 128 + the number of a signal that ended it."""
    return run(config, json_lines, "Co-serving: requests and finetuning in the same steps")


def run(config: Config, json_lines: bool, title: str, prompts: Sequence[str] = ()) -> int:
    """The same; in the end the base model and each adapter answer ``prompts``."""
    jobs = check(config)
    progress = make_progress(json_lines, config.coserve.progress_seconds)
    with progress.stage("compiling the step's shapes"):
        engine = make_engine(config, jobs)
    workload, bursts = requests_of(config, engine, [job.adapter for job in jobs])
    progress.say(f"load: {workload.source}; {workload.num_clipped} of {len(workload.requests)} clipped")
    run_load(config, engine, warm_up_load(workload.on_adapters(()), engine.config.max_num_seqs))
    with progress.stage("preparing the jobs"):
        handles = start(engine, jobs)
    with Stopping() as stopping:
        done = coserve(config, engine, workload, handles, directories(jobs), bursts, progress, stopping)
    if prompts and not stopping():
        done = replace(done, answers=answer(engine, prompts, [job.adapter for job in jobs]))
    close(engine, handles, progress)
    result = numbers(done)
    text, failed = text_block(result), result["requests"]["failed"] > 0
    failed |= any(job.status != "succeeded" for job in handles.values())
    try:
        leave(config, done, result, title)
    except (OSError, CheckpointError) as error:
        progress.say(f"error: not all results were written: {error}")
        failed = True
    else:
        if config.coserve.results_dir is not None:
            text += f"\nreport: {Path(config.coserve.results_dir) / REPORT}"
    progress.finish(result, text)
    return stopping.status or int(failed)


def answer(engine: "Engine", prompts: Sequence[str], adapters: Sequence[str]) -> list[Answer]:
    """Greedy answers of the base model and of each adapter as it is now."""
    assert engine.tokenizer is not None, "there are prompts to be rendered"
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
    chats = [engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    texts = {
        name or BASE: [output.outputs[0].text.strip() for output in engine.generate(chats, params, adapter=name)]
        for name in (None, *adapters)
    }
    return [Answer(prompt=p, texts={name: each[i] for name, each in texts.items()}) for i, p in enumerate(prompts)]


def check(config: Config) -> list[Planned]:
    """The jobs; refuses what cannot be run before a model is loaded."""
    check_result_file(config)
    check_results_dir("coserve.results_dir", config.coserve.results_dir)
    wrong = unused(config, {**UNUSED, **NOT_SAMPLED, **not_timed(config)})
    if config.model.path is None:
        wrong.append(NO_MODEL)
    if not config.lora.enable_lora and config.coserve.jobs:
        wrong.append("coserve.jobs: lora.enable_lora is off")
    jobs = []
    if any(entry.adapter == BASE for entry in config.coserve.jobs):
        wrong.append(f"coserve.jobs: {BASE!r} is the base model, not an adapter")
    for entry in config.coserve.jobs:
        try:
            jobs.append(plan(config, entry.adapter, entry.data, entry.settings))
        except ConfigError as error:
            wrong += [f"job of adapter {entry.adapter!r}: {line}" for line in error.errors]
    wrong += unknown_answers(config, [job.adapter for job in jobs])
    roots = [Path(root).resolve() for root in directories(jobs).values()]
    shared = {root for root in roots if roots.count(root) > 1}
    wrong += [f"coserve.jobs: {root} is the output_dir of two jobs" for root in sorted(shared)]
    if wrong:
        raise ConfigError(wrong)
    tokenizer = tokenizer_of(config) if jobs else None
    for job in jobs:
        try:
            check_data(job, tokenizer)
        except DataError as error:
            raise error.within(f"job of adapter {job.adapter!r}") from None
    if config.bench.trace is not None:
        trace_rows(config)
    check_prompts(config)
    check_adapters(config, jobs, room_for(config, [job.config for job in jobs]))
    return jobs


def check_data(job: Planned, tokenizer: "Tokenizer | None") -> None:
    """Raises DataError for files that no such model could be trained on: an error of typing should not cost a
    compilation."""
    check_file(job.data, tokenizer, job.config)
    if job.config.validation_data is not None:
        try:
            check_file(job.config.validation_data, tokenizer, job.config)
        except DataError as error:
            raise error.within("validation_data") from None


def check_adapters(config: Config, jobs: Sequence[Planned], room: Mapping[str, Any]) -> None:
    """Raises AdapterError or InvalidRequest for adapters that the engine, with this room, could not train or name, and
    CheckpointError for directories that their jobs could not have."""
    from jaxserve.adapters.store import check_name
    from jaxserve.finetuning import check_folder, check_start
    from jaxserve.models.loader import load_config

    path = model_path(config)
    model, limit = load_config(path), options_of(config, room)["max_lora_rank"]
    for job in jobs:
        check_name(job.adapter, [Path(path).resolve().name])
        check_start(job.config, model, limit, [module.name for module in config.lora.modules])
    for job in jobs:
        check_folder(job.config, job.adapter)


def plan(config: Config, adapter: str, data: str, settings: Mapping[str, Any], own_dir: bool = True) -> Planned:
    """Section job with these settings in it.

    Args:
      own_dir: the adapter's directory is a part of output_dir, which other jobs share.
    """
    fields = {name: getattr(config.job, name) for name in FinetuneConfig.model_fields}
    if own_dir and fields["output_dir"] is not None:
        fields["output_dir"] = str(Path(fields["output_dir"]) / adapter)
    fields |= settings
    if fields["validation_data"] is not None:
        fields["validation_data"] = locate(fields["validation_data"])
    return Planned(adapter, locate(data), FinetuneConfig(**fields))


def make_engine(config: Config, jobs: Sequence[Planned]) -> "Engine":
    """The engine with its adapters, and with room for the jobs where the user left that open."""
    settings = [job.config for job in jobs]
    return load_engine(config, room_for(config, settings), settings)


def start(engine: "Engine", jobs: Sequence[Planned]) -> "dict[str, FinetuneJob]":
    """Queues the jobs; nothing of them runs before the engine steps."""
    return {job.adapter: _start(engine, job) for job in jobs}


def _start(engine: "Engine", job: Planned) -> "FinetuneJob":
    try:
        return engine.finetune(job.data, job.adapter, job.config)
    except DataError as error:
        raise error.within(f"job of adapter {job.adapter!r}") from None


def directories(jobs: Sequence[Planned]) -> dict[str, str]:
    """Adapter to the directory of its job, where it has one."""
    return {job.adapter: job.config.output_dir for job in jobs if job.config.output_dir is not None}


def requests_of(config: Config, engine: "Engine", trained: Sequence[str]) -> tuple[Workload, list[tuple[float, float]]]:
    """The requests, each for an adapter, and the (start, end) of bursts among them."""
    bursts, (rows, source) = Bursts.of(config), rows_of(config)
    rows = bursts.squeeze(rows)
    load = make_load(
        config,
        rows,
        f"{source}, {bursts}" if bursts.factor > 1 else source,
        config.coserve.answer_with or (BASE, *(module.name for module in config.lora.modules), *trained),
        vocab_size=engine.model.vocab_size,
        max_model_len=engine.core.config.max_model_len,
        tokenizer=engine.tokenizer,
    )
    return load, bursts.spans(rows[-1].arrival_s)


def coserve(
    config: Config,
    engine: "Engine",
    workload: Workload,
    jobs: "Mapping[str, FinetuneJob]",
    directories: Mapping[str, str],
    bursts: Sequence[tuple[float, float]],
    progress: Progress,
    stopped: Stopping,
) -> Coserved:
    """The run itself, until requests and jobs are over or a signal comes."""
    goodput = goodput_of(config)
    controls = Controls({root: jobs[name] for name, root in directories.items()})
    told = {adapter: begun(job) for adapter, job in jobs.items()}

    def look_around(replay: Replay) -> None:
        for line in controls.poll():
            progress.say(line)
        for adapter, job in jobs.items():
            for event in job.events(told[adapter]):
                told[adapter] = event.number
                progress.event(adapter, event)
        if progress.due():
            progress.update(state(replay, goodput))

    replay = Replay(
        engine,
        workload,
        jobs,
        sampling(config),
        max_concurrency=config.bench.max_concurrency,
        stopped=stopped,
        each_turn=look_around,
    )
    run = replay()
    progress.update(state(replay, goodput))
    return Coserved(
        run=run,
        jobs=jobs,
        goodput=goodput,
        bursts=bursts,
        source=workload.source,
        circumstances=circumstances(config, workload),
    )


def begun(job: "FinetuneJob") -> int:
    """The number before the event that announced a job just made; a resumed one has a history before it."""
    return next(event.number for event in reversed(job.events()) if event.kind == "status") - 1


def state(replay: Replay, goodput: Sequence[str]) -> dict[str, Any]:
    """How a run goes, for the display."""
    stats = replay.engine.stats()
    return {
        "at": replay.now,
        "requests": len(replay.workload.requests),
        "sent": len(replay.run.requests),
        "running": stats["running"],
        "waiting": stats["waiting"],
        **so_far(replay.run, goodput),
        **recent(replay.run, RECENT_SECONDS, replay.now),
        "jobs": [job_state(adapter, job) for adapter, job in replay.jobs.items()],
    }


def job_state(adapter: str, job: "FinetuneJob") -> dict[str, Any]:
    losses, validation = job.losses, job.validation_losses
    return {
        "adapter": adapter,
        "status": job.status,
        "step": job.step,
        "total_steps": job.total_steps,
        "loss": losses[-1] if losses else None,
        "validation_loss": validation[-1][1] if validation else None,
    }


def close(engine: "Engine", jobs: "Mapping[str, FinetuneJob]", progress: Progress) -> None:
    """Saves jobs that are not over where they have a directory, and shows what the disk says to that."""
    told = {adapter: len(job.events()) - 1 for adapter, job in jobs.items()}
    engine.close()
    for adapter, job in jobs.items():
        for event in job.events(told[adapter]):
            progress.event(adapter, event)


def leave(config: Config, done: Coserved, found: Mapping[str, Any], title: str) -> None:
    """Writes what the run leaves behind."""
    write_result(config, {**(done.circumstances or {}), **found})
    if config.coserve.results_dir is None:
        return
    place = Path(config.coserve.results_dir)
    write(place, done, found, title)
    write_config(config, place)
    for adapter, job in done.jobs.items():
        if job.step > 0 and job.status != "failed":
            with suppress(AdapterNotFound):  # cancelled before it had a lane: nothing was learnt here
                job.save(place / "adapters" / adapter)
