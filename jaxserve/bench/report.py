"""From what a run recorded to the numbers, the text block and the JSON that vLLM's serving benchmark has.

Time per output token has two definitions: vLLM's, over the tokens after the first, and FlexLLM's, which divides by
all tokens. ``tpot`` is the first; ``tpot_all_tokens`` the second.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.metrics import summary

TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "tpot_all_tokens": "Time per Output Token (over all tokens)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
HOST_PARTS = ("plan", "pack", "dispatch", "commit")
WIDTH = 50
MAX_REASONS = 5  # why requests failed


@dataclass(kw_only=True)
class RequestRecord:
    """One request as its client saw it; times in seconds since the start of the run."""

    prompt_tokens: int
    start: float  # its latencies count from here
    token_times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None

    @property
    def num_outputs(self) -> int:
        return len(self.token_times)

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.start

    @property
    def e2el(self) -> float:
        return self.token_times[-1] - self.start

    @property
    def decode_seconds(self) -> float:
        return self.token_times[-1] - self.token_times[0]

    @property
    def tpot(self) -> float | None:
        return self.decode_seconds / (self.num_outputs - 1) if self.num_outputs > 1 else None

    @property
    def tpot_all_tokens(self) -> float | None:
        return self.decode_seconds / self.num_outputs if self.num_outputs > 1 else None

    @property
    def itls(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One turn of the engine's loop, in seconds."""

    seconds: float
    host_seconds: float  # plan, pack, dispatch and commit
    plan_seconds: float
    pack_seconds: float
    commit_seconds: float
    tokens: int  # that became known
    running: int
    kv_usage: float  # 0 to 1

    @property
    def send_seconds(self) -> float:
        """Plan, pack and dispatch: what must be over before the device can begin."""
        return max(self.host_seconds - self.commit_seconds, 0.0)

    @property
    def dispatch_seconds(self) -> float:
        return max(self.send_seconds - self.plan_seconds - self.pack_seconds, 0.0)


@dataclass(kw_only=True)
class Run:
    """All that one run recorded."""

    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    duration: float = 0.0
    cpu_seconds: float = 0.0  # of the process: what a busy machine's other work does not change much
    recompiles: int = 0
    preemptions: int = 0
    prefix_hits: int = 0  # prompt tokens found in the cache

    @property
    def done(self) -> list[RequestRecord]:
        return [r for r in self.requests if r.error is None and r.token_times]

    @property
    def output_throughput(self) -> float:
        """Tokens per second."""
        return sum(r.num_outputs for r in self.done) / self.duration


def latencies(run: Run) -> dict[str, list[float]]:
    """Seconds by name; one value per request, of itl one per gap."""
    found = {name: [getattr(r, name) for r in run.done] for name in TITLES if name != "itl"}
    found = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: found[name] if name in found else [gap for r in run.done for gap in r.itls] for name in TITLES}


def objectives(goodput: Iterable[str]) -> dict[str, float]:
    """``("ttft:500", ...)`` to seconds by name."""
    pairs = (text.split(":") for text in goodput)
    return {name: float(value) / 1000 for name, value in pairs}


def is_good(record: RequestRecord, goals: Mapping[str, float]) -> bool:
    """Whether the request meets every objective; ``itl`` is its mean gap. A single token has no gap to judge."""
    gaps = record.itls
    measured = {"ttft": record.ttft, "tpot": record.tpot, "e2el": record.e2el}
    measured["itl"] = sum(gaps) / len(gaps) if gaps else None
    return all((value := measured[name]) is None or value <= goal for name, goal in goals.items())


def share_met(records: Sequence[RequestRecord], goals: Mapping[str, float]) -> float | None:
    """Share of the requests that met every objective; one that failed or has no token met none. None of none."""
    met = [r.error is None and bool(r.token_times) and is_good(r, goals) for r in records]
    return sum(met) / len(met) if met else None


def metrics(run: Run, goodput: Sequence[str] = ()) -> dict[str, Any]:
    """The run's numbers under vLLM's keys; latencies in ms, None of no request, throughputs per second."""
    done, duration, goals = run.done, run.duration, objectives(goodput)
    inputs, outputs = sum(r.prompt_tokens for r in done), sum(r.num_outputs for r in done)
    numbers: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(run.requests) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "request_goodput": sum(is_good(r, goals) for r in done) / duration if goals else None,
        "output_throughput": run.output_throughput,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_output_tokens_per_s": _peak_tokens(done),
        "max_concurrent_requests": _peak_requests(done),
    }
    for name, values in latencies(run).items():
        numbers |= in_ms(name, values, ("mean", "median", "std", "p99"))
    return {**numbers, **_engine_metrics(run)}


def in_ms(name: str, values: Sequence[float], kinds: Sequence[str]) -> dict[str, float | None]:
    """Keys of ``summary``, as median_NAME_ms, of latencies in seconds; None of none."""
    found = summary(values)
    return {f"{kind}_{name}_ms": found[kind] * 1000 if values else None for kind in kinds}


def _engine_metrics(run: Run) -> dict[str, Any]:
    steps = run.steps
    usage = [step.kv_usage for step in steps]
    busy = sum(step.seconds for step in steps)
    numbers = {
        "cpu_seconds": run.cpu_seconds,
        "num_steps": len(steps),
        "kv_usage_mean": summary(usage)["mean"],
        "kv_usage_max": max(usage, default=0.0),
        "host_share": sum(step.host_seconds for step in steps) / busy if busy else 0.0,
        "recompiles": run.recompiles,
        "preemptions": run.preemptions,
        "prefix_cache_hit_tokens": run.prefix_hits,
    }
    full = max((step.running for step in steps), default=0)
    fullest = [step for step in steps if step.running == full and step.tokens == full]
    return {**numbers, "host_ms_per_step": _host(steps), "host_full_batch": {"running": full, **_host(fullest)}}


def _host(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Median host time of these steps in ms, whole and by part, and the least of what comes before the device."""
    steps = [step for step in steps if step.pack_seconds > 0]  # the last ones of a run send nothing
    parts = {part: [getattr(s, f"{part}_seconds") for s in steps] for part in ("host", "send", *HOST_PARTS)}
    found = {("median" if part == "host" else part): summary(v)["median"] * 1000 for part, v in parts.items()}
    return {"steps": len(steps), **found, "min": min(parts["send"], default=0.0) * 1000}


def _peak_tokens(done: Sequence[RequestRecord]) -> int:
    """Most tokens within one second of the run."""
    return max(Counter(int(time) for r in done for time in r.token_times).values(), default=0)


def _peak_requests(done: Sequence[RequestRecord]) -> int:
    changes = sorted([(r.start, 1) for r in done] + [(r.token_times[-1], -1) for r in done])
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def detail(run: Run) -> dict[str, Any]:
    """Each request's and each step's numbers, in seconds."""
    requests = run.requests
    return {
        "input_lens": [r.prompt_tokens for r in requests],
        "output_lens": [r.num_outputs for r in requests],
        "ttfts": [r.ttft if r.token_times else None for r in requests],
        "itls": [r.itls for r in requests],
        "generated_token_ids": [r.token_ids for r in requests],
        "errors": [r.error or "" for r in requests],
        "steps": [vars(step) for step in run.steps],
    }


def failures(requests: Iterable[RequestRecord]) -> list[str]:
    """Why requests failed, the commonest reasons first."""
    reasons = Counter(r.error for r in requests if r.error is not None)
    return [f"{count} failed: {reason}" for reason, count in reasons.most_common(MAX_REASONS)]


def text_block(numbers: Mapping[str, Any]) -> str:
    """vLLM's block, and the engine's own numbers under it."""
    counts = {
        "Successful requests:": numbers["completed"],
        "Failed requests:": numbers["failed"],
        "Benchmark duration (s):": numbers["duration"],
        "Total input tokens:": numbers["total_input_tokens"],
        "Total generated tokens:": numbers["total_output_tokens"],
        "Request throughput (req/s):": numbers["request_throughput"],
        "Request goodput (req/s):": numbers["request_goodput"],
        "Output token throughput (tok/s):": numbers["output_throughput"],
        "Peak output token throughput (tok/s):": numbers["max_output_tokens_per_s"],
        "Peak concurrent requests:": numbers["max_concurrent_requests"],
        "Total token throughput (tok/s):": numbers["total_token_throughput"],
    }
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]
    lines += [_line(label, value) for label, value in counts.items() if value is not None]
    for name, title in TITLES.items():
        label = {"tpot_all_tokens": "TPOT"}.get(name, name.upper())
        kinds = (("Mean", "mean"), ("Median", "median"), ("P99", "p99"))
        lines.append(title.center(WIDTH, "-"))
        lines += [_line(f"{word} {label} (ms):", numbers[f"{kind}_{name}_ms"]) for word, kind in kinds]
    return "\n".join([*lines, *_engine_lines(numbers), "=" * WIDTH])


def _engine_lines(numbers: Mapping[str, Any]) -> list[str]:
    full = numbers["host_full_batch"]
    values = {
        "Processor time (s):": numbers["cpu_seconds"],
        "Steps:": numbers["num_steps"],
        "KV usage, mean (%):": numbers["kv_usage_mean"] * 100,
        "KV usage, max (%):": numbers["kv_usage_max"] * 100,
        "Prompt tokens from the prefix cache:": numbers["prefix_cache_hit_tokens"],
        "Preemptions:": numbers["preemptions"],
        "Compilations:": numbers["recompiles"],
        "Host share of step time (%):": numbers["host_share"] * 100,
        "Host per step, median (ms):": numbers["host_ms_per_step"]["median"],
        f"Host per step of {full['running']} tokens, median (ms):": full["median"],
        "  plan, pack and dispatch (ms):": full["send"],
        "  least of them (ms):": full["min"],
        **{f"  {part} (ms):": full[part] for part in HOST_PARTS},
    }
    return ["Engine".center(WIDTH, "-"), *(_line(label, value) for label, value in values.items())]


def _line(label: str, value: float | None) -> str:
    shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else value
    return f"{label:<40} {shown:<10}"
