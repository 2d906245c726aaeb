"""A report in one HTML file: text, tables and plots as inline SVG. No scripts, nothing from a network.

Colours are CSS variables, so that a page is readable on a light and on a dark screen, and on paper.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal, NamedTuple

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 46
NUM_COLORS = 8
MOST_TIPS = 1000  # points that say their value under the pointer


@dataclass(frozen=True, kw_only=True)
class Series:
    """One set of points.

    ``area`` has one x more than y: the edges of the bins.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["line", "dots", "area"] = "line"
    color: int = 1  # from 1 on; the first comes again after the last
    dashed: bool = False  # dots are rings

    @property
    def hue(self) -> int:
        return 1 + (self.color - 1) % NUM_COLORS


class Span(NamedTuple):
    """A stretch of the x axis that is marked."""

    start: float
    end: float


class Limit(NamedTuple):
    """A horizontal line at a value that is not to be exceeded."""

    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure with its axes and legend."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""
    spans: Sequence[Span] = ()
    span_label: str = ""
    limits: Sequence[Limit] = ()
    log: bool = False  # the y axis
    x_range: tuple[float, float] | None = None
    stacked: bool = False  # areas stand on each other
    height: int = HEIGHT


@dataclass
class _Axes:
    """From data to places in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool
    height: int
    floor: float = field(init=False)

    def __post_init__(self):
        self.floor = self.height - BOTTOM

    def px(self, x: float) -> float:
        share = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        low, high = self.y
        if self.log:
            y, low, high = (math.log10(max(value, self.y[0])) for value in (y, low, high))
        share = (y - low) / ((high - low) or 1)
        return self.floor - share * (self.floor - TOP)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def bins(end: float, count: int) -> list[float]:
    """Edges of about ``count`` bins from 0 to ``end``, of a round width but for the last, which ends where all does."""
    width = ticks(0.0, end, count)[1]
    edges = [i * width for i in range(math.ceil(end / width - 0.5))]
    return [*edges, end] if edges[1:] else [0.0, end]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... where that is not too many, else the powers of ten; other round numbers where it is too few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    found = [step * 10.0**power for power in powers for step in steps]
    inside = [value for value in found if low * 0.999 <= value <= high * 1.001]
    return inside if len(inside) > 1 else ticks(low, high)


def number(value: float | None) -> str:
    """A number as people write it: three figures, thousands apart; - where there is none."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if abs(value) < 100 else f"{value:.0f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def figure(plot: Plot) -> str:
    """The plot with title, legend and note."""
    shown = [s for s in plot.series if len(s.y)]
    legend = [f'<span><i class="{_swatch(s)}"></i>{escape(s.label)}</span>' for s in shown]
    legend += [f'<span><i class="limit"></i>{escape(limit.label)}</span>' for limit in plot.limits]
    if plot.spans and plot.span_label:
        legend.append(f'<span><i class="span"></i>{escape(plot.span_label)}</span>')
    note = f"<p>{escape(plot.note)}</p>" if plot.note else ""
    return (
        f"<figure><figcaption>{escape(plot.title)}</figcaption>"
        f'<div class="legend">{"".join(legend)}</div>{_svg(plot, shown)}{note}</figure>'
    )


def _swatch(series: Series) -> str:
    return f"b{series.hue} {series.kind}{' dashed' if series.dashed else ''}"


def _svg(plot: Plot, shown: Sequence[Series]) -> str:
    layers = _stacked(shown) if plot.stacked else [(s, [0.0] * len(s.y), list(s.y)) for s in shown]
    axes = _axes(plot, layers)
    parts = [f'<svg viewBox="0 0 {WIDTH} {plot.height}" role="img" aria-label="{escape(plot.title)}">']
    for span in plot.spans:
        start, end = (axes.px(min(max(edge, axes.x[0]), axes.x[1])) for edge in span)
        parts.append(
            f'<rect class="span" x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{axes.floor - TOP}"/>'
        )
    parts += _grid(plot, axes)
    for series, below, above in layers:
        parts += _drawn(series, below, above, axes)
    for limit in plot.limits:
        y = axes.py(limit.value)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return "".join(parts) + "</svg>"


def _stacked(shown: Sequence[Series]) -> list[tuple[Series, list[float], list[float]]]:
    """(series, lower edge, upper edge); the first series is at the bottom."""
    layers, below = [], [0.0] * max((len(s.y) for s in shown), default=0)
    for series in shown:
        above = [low + y for low, y in zip(below, series.y, strict=True)]
        layers.append((series, below, above))
        below = above
    return layers


def _axes(plot: Plot, layers: Sequence[tuple[Series, list[float], list[float]]]) -> _Axes:
    xs = [x for series, _, _ in layers for x in series.x] or [0.0, 1.0]
    ys = [y for _, _, above in layers for y in above] + [limit.value for limit in plot.limits]
    if plot.log:
        positive = [y for y in ys if y > 0] or [1.0]
        low, high = min(positive) * 0.8, max(positive) * 1.25
    else:
        low, high = min([0.0, *ys]), (max([0.0, *ys]) or 1.0) * 1.05
    return _Axes(plot.x_range or (min(xs), max(xs)), (low, high), plot.log, plot.height)


def _grid(plot: Plot, axes: _Axes) -> list[str]:
    parts = []
    for value in log_ticks(*axes.y) if plot.log else ticks(*axes.y):
        y = axes.py(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(*axes.x, 8):
        x = axes.px(value)
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.floor}" y2="{axes.floor + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{axes.floor + 18}" text-anchor="middle">{number(value)}</text>')
    middle = (TOP + axes.floor) / 2
    return [
        *parts,
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.floor}" y2="{axes.floor}"/>',
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{plot.height - 8}" text-anchor="middle">'
        f"{escape(plot.x_label)}</text>",
        f'<text class="label" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(plot.y_label)}</text>",
    ]


def _drawn(series: Series, below: Sequence[float], above: Sequence[float], axes: _Axes) -> list[str]:
    color = f"s{series.hue}"
    if series.kind == "area":
        return [f'<path class="f{series.hue} area" d="{_area(series.x, below, above, axes)}"/>']
    points = [(axes.px(x), axes.py(y)) for x, y in zip(series.x, above, strict=True)]
    if series.kind == "line":
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        return [f'<polyline class="{color} line{" dashed" if series.dashed else ""}" points="{path}"/>']
    tips, look = len(points) <= MOST_TIPS, f"{color} ring" if series.dashed else f"f{series.hue} dot"
    return [
        f'<circle class="{look}" cx="{px:.1f}" cy="{py:.1f}" r="2.6">'
        + (f"<title>{escape(series.label)}: {number(x)}, {number(y)}</title>" if tips else "")
        + "</circle>"
        for (px, py), x, y in zip(points, series.x, above, strict=True)
    ]


def _area(edges: Sequence[float], below: Sequence[float], above: Sequence[float], axes: _Axes) -> str:
    """The outline of a staircase: along its top to the right, and along its bottom back."""
    bins = list(zip(edges, edges[1:], below, above, strict=False))
    top = [f"L{axes.px(x):.1f} {axes.py(high):.1f}" for left, right, _, high in bins for x in (left, right)]
    bottom = [f"L{axes.px(x):.1f} {axes.py(low):.1f}" for left, right, low, _ in reversed(bins) for x in (right, left)]
    return "M" + " ".join([*top, *bottom]).removeprefix("L") + "Z"


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """(what, value, remark) side by side, large."""
    cells = (
        f"<div><span>{escape(what)}</span><b>{escape(value)}</b><small>{escape(remark)}</small></div>"
        for what, value, remark in values
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of numbers are set to the right."""
    every = [list(row) for row in rows]
    numeric = [bool(every) and all(_is_number(row[i]) for row in every) for i in range(len(header))]
    head = "".join(_cell("th", cell, right) for cell, right in zip(header, numeric, strict=True))
    body = (
        f"<tr>{''.join(_cell('td', cell, right) for cell, right in zip(row, numeric, strict=True))}</tr>"
        for row in every
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _is_number(text: str) -> bool:
    plain = text.replace(",", "").removesuffix("%").strip().removeprefix("-")
    return text in ("", "-") or plain.replace(".", "", 1).isdigit()


def _cell(tag: str, text: str, right: bool) -> str:
    attribute = ' class="n"' if right else ""
    return f"<{tag}{attribute}>{escape(text)}</{tag}>"


def section(title: str, *blocks: str, text: str = "") -> str:
    lead = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{''.join(blocks)}</section>"


def figures(*plots: Plot) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures">{"".join(figure(plot) for plot in plots)}</div>'


def page(title: str, subtitle: str, blocks: Iterable[str]) -> str:
    """The whole file."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>{''.join(blocks)}</main></body></html>\n"
    )


_LIGHT = ("#2866c9", "#d2691e", "#178a63", "#8b46c9", "#c23352", "#7a6a00", "#0f8a99", "#6b7280")
_DARK = ("#7aa9ff", "#ff9f59", "#4fd1a1", "#c79bff", "#ff7d96", "#d6c24a", "#5fd0dd", "#a3abb8")
_INK_LIGHT = {"bg": "#ffffff", "card": "#f5f6f8", "fg": "#16181d", "muted": "#596070", "grid": "#e2e5ea"}
_INK_DARK = {"bg": "#121419", "card": "#1b1e25", "fg": "#eceef2", "muted": "#a0a7b4", "grid": "#2f343e"}


def _variables(ink: dict[str, str], colors: Sequence[str]) -> str:
    named = {**ink, **{f"c{i}": color for i, color in enumerate(colors, 1)}}
    return "".join(f"--{name}:{value};" for name, value in named.items())


def _style() -> str:
    numbers = range(1, len(_LIGHT) + 1)
    colors = "".join(f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}.b{i}{{--c:var(--c{i})}}" for i in numbers)
    light, dark = _variables(_INK_LIGHT, _LIGHT), _variables(_INK_DARK, _DARK)
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f"@media print{{:root{{{light}}}}}{colors}{_RULES}"
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 2px}h2{font-size:19px;margin:38px 0 6px}
header p,section>p,figure p{color:var(--muted);margin:0 0 12px;max-width:90ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:10px;margin:18px 0}
.tiles div{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:10px 14px;
display:flex;flex-direction:column}
.tiles span{color:var(--muted);font-size:13px}.tiles b{font-size:24px;line-height:1.3}.tiles small{color:var(--muted)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:14px;margin-top:12px}
figure{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:12px 14px 6px}
figcaption{font-weight:600}figure p{font-size:13px;margin:2px 0 6px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--muted);min-height:20px}
.legend i{display:inline-block;width:14px;height:10px;margin-right:6px;border-radius:2px;background:var(--c)}
.legend i.line{height:0;border-radius:0;border-top:3px solid var(--c);background:none;vertical-align:middle}
.legend i.line.dashed{border-top-style:dashed}.legend i.dots{width:9px;height:9px;border-radius:50%}
.legend i.dots.dashed{background:none;border:2px solid var(--c)}
.legend i.limit{height:0;border-radius:0;border-top:2px dashed var(--fg);background:none;vertical-align:middle}
.legend i.span{background:var(--fg);opacity:.13}
svg{display:block;width:100%;height:auto}svg text{fill:var(--muted);font-size:12px}
svg .label{font-size:12.5px}.grid{stroke:var(--grid)}.axis,.tick{stroke:var(--muted)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}polyline.dashed{stroke-dasharray:5 4}
.dot{opacity:.65}.ring{fill:none;stroke-width:1.6}.area{opacity:.85}rect.span{fill:var(--fg);opacity:.08}
line.limit{stroke:var(--fg);stroke-width:1.5;stroke-dasharray:6 4}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:8px 0;font-size:14px;min-width:50%}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--muted);font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums}
@media print{figure,.tiles div{break-inside:avoid}}
"""
