"""A co-serving run as a page with plots, and everything it leaves on the disk."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.bench import html
from jaxserve.bench.coserve_numbers import (
    REQUEST_COLUMNS,
    STEP_COLUMNS,
    Answer,
    Coserved,
    ms,
    request_rows,
    step_rows,
    write_csv,
)
from jaxserve.bench.html import Limit, Plot, Series, Span
from jaxserve.bench.load import BASE
from jaxserve.bench.replay import ServedRequest
from jaxserve.metrics import percent

REPORT = "report.html"
NUM_BINS = 120  # of a plot over time, about
KINDS = {  # of a step's tokens: label and colour, from the bottom of a plot to its top
    "decode": ("decode", 1),
    "prefill": ("prefill", 7),
    "forward": ("finetuning, forward alone", 6),
    "backward": ("finetuning, backward", 2),
}


def write(place: Path, done: Coserved, found: Mapping[str, Any], title: str) -> None:
    """Writes results.json, requests.csv, steps.csv and report.html.

    Args:
      found: its ``numbers``.
    """
    place.mkdir(parents=True, exist_ok=True)
    whole = {**(done.circumstances or {}), **found}
    (place / "results.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    write_csv(place / "requests.csv", REQUEST_COLUMNS, request_rows(done))
    write_csv(place / "steps.csv", STEP_COLUMNS, step_rows(done.run))
    (place / REPORT).write_text(report(done, found, title), encoding="utf-8")


def report(done: Coserved, found: Mapping[str, Any], title: str) -> str:
    """The page: every number of it is in the run."""
    blocks = [_tiles(found), _serving(done, found), _finetuning(done, found), _engine(done)]
    if done.answers:
        blocks.append(_answers(done.answers))
    blocks += [_tables(found), _about(done)]
    return html.page(title, f"One engine, one copy of the base model. Requests: {done.source}.", blocks)


def _tiles(found: Mapping[str, Any]) -> str:
    served, slo, tuned = found["requests"], found["slo"], found["finetune"]
    tiles = [
        ("Requests", f"{served['completed']}", f"{served['failed']} failed, in {found['duration']:.1f} s"),
        ("Time to first token", *_latency(served, "ttft", 0)),
        ("Time per output token", *_latency(served, "tpot", 1)),
    ]
    if slo["attainment"] is not None:
        goals = ", ".join(f"{name.upper()} {goal:g} ms" for name, goal in slo["objectives_ms"].items())
        tiles.append(("SLO attainment", f"{slo['attainment']:.1%}", goals))
    if found["jobs"]:
        tiles.append(("Finetuning", f"{tuned['tokens_per_s']:,.0f} tokens/s", f"{tuned['tokens']:,} tokens trained"))
    for job in found["jobs"]:
        key = "validation_loss" if job["first_validation_loss"] is not None else "loss"
        if job[f"first_{key}"] is not None:
            change = f"{job[f'first_{key}']:.2f} → {job[f'last_{key}']:.2f}"
            tiles.append((f"{key.replace('_', ' ').capitalize()}, {job['adapter']}", change, f"{job['steps']} steps"))
    return html.tiles(tiles)


def _latency(served: Mapping[str, Any], name: str, digits: int) -> tuple[str, str]:
    median, p99 = (ms(served[f"{kind}_{name}_ms"], digits) for kind in ("median", "p99"))
    return f"{median} ms", f"median; p99 {p99} ms"


def _serving(done: Coserved, found: Mapping[str, Any]) -> str:
    run, frame = done.run, _Frame(done)
    arrivals = frame.rate([r.start for r in run.served])
    inside = [
        frame.line("running", frame.mean([(s.at, s.running) for s in run.mixed]), 1),
        frame.line("waiting", frame.mean([(s.at, s.waiting) for s in run.mixed]), 5),
    ]
    plots = [
        frame.plot("Arrivals", "requests/s", [Series(label="arrivals", x=frame.edges, y=arrivals, kind="area")]),
        frame.plot("Requests in the engine", "requests (mean)", inside),
        *(
            frame.plot(
                title,
                "ms",
                _latency_dots(run.served, name),
                limits=_limits(found, name),
                log=True,
                note="One dot per request, at its arrival.",
            )
            for name, title in (("ttft", "Time to first token"), ("tpot", "Time per output token after the first"))
        ),
    ]
    return html.section("Serving", html.figures(*plots))


def _finetuning(done: Coserved, found: Mapping[str, Any]) -> str:
    run, frame = done.run, _Frame(done)
    per_second = [frame.rate([s.at for s in run.mixed], [getattr(s.mix, kind) for s in run.mixed]) for kind in KINDS]
    per_step = [frame.mean([(s.at, getattr(s.mix, kind)) for s in run.mixed], fill=0.0) for kind in KINDS]
    plots = [
        frame.plot("Tokens by what they are for", "tokens/s", frame.areas(per_second), stacked=True),
        frame.plot("The mix of a step", "tokens per step (mean)", frame.areas(per_step), stacked=True),
    ]
    losses = _losses(done)
    if losses:
        plots.append(
            Plot(
                title="Loss",
                x_label="optimizer step",
                y_label="nats per token (log)",
                series=losses,
                log=True,
                note="Training: mean over the batch of each step. Validation: examples that are not trained on.",
            )
        )
    return html.section("Finetuning in the same steps", html.figures(*plots))


def _losses(done: Coserved) -> list[Series]:
    series = []
    for color, (adapter, job) in enumerate(done.jobs.items(), 1):
        learnt, validation = done.run.learnt[adapter], job.validation_losses
        label = f"{adapter}, training"
        series.append(Series(label=label, x=[s.step for s in learnt], y=[s.loss for s in learnt], color=color))
        x, y = [step for step, _ in validation], [loss for _, loss in validation]
        series.append(Series(label=f"{adapter}, validation", x=x, y=y, color=color, dashed=True))
        series.append(Series(label=f"{adapter} validated", x=x, y=y, color=color, kind="dots"))
    return [each for each in series if len(each.y)]


def _engine(done: Coserved) -> str:
    run, frame = done.run, _Frame(done)
    times = [(s.at, s.seconds * 1000) for s in run.mixed]
    seconds = [
        frame.line("median", frame.quantile(times, 0.5), 3),
        frame.line("p99", frame.quantile(times, 0.99), 5),
    ]
    usage = frame.mean([(s.at, s.kv_usage * 100) for s in run.mixed])
    plots = [
        frame.plot("Time of a step", "ms", seconds, note="One turn of the engine's loop, the host's work included."),
        frame.plot("KV pages in use", "% of all pages", [frame.line("in use", usage, 4)]),
    ]
    return html.section("The engine", html.figures(*plots))


def _latency_dots(requests: Sequence[ServedRequest], name: str) -> list[Series]:
    """One series per adapter, base first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for request in requests:
        value = getattr(request, name) if request.token_times else None
        if value:
            found.setdefault(request.adapter or BASE, []).append((request.start, value * 1000))
    names = sorted(found, key=lambda adapter: (adapter != BASE, adapter))
    colors = {adapter: 8 if adapter == BASE else 1 + (i - (BASE in found)) % 7 for i, adapter in enumerate(names)}
    return [
        Series(
            label=adapter,
            x=[x for x, _ in found[adapter]],
            y=[y for _, y in found[adapter]],
            kind="dots",
            color=colors[adapter],
        )
        for adapter in names
    ]


def _limits(found: Mapping[str, Any], name: str) -> list[Limit]:
    goal = found["slo"]["objectives_ms"].get(name)
    return [] if goal is None else [Limit(goal, f"objective {goal:g} ms")]


class _Frame:
    """The time axis that plots share, cut into bins."""

    def __init__(self, done: Coserved):
        self.end = max(done.run.duration, 1e-3)
        self.edges = html.bins(self.end, NUM_BINS)
        self.centers = [(a + b) / 2 for a, b in zip(self.edges, self.edges[1:], strict=False)]
        self.spans = [Span(*span) for span in done.bursts if span[0] < self.end]

    def rate(self, times: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
        """Sums per second."""
        sums, _ = np.histogram(times, bins=self.edges, weights=weights)
        return (sums / np.diff(self.edges)).tolist()

    def mean(self, points: Sequence[tuple[float, float]], fill: float | None = None) -> list[float | None]:
        return [float(np.mean(values)) if values else fill for values in self._binned(points)]

    def quantile(self, points: Sequence[tuple[float, float]], share: float) -> list[float | None]:
        return [float(np.quantile(values, share)) if values else None for values in self._binned(points)]

    def _binned(self, points: Sequence[tuple[float, float]]) -> list[list[float]]:
        bins: list[list[float]] = [[] for _ in self.centers]
        for place, (_, value) in zip(np.digitize([x for x, _ in points], self.edges) - 1, points, strict=True):
            bins[min(int(place), len(bins) - 1)].append(value)
        return bins

    def line(self, label: str, values: Sequence[float | None], color: int) -> Series:
        """Bins with nothing in them are left out."""
        known = [(x, y) for x, y in zip(self.centers, values, strict=True) if y is not None]
        return Series(label=label, x=[x for x, _ in known], y=[y for _, y in known], color=color)

    def areas(self, values: Sequence[Sequence[float | None]]) -> list[Series]:
        """One per kind of token."""
        return [
            Series(label=label, x=self.edges, y=[y or 0.0 for y in each], kind="area", color=color)
            for (label, color), each in zip(KINDS.values(), values, strict=True)
        ]

    def plot(self, title: str, y_label: str, series: Sequence[Series], **options: Any) -> Plot:
        if options.get("log"):
            y_label += " (log)"
        return Plot(
            title=title,
            x_label="seconds since the start",
            y_label=y_label,
            series=series,
            spans=self.spans,
            span_label="burst",
            x_range=(0.0, self.end),
            **options,
        )


def _answers(answers: Sequence[Answer]) -> str:
    names = list(answers[0].texts)
    rows = [[answer.prompt, *(answer.texts[name] for name in names)] for answer in answers]
    text = "The same prompts after the run, greedily. None of them is in the training data."
    return html.section("What the adapters learnt", html.table(["Prompt", *names], rows), text=text)


def _tables(found: Mapping[str, Any]) -> str:
    served = found["requests"]
    latency = [
        [label, *(html.number(served[f"{kind}_{name}_ms"]) for kind in ("mean", "median", "p99"))]
        for name, label in (
            ("ttft", "Time to first token"),
            ("tpot", "Time per output token, over the tokens after the first"),
            ("tpot_all_tokens", "Time per output token, over all tokens"),
            ("itl", "Inter-token latency"),
            ("e2el", "End-to-end latency"),
        )
    ]
    blocks = [html.table(["Latency, ms", "mean", "median", "p99"], latency)]
    if found["bursts"]:
        rows = [
            [
                name.replace("_", " "),
                str(part["requests"]),
                percent(part["attainment"]),
                html.number(part["finetune_tokens_per_s"]),
            ]
            for name, part in found["bursts"].items()
        ]
        blocks.append(html.table(["Arrived", "requests", "SLO attainment", "finetune tokens/s"], rows))
    if found["jobs"]:
        keys = ("first_loss", "last_loss", "first_validation_loss", "last_validation_loss")
        rows = [
            [
                job["adapter"],
                job["status"],
                f"{job['steps']}/{job['total_steps']}",
                *("-" if job[key] is None else f"{job[key]:.4f}" for key in keys),
                f"{job['trained_tokens']:,}",
            ]
            for job in found["jobs"]
        ]
        header = [
            "Job", "status", "steps", "first loss", "last loss", "validation before", "validation after",
            "tokens in the loss",
        ]  # fmt: skip
        blocks.append(html.table(header, rows))
    return html.section("In numbers", *blocks)


def _about(done: Coserved) -> str:
    about = done.circumstances or {}
    named = {"date": about.get("date"), "model": about.get("model_id"), "device": about.get("device")}
    named |= {"processors": about.get("processors"), **about.get("versions", {})}
    rows = [[name, str(value)] for name, value in named.items() if value is not None]
    run = done.run
    rows += [
        ["processor time", f"{run.cpu_seconds:.1f} s"],
        ["steps", f"{len(run.mixed):,}"],
        ["compilations after the start", str(run.recompiles)],
        ["preemptions", str(run.preemptions)],
        ["prompt tokens from the prefix cache", f"{run.prefix_hits:,}"],
    ]
    text = "requests.csv and steps.csv beside this page hold every request and every step."
    return html.section("The run", html.table(["", ""], rows), text=text)
