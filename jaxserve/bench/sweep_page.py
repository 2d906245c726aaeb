"""A sweep as a page: what each way to share comes to against the rate, and co-serving over time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.bench import html
from jaxserve.bench.coserve_page import KINDS
from jaxserve.bench.html import Limit, Plot, Series, Span
from jaxserve.bench.policies import ALONE, ENOUGH, OURS, REQUESTS
from jaxserve.bench.ran import Ran, StepRow
from jaxserve.metrics import percent

REPORT = "report.html"
NUM_BINS = 120  # of a plot over time, about
MOST_DOTS = 1500

Found = Mapping[str, Any]


def report(result: Found, runs: Sequence[Ran], bursts: Sequence[tuple[float, float]]) -> str:
    """The page.

    Args:
      result: as in results.json; runs: those its cells name.
    """
    cells = result["cells"]
    blocks = [_tiles(result), _against_rate(result), _latency(result), _pages(cells)]
    shown = _shown(cells)
    known = {ran.name: ran for ran in runs}
    if shown is not None and shown["serving_run"] in known:
        blocks.append(_over_time(shown, known[shown["serving_run"]], bursts))
    blocks += [_tables(result), _about(result)]
    device = result["simulated"] or result["device"]
    title = f"Co-serving against the alternatives: {result['model_id']}"
    return html.page(title, f"{'Simulated' if result['simulated'] else 'Measured'}: {device}.", blocks)


def _tiles(result: Found) -> str:
    tiles = []
    for claim in (result["claims"][:1] + result["claims"][-1:])[: len(result["claims"])]:
        times, ours = claim["times_best_other"], claim["coserve_policy"]
        value, remark = f"{claim['coserve_tokens_per_s']:,.0f} tokens/s", f"the finetuning of {ours}, per replica"
        if times is not None:
            value, remark = f"{times:.2f} x", f"the finetuning of {ours} over {claim['best_other']}"
        remark += f"; {percent(claim['coserve_attainment'])} of its requests met the objectives"
        tiles.append((f"{claim['rate']:g} requests/s", value, remark))
    for cell in (cell for cell in result["cells"] if cell["policy"] == ALONE):
        tiles.append(("Finetuning alone", f"{cell['finetune_tokens_per_s']:,.0f} tokens/s", "per replica"))
        break
    return html.tiles(tiles)


def _series(
    cells: Sequence[Found], value: Callable[[Found], float | None], leave_out: Sequence[str] = ()
) -> list[Series]:
    """A line per policy over the rates; dots where there is one rate."""
    policies = list(dict.fromkeys(cell["policy"] for cell in cells))
    found = []
    for number, policy in enumerate(policies):
        points = [(c["rate"], v) for c in cells if c["policy"] == policy and (v := value(c)) is not None]
        if policy in leave_out or not points:
            continue
        found.append(
            Series(
                label=policy,
                x=[x for x, _ in points],
                y=[y for _, y in points],
                kind="line" if len(points) > 1 else "dots",
                color=1 + number,
                dashed=number >= html.NUM_COLORS,
            )
        )
    return found


def _plot(
    cells: Sequence[Found], title: str, label: str, value: Callable[[Found], float | None], **options: Any
) -> Plot:
    leave_out = options.pop("leave_out", ())
    return Plot(
        title=title, x_label="requests/s per replica", y_label=label, series=_series(cells, value, leave_out), **options
    )


def _key(name: str, scale: float = 1.0) -> Callable[[Found], float | None]:
    return lambda cell: None if cell.get(name) is None else cell[name] * scale


def _ms(name: str, kind: str) -> Callable[[Found], float | None]:
    return lambda cell: (cell.get(f"{name}_ms") or {}).get(kind)


def _against_rate(result: Found) -> str:
    cells = result["cells"]
    enough = [Limit(ENOUGH * 100, f"{ENOUGH:.0%}")]
    plots = [
        _plot(cells, "Finetuning", "tokens/s per replica", _key("finetune_tokens_per_s"), leave_out=(REQUESTS,)),
        _plot(cells, "Requests that met their objectives", "%", _key("attainment", 100), limits=enough),
        _plot(
            cells, "Finetuning kept", "% of finetuning alone", _key("finetuning_kept", 100), leave_out=(REQUESTS, ALONE)
        ),
        _plot(cells, "Goodput", "requests/s per replica", _key("goodput")),
    ]
    text = "A finetune token counts when its backward is done. Goodput: requests that met every objective."
    return html.section("Against the rate of requests", html.figures(*plots), text=text)


def _latency(result: Found) -> str:
    cells, goals = result["cells"], result["objectives_ms"]

    def plot(title: str, name: str, kind: str, log: bool = False) -> Plot:
        limits = [Limit(goals[name], f"objective {goals[name]:g} ms")] if name in goals else []
        label = "ms (log)" if log else "ms"
        return _plot(cells, f"{title}, {kind}", label, _ms(name, kind), limits=limits, log=log)

    tpot, both = "Time per output token", "Time per output token over all tokens"
    plots = [
        plot("Time to first token", "ttft", "p50", log=True),
        plot("Time to first token", "ttft", "p99", log=True),
        plot(f"{tpot} after the first", "tpot", "mean"),
        plot(f"{tpot} after the first", "tpot", "p99"),
        plot(both, "tpot_all_tokens", "mean"),
        plot("Inter-token latency", "itl", "p99", log=True),
    ]
    return html.section("Latency", html.figures(*plots))


def _pages(cells: Sequence[Found]) -> str:
    plots = [
        _plot(cells, "KV pages in use, mean over time", "%", _key("kv_usage_mean", 100)),
        _plot(cells, "Requests preempted", "requests", _key("preemptions")),
        _plot(cells, "Finetune sequences that gave way", "sequences", _key("evictions")),
        _plot(cells, "Step time, predicted against measured", "p90 of the error, %", _key("prediction_error_p90", 100)),
    ]
    return html.section("Pages and predictions", html.figures(*plots))


def _shown(cells: Sequence[Found]) -> Found | None:
    """Co-serving at the highest rate at which it keeps the objectives, or at the lowest."""
    ours = sorted((cell for cell in cells if cell["policy"] == OURS), key=lambda cell: cell["rate"])
    kept = [cell for cell in ours if (cell["attainment"] or 0.0) >= ENOUGH]
    return (kept[-1:] or ours[:1] or [None])[0]


def _over_time(cell: Found, ran: Ran, bursts: Sequence[tuple[float, float]]) -> str:
    steps = [step for step in ran.steps if step.replica == 0 and step.end <= ran.seconds]
    edges = html.bins(ran.seconds, NUM_BINS)
    spans = [Span(*span) for span in bursts]

    def per_second(weights: Sequence[float]) -> list[float]:
        sums, _ = np.histogram([step.end for step in steps], bins=edges, weights=weights)
        return (sums / np.diff(edges)).tolist()

    def mean(weights: Sequence[float]) -> list[float]:
        seconds = np.array(per_second([step.seconds for step in steps]))
        sums = np.array(per_second([w * step.seconds for w, step in zip(weights, steps, strict=True)]))
        return (sums / np.maximum(seconds, 1e-9)).tolist()

    def over_time(title: str, label: str, series: Sequence[Series], **options: Any) -> Plot:
        return Plot(
            title=title,
            x_label="seconds since the start",
            y_label=label,
            series=series,
            spans=spans,
            span_label="burst",
            x_range=(0.0, ran.seconds),
            **options,
        )

    mix = [
        Series(label=label, x=edges, y=per_second([getattr(s.mix, kind) for s in steps]), kind="area", color=color)
        for kind, (label, color) in KINDS.items()
    ]
    usage = Series(label="in use", x=edges, y=mean([step.kv_usage * 100 for step in steps]), kind="area", color=4)
    plots = [
        over_time("Tokens by what they are for", "tokens/s", mix, stacked=True),
        over_time("KV pages in use", "%", [usage]),
        over_time("Time of a step", "ms (log)", _step_times(steps), log=True, note=_said(steps)),
        Plot(
            title="Predicted against measured time of a step",
            x_label="measured, ms",
            y_label="predicted, ms",
            series=_predictions(steps),
            note=f"90 % of all steps are within {percent(cell['prediction_error_p90'])}. {_said(steps)}",
        ),
    ]
    title = f"Co-serving at {cell['rate']:g} requests/s over time"
    text = f"One of {ran.replicas} replicas." if ran.replicas > 1 else ""
    return html.section(title, html.figures(*plots), text=text)


def _every(steps: Sequence[StepRow]) -> int:
    return -(-len(steps) // MOST_DOTS) or 1


def _sample(steps: Sequence[StepRow]) -> Sequence[StepRow]:
    return steps[:: _every(steps)]


def _said(steps: Sequence[StepRow]) -> str:
    return f"One of {_every(steps)} steps is shown." if _every(steps) > 1 else ""


def _step_times(steps: Sequence[StepRow]) -> list[Series]:
    some = _sample(steps)
    kinds = {"with gradient rows": (True, 2), "without": (False, 1)}
    return [
        Series(
            label=label,
            x=[s.at for s in some if bool(s.mix.backward) is has],
            y=[s.seconds * 1000 for s in some if bool(s.mix.backward) is has],
            kind="dots",
            color=color,
        )
        for label, (has, color) in kinds.items()
    ]


def _predictions(steps: Sequence[StepRow]) -> list[Series]:
    some = [step for step in _sample(steps) if step.predicted < float("inf")]
    longest = max((step.seconds * 1000 for step in some), default=1.0)
    x, y = [s.seconds * 1000 for s in some], [s.predicted * 1000 for s in some]
    return [
        Series(label="steps", x=x, y=y, kind="dots", color=3),
        Series(label="equal", x=[0.0, longest], y=[0.0, longest], color=8, dashed=True),
    ]


def _tables(result: Found) -> str:
    rows = [
        [
            f"{cell['rate']:g}",
            cell["policy"],
            str(cell.get("requests", "-")),
            str(cell["clipped"]),
            html.number(cell["finetune_tokens_per_s"]),
            percent(cell["finetuning_kept"], 0),
            percent(cell.get("attainment")),
            *(
                html.number(_ms(name, kind)(cell))
                for name in ("ttft", "tpot", "tpot_all_tokens", "itl")
                for kind in ("mean", "p99")
            ),
            html.number(cell.get("goodput")),
            percent(cell["kv_usage_mean"], 0),
            str(cell["preemptions"]),
            str(cell["evictions"]),
            percent(cell["prediction_error_p90"]),
        ]
        for cell in result["cells"]
    ]
    latencies = ("TTFT", "TPOT", "TPOT, all tokens", "ITL")
    header = [
        "requests/s", "policy", "requests", "clipped", "finetune tokens/s", "kept", "objectives met",
        *(f"{name} {kind}, ms" for name in latencies for kind in ("mean", "p99")),
        "goodput", "KV", "preempted", "gave way", "prediction error p90",
    ]  # fmt: skip
    blocks = [html.table(header, rows)]
    claims = [
        [
            f"{claim['rate']:g}",
            {True: "yes", False: "no", None: "-"}[claim["requests_alone_meet"]],
            claim["coserve_policy"],
            percent(claim["coserve_attainment"]),
            html.number(claim["coserve_tokens_per_s"]),
            claim["best_other"] or "-",
            html.number(claim["best_other_tokens_per_s"]),
            html.number(claim["times_best_other"]),
        ]
        for claim in result["claims"]
    ]
    columns = [
        "requests/s", "requests alone meet the objectives", "co-serving", "meets them for", "its tokens/s",
        "best other that meets them", "its tokens/s ", "times",
    ]  # fmt: skip
    blocks.append(html.table(columns, claims))
    if result["agreement"]:
        agreed = [
            [
                each["run"],
                html.number(each["measured_finetune_tokens_per_s"]),
                html.number(each["simulated_finetune_tokens_per_s"]),
                percent(each["measured_attainment"]),
                percent(each["simulated_attainment"]),
            ]
            for each in result["agreement"]
        ]
        columns = ["Run", "finetune tokens/s, measured", "simulated", "objectives met, measured", "simulated "]
        blocks.append(html.table(columns, agreed))
    return html.section("In numbers", *blocks)


def _about(result: Found) -> str:
    shares = {cell["arithmetic"] for cell in result["cells"] if cell["arithmetic"]}
    rows = [["", text] for text in result["preface"]]
    rows += [["arithmetic", text] for text in sorted(shares)]
    rows += [["date", result["date"]], *([name, text] for name, text in result["versions"].items())]
    text = (
        "requests.csv and steps.csv beside this page hold every request and every step; each figure follows from them."
    )
    return html.section("What was run", html.table(["", ""], rows), text=text)
