"""What a co-serving run comes to: numbers, a block of text for a terminal, and two tables as CSV."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.bench.load import BASE
from jaxserve.bench.replay import Mix, MixedRun, MixedStep, ServedRequest
from jaxserve.bench.report import in_ms, is_good, metrics, objectives, share_met

if TYPE_CHECKING:
    from jaxserve import FinetuneJob

WIDTH = 66


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The same prompt, answered by the base model and by each adapter."""

    prompt: str
    texts: Mapping[str, str]  # by adapter, base among them


@dataclass(frozen=True, kw_only=True)
class Coserved:
    """A run, and what belongs to it."""

    run: MixedRun
    jobs: "Mapping[str, FinetuneJob]"
    goodput: Sequence[str] = ()  # objectives, as ttft:500
    bursts: Sequence[tuple[float, float]] = ()  # (start, end) in s of the run
    source: str = ""  # of the requests, in words
    answers: Sequence[Answer] = ()
    circumstances: Mapping[str, Any] | None = None  # machine, versions, settings


# numbers


def numbers(done: Coserved) -> dict[str, Any]:
    """Everything as JSON: latencies in ms, times in s."""
    run = done.run
    return {
        "duration": run.duration,
        "source": done.source,
        "requests": metrics(replace(run, duration=run.served_until or run.duration), done.goodput),
        "slo": attainment(run.served, done.goodput),
        "finetune": _finetune(run, done.jobs),
        "jobs": [_job(adapter, job, run) for adapter, job in done.jobs.items()],
        "tokens": {kind: sum(getattr(step.mix, kind) for step in run.mixed) for kind in Mix._fields},
        "bursts": _by_burst(done),
        "answers": [asdict(answer) for answer in done.answers],
    }


def attainment(requests: Sequence[ServedRequest], goodput: Sequence[str]) -> dict[str, Any]:
    """Shares of the requests that met each objective, and all of them; one that failed met none."""
    goals = objectives(goodput)
    shares = {name: share_met(requests, {name: goal}) for name, goal in goals.items()}
    return {
        "objectives_ms": {name: goal * 1000 for name, goal in goals.items()},
        "attainment": share_met(requests, goals) if goals else None,
        "by_objective": shares,
    }


def _finetune(run: MixedRun, jobs: "Mapping[str, FinetuneJob]") -> dict[str, Any]:
    seconds = run.trained_until
    return {
        "tokens": run.finetune_tokens,
        "seconds": seconds,
        "tokens_per_s": run.finetune_tokens / seconds if seconds else 0.0,
        "trained_tokens": sum(job.trained_tokens for job in jobs.values()),  # those that have a weight in the loss
    }


def _job(adapter: str, job: "FinetuneJob", run: MixedRun) -> dict[str, Any]:
    losses, validation = [step.loss for step in run.learnt[adapter]], job.validation_losses
    return {
        "adapter": adapter,
        "id": job.id,
        "status": job.status,
        "error": job.error,
        "steps": job.step,
        "total_steps": job.total_steps,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "first_validation_loss": validation[0][1] if validation else None,
        "last_validation_loss": validation[-1][1] if validation else None,
        "validation_losses": validation,
        "trained_tokens": job.trained_tokens,
    }


def _by_burst(done: Coserved) -> dict[str, Any]:
    """Requests that came in a burst and between them, and how fast jobs went on meanwhile."""
    run, found = done.run, {}
    end = run.trained_until
    inside = sum(max(0.0, min(stop, end) - start) for start, stop in done.bursts)
    for name, wanted, seconds in (("in_bursts", True, inside), ("between", False, end - inside)):
        requests = [r for r in run.served if _in_burst(r.start, done.bursts) is wanted]
        tokens = sum(s.mix.backward for s in run.mixed if _in_burst(s.at, done.bursts) is wanted)
        found[name] = {
            "requests": len(requests),
            "attainment": attainment(requests, done.goodput)["attainment"],
            "finetune_tokens_per_s": tokens / seconds if seconds > 0 else None,
        }
    return found if done.bursts else {}


def _in_burst(time: float, bursts: Sequence[tuple[float, float]]) -> bool:
    return any(start <= time < end for start, end in bursts)


# text


def text_block(found: Mapping[str, Any]) -> str:
    """The summary for a terminal."""
    served, slo, tuned = found["requests"], found["slo"], found["finetune"]
    lines = [" Co-serving ".center(WIDTH, "=")]
    lines += [f"requests        {served['completed']} done, {served['failed']} failed, {found['duration']:.1f} s"]
    lines += [f"output          {served['output_throughput']:.0f} tokens/s"]
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL")):
        kinds = ", ".join(f"{kind} {ms(served[f'{kind}_{name}_ms'], 1)}" for kind in ("mean", "median", "p99"))
        lines.append(f"{label:<15} {kinds} ms")
    if slo["attainment"] is not None:
        goals = " and ".join(f"{name.upper()} <= {goal:g} ms" for name, goal in slo["objectives_ms"].items())
        lines.append(f"SLO             {slo['attainment']:.1%} of requests had {goals}")
    if found["jobs"]:
        lines.append(f"finetuning      {tuned['tokens_per_s']:.0f} tokens/s, {tuned['tokens']} tokens in all")
    lines += [_burst_line(name, part, bool(found["jobs"])) for name, part in found["bursts"].items()]
    lines += [_job_line(job) for job in found["jobs"]]
    lines.append(f"compilations    {served['recompiles']} after the start")
    for given in found["answers"]:
        lines += [given["prompt"].center(WIDTH, "-"), *(f"{name:<15} {text}" for name, text in given["texts"].items())]
    return "\n".join([*lines, "=" * WIDTH])


def ms(value: float | None, digits: int) -> str:
    """A latency that no request may have, as TPOT where all ask for one token."""
    return "-" if value is None else f"{value:.{digits}f}"


def _burst_line(name: str, part: Mapping[str, Any], jobs: bool) -> str:
    kept = "" if part["attainment"] is None else f", SLO {part['attainment']:.1%}"
    speed = part["finetune_tokens_per_s"]
    tuned = "" if speed is None or not jobs else f", finetuning {speed:.0f} tokens/s"
    return f"  {name.replace('_', ' '):<13} {part['requests']} requests{kept}{tuned}"


def _job_line(job: Mapping[str, Any]) -> str:
    text = f"{job['adapter']:<15} {job['status']} {job['steps']}/{job['total_steps']}"
    for key, label in (("loss", "loss"), ("validation_loss", "validation")):
        if job[f"first_{key}"] is not None:
            text += f", {label} {job[f'first_{key}']:.3f} -> {job[f'last_{key}']:.3f}"
    return text + (f": {job['error']}" if job["error"] else "")


# tables


REQUEST_COLUMNS = (
    "arrival_s", "tenant", "adapter", "adapter_version", "prompt_tokens", "output_tokens", "ttft_ms", "tpot_ms",
    "tpot_all_tokens_ms", "e2el_ms", "met_objectives", "error", "token_times_s",
)  # fmt: skip
STEP_COLUMNS = (
    "at_s", "seconds", "host_seconds", "shape", *Mix._fields, "running", "waiting", "kv_usage", "output_tokens",
)  # fmt: skip


def request_rows(done: Coserved) -> Iterable[list[Any]]:
    goals = objectives(done.goodput)
    for r in done.run.served:
        whole = bool(r.token_times)
        times = [r.ttft, r.tpot, r.tpot_all_tokens, r.e2el] if whole else [None] * 4
        yield [
            f"{r.start:.6f}", r.tenant, r.adapter or BASE, r.version, r.prompt_tokens, r.num_outputs,
            *("" if t is None else f"{t * 1000:.3f}" for t in times),
            int(r.error is None and whole and is_good(r, goals)), r.error or "",
            " ".join(f"{t:.6f}" for t in r.token_times),
        ]  # fmt: skip


def step_rows(run: MixedRun) -> Iterable[list[Any]]:
    for s in run.mixed:
        times = (f"{value:.6f}" for value in (s.at, s.seconds, s.host_seconds))
        yield [*times, s.bucket, *s.mix, s.running, s.waiting, f"{s.kv_usage:.4f}", s.tokens]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


# while it runs


def mix_of(steps: Sequence[MixedStep]) -> Mix:
    """Tokens of these steps, summed by kind."""
    return Mix(*(sum(step.mix[i] for step in steps) for i in range(len(Mix._fields))))


def recent(run: MixedRun, seconds: float, now: float) -> dict[str, Any]:
    """How the run goes just now, for a progress display."""
    steps = []
    for step in reversed(run.mixed):
        if step.at < now - seconds:
            break
        steps.append(step)
    span = max(min(seconds, now), 1e-6)
    mix = mix_of(steps)
    return {"finetune_tokens_per_s": mix.backward / span, "output_tokens_per_s": sum(s.tokens for s in steps) / span}


def so_far(run: MixedRun, goodput: Sequence[str]) -> dict[str, Any]:
    """Latencies, None of no request, and attainment of the requests that are over."""
    over = [r for r in run.served if r.over or r.error is not None]  # some are refused and never begin
    begun = [r for r in run.served if r.token_times]
    tpots, kinds = [r.tpot for r in over if r.tpot is not None], ("median", "p99")
    latencies = in_ms("ttft", [r.ttft for r in begun], kinds) | in_ms("tpot", tpots, kinds)
    return {"done": len(over), **latencies, "attainment": attainment(over, goodput)["attainment"]}
