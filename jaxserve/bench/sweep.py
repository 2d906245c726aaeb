"""``jaxserve bench coserve``: the same requests under several ways to share devices with finetuning, at several rates.

On the engine here, or with ``--simulate`` on a named device by the virtual clock: the same scheduling code.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.assets import locate
from jaxserve.bench.arrivals import rows_at
from jaxserve.bench.engine import NO_MODEL, tokenizer_of
from jaxserve.bench.load import Bursts, check_prompts, unknown_answers
from jaxserve.bench.parallel import Pool, calls_of, work_of
from jaxserve.bench.policies import ALONE, REQUESTS, Backend, Runs, claims, numbers, shares_one_engine
from jaxserve.bench.ran import write_tables
from jaxserve.bench.report import objectives
from jaxserve.bench.serving import (
    NOT_SAMPLED,
    check_result_file,
    check_results_dir,
    circumstances_of,
    goodput_of,
    unused,
    write_config,
    write_result,
    writing_results,
)
from jaxserve.bench.simulator import endless_jobs
from jaxserve.bench.sweep_page import REPORT, report
from jaxserve.bench.virtual import Virtual, unsimulated
from jaxserve.config import Config
from jaxserve.errors import ConfigError, JaxServeError
from jaxserve.finetune.data import check_file
from jaxserve.finetune.errors import DataError
from jaxserve.interrupts import sigterm_interrupts
from jaxserve.metrics import percent

MOST_REQUESTS = 10**7  # of a run
UNUSED = {
    "coserve.results_dir": "the sweep's results go to sweep.results_dir (--sweep-dir)",
    "bench.request_rate": "the sweep has its rates in sweep.rates",
    "bench.num_prompts": "sweep.rates and sweep.seconds say how many requests there are",
    "bench.trace_speed": "a trace is brought to each of sweep.rates",
    **dict.fromkeys(
        (
            "bench.max_concurrency", "bench.against", "bench.repeats", "bench.num_adapters", "bench.adapter_rank",
            "bench.adapter_targets", "bench.save_detailed",
        ),
        "bench coserve has no use for it",
    ),
    **dict.fromkeys(("job.adapter", "job.data"), "the sweep's jobs are in coserve.jobs (--finetune-jobs)"),
    **dict.fromkeys(
        (
            "job.epochs", "job.max_steps", "job.schedule", "job.warmup_steps", "job.warmup_ratio",
            "job.validation_fraction", "job.validation_data", "job.eval_steps", "job.output_dir",
        ),
        "the sweep's jobs go on at one learning rate until a run ends, and keep nothing",
    ),
}  # fmt: skip

NOT_MEASURED = {
    "sweep.replicas": "the engine here is one; sweep.simulate has more",
    "sweep.processes": "only simulated runs are made side by side",
    "sweep.matmul_efficiency": "only a simulated device has one",
}


def main(config: Config) -> int:
    """Runs the sweep that ``config`` describes, prints it and writes it down; 0, or 1 where a request failed."""
    check(config)
    check_rates(config)
    backend, start = make_backend(config), time.perf_counter()
    said, goals = preface(config, backend), goals_of(config)
    print("\n".join(said))
    found, ended = list[dict[str, Any]](), None
    with Pool(config.sweep.processes) as pool:
        runs = Runs(pool.backend(backend, cells_of(config)) if isinstance(backend, Virtual) else backend)
        try:
            with sigterm_interrupts():
                for cell in told(runs, config, goals):
                    found.append(cell)
        except (KeyboardInterrupt, SystemExit, JaxServeError) as error:
            pool.stop()
            if not found:
                raise
            ended = error  # what was measured so far may have taken an hour
    if ended is not None:
        said.append(f"Ended early: {len(found)} of {len(cells_of(config))} cells were run.")
        print(said[-1])
    if isinstance(backend, Virtual):
        print(work_of(runs, pool.processes, time.perf_counter() - start))
    failed = failure_lines(found)
    said += failed
    result = {
        **circumstances_of(config),
        "simulated": None if config.sweep.simulate == "none" else config.sweep.simulate,
        "preface": said,
        "objectives_ms": {name: goal * 1000 for name, goal in goals.items()},
        "cells": found,
        "claims": claims(found),
        "agreement": agreements(backend, runs, found, goals),
    }
    claimed, agreed = claim_lines(result["claims"]), agreement_lines(result["agreement"])
    print("\n".join([*failed, *clip_lines(found), *claimed, *agreed]))
    with writing_results():
        write_result(config, result)
        if config.sweep.results_dir is not None:
            leave(config, Path(config.sweep.results_dir), runs, result)
    if ended is not None:
        raise ended
    return int(bool(failed))


def check(config: Config, not_used: Mapping[str, str] = UNUSED) -> None:
    """Raises ConfigError, DataError or ModelError for what cannot be run, before the model is loaded.

    Args:
      not_used: keys that must not be given, as for ``serving.unused``.
    """
    check_result_file(config)
    check_results_dir("sweep.results_dir", config.sweep.results_dir)
    wrong, sweep = unused(config, {**NOT_SAMPLED, **not_used}), config.sweep
    if not config.coserve.jobs:
        wrong += unused(config, {"job.batch_size": "that of made-up examples is bench.finetune_batch"})
    for job in config.coserve.jobs:
        useless = [key for key in job.settings if f"job.{key}" in not_used]
        wrong += [f"job of adapter {job.adapter!r}: {key}: {not_used[f'job.{key}']}" for key in useless]
    wrong += unknown_answers(config, [job.adapter for job in config.coserve.jobs])
    if config.model.path is None:
        wrong.append(NO_MODEL)
    if not goals_of(config):
        wrong.append(
            "finetune.tpot_objective_ms, finetune.ttft_objective_ms: set one at least; attainment is about them"
        )
    wrong += unused(config, NOT_MEASURED) if sweep.simulate == "none" else unsimulated(config)
    if not config.lora.enable_lora:
        wrong.append("lora.enable_lora is off: nothing can be finetuned")
    if wrong:
        raise ConfigError(wrong)
    jobs = config.coserve.jobs if sweep.simulate == "none" else ()
    tokenizer = tokenizer_of(config) if jobs else None
    for job in jobs:
        try:
            check_file(locate(job.data), tokenizer, endless_jobs(config)[job.adapter])
        except DataError as error:
            raise error.within(f"job of adapter {job.adapter!r}") from None
    check_prompts(config)


def check_rates(config: Config) -> None:
    """Raises ConfigError for a rate of any cell's runs at which there are no requests, or more than can be kept."""
    replicas, seconds, bursts = config.sweep.replicas, config.sweep.seconds, Bursts.of(config)
    for rate in dict.fromkeys(rate for _, rate in calls_of(cells_of(config)) if rate):
        if rate * replicas * seconds * bursts.gain > MOST_REQUESTS:
            said = f"{rate:g} on each of {replicas} replicas for {seconds:g} s"
            raise ConfigError([f"sweep.rates: {said} are more than {MOST_REQUESTS:,} requests"])
        rows_at(config, rate * replicas, seconds)


def goals_of(config: Config) -> dict[str, float]:
    """Objectives in seconds."""
    return objectives(goodput_of(config))


def make_backend(config: Config) -> Backend:
    if config.sweep.simulate != "none":
        return Virtual.of(config)
    from jaxserve.bench.live import Live

    return Live(config)


def preface(config: Config, backend: Backend) -> list[str]:
    """What is run, in words."""
    _, source = rows_at(config, config.sweep.rates[0] * config.sweep.replicas, config.sweep.seconds)
    load = f"load of {config.sweep.replicas} replicas together" if config.sweep.replicas > 1 else "load"
    goals = " and ".join(f"{name.upper()} <= {goal * 1000:g} ms" for name, goal in goals_of(config).items())
    about = backend.assumptions() if isinstance(backend, Virtual) else ["Measured on the engine here."]
    return [
        f"model {config.model.path}; {load}, at the first rate: {source}",
        f"runs of {config.sweep.seconds:g} s; a finetune token counts when its backward is done, a request when it had "
        f"{goals}; tokens/s and requests/s are per replica",
        *about,
    ]


def told(runs: Runs, config: Config, goals: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Every cell, each printed when it is there."""
    sweep, alone = config.sweep, None
    print(HEADER, flush=True)
    if ALONE in sweep.policies:
        alone = runs.cell(ALONE, sweep.rates[0]).finetune_rate
    for policy, rate in cells_of(config):
        found = numbers(runs.cell(policy, rate), goals, alone)
        print(line(found), flush=True)
        yield found


def cells_of(config: Config) -> list[tuple[str, float]]:
    """(policy, rate) of every cell, in the order of the table."""
    return [(policy, rate) for rate in config.sweep.rates for policy in config.sweep.policies]


# text

HEADER = (
    f"{'req/s':>6} {'policy':<17}{'finetune':>9} {'kept':>5} {'SLO met':>8} {'TTFT p99':>9} {'TPOT':>6} {'p99':>6} "
    f"{'ITL p99':>8} {'goodput':>8} {'KV':>5} {'out':>4} {'error':>6}\n"
    f"{'':>6} {'':<17}{'tokens/s':>9} {'':>5} {'':>8} {'ms':>9} {'ms':>6} {'ms':>6} {'ms':>8} {'req/s':>8} "
    f"{'':>5} {'':>4} {'p90':>6}"
)


def line(cell: Mapping[str, Any]) -> str:
    """One row of the table; ``out``: requests that were preempted and finetune sequences that gave way."""

    def ms(name: str, kind: str) -> str:
        values = cell.get(f"{name}_ms")
        return f"{values[kind]:.1f}" if values else "-"

    goodput, usage = cell.get("goodput"), cell.get("kv_usage_mean")
    return (
        f"{cell['rate']:>6g} {cell['policy']:<17}{cell['finetune_tokens_per_s']:>9.0f} "
        f"{percent(cell['finetuning_kept'], 0):>5} {percent(cell.get('attainment')):>8} {ms('ttft', 'p99'):>9} "
        f"{ms('tpot', 'mean'):>6} {ms('tpot', 'p99'):>6} {ms('itl', 'p99'):>8} "
        f"{'-' if goodput is None else f'{goodput:.2f}':>8} {percent(usage, 0):>5} "
        f"{cell['preemptions'] + cell['evictions']:>4} {percent(cell.get('prediction_error_p90')):>6}"
    )


def failure_lines(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why requests failed, which counts as missed objectives; a line for each run and reason."""
    return [
        f"{run}: {line} (of {cell['requests']} requests)"
        for run, cell in {cell["serving_run"]: cell for cell in cells if cell["serving_run"]}.items()
        for line in cell["failures"]
    ]


def clip_lines(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where requests did not fit the model; a line for each rate, whose ways to share have the same requests."""
    first = {cell["rate"]: cell for cell in reversed(cells) if cell["clipped"]}
    return [
        f"at {rate:g} requests/s {cell['clipped']} of {cell['requests']} requests were clipped to the model's length"
        for rate, cell in sorted(first.items())
    ]


def claim_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for claim in found:
        times, other = claim["times_best_other"], claim["best_other"]
        ours, tokens = claim["coserve_policy"], claim["coserve_tokens_per_s"]
        text = f"at {claim['rate']:g} requests/s {ours} finetunes {tokens:.0f} tokens/s"
        if times is not None:
            text += f", {times:.2f} times the best other way that meets the objectives ({other})"
        elif other is None:
            text += "; no other way meets the objectives" if claim["others"] else "; no other way was run"
        if not claim["requests_alone_meet"]:
            text += (
                "; requests alone were not run"
                if claim["requests_alone_meet"] is None
                else "; requests alone miss them"
            )
        lines.append(f"{text}; {claim['coserve_attainment'] or 0:.1%} of its requests met the objectives")
    return lines


def agreements(
    backend: Backend, runs: Runs, cells: Sequence[Mapping[str, Any]], goals: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The engine's runs beside the simulator's of the same load; none where all is simulated."""
    if isinstance(backend, Virtual):
        return []
    from jaxserve.bench.live import Live, agreement

    assert isinstance(backend, Live)
    found = []
    for policy, rate in ((cell["policy"], cell["rate"]) for cell in cells):
        if not shares_one_engine(policy) or policy == ALONE:
            continue
        measured = runs.cell(policy, rate).serving
        if measured is not None and (backend.datasets or policy == REQUESTS):
            found.append(agreement(measured, backend.predict(policy, rate), goals))
    return found


def agreement_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["the simulator on this engine's step times says:"] if found else []
    for each in found:
        error = each["finetune_error"]
        off = "" if error is None else f" ({error:+.1%})"
        lines.append(
            f"  {each['run']:<24} finetuning {each['simulated_finetune_tokens_per_s']:.0f} tokens/s, measured "
            f"{each['measured_finetune_tokens_per_s']:.0f}{off}; SLO met {each['simulated_attainment'] or 0:.1%}, "
            f"measured {each['measured_attainment'] or 0:.1%}"
        )
    return lines


def leave(config: Config, place: Path, runs: Runs, result: Mapping[str, Any]) -> None:
    """Writes report.html, results.json, requests.csv, steps.csv and the configuration."""
    place.mkdir(parents=True, exist_ok=True)
    made = list(runs)
    (place / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_config(config, place)
    page = report(result, made, Bursts.of(config).spans(config.sweep.seconds))
    (place / REPORT).write_text(page, encoding="utf-8")
    write_tables(place, made)  # the longest: a disk that is full may have taken the others
    print(f"report: {place / REPORT}")
