"""Shows how a run goes: live on a terminal, as plain lines elsewhere, or as one JSON object a line."""

import atexit
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from jaxserve.bench.coserve_numbers import ms
from jaxserve.bench.engine import counting, stage

State = Mapping[str, Any]
LIVE_SECONDS = 0.25
BARS = "▁▂▃▄▅▆▇█"
HISTORY = 40  # values of a sparkline


class Progress(Protocol):
    """Where a run is shown."""

    def say(self, text: str) -> None:
        """Something that stays on the screen."""
        ...

    def stage(self, text: str) -> Any:
        """A context for something that takes a while."""
        ...

    def update(self, state: State) -> None:
        """How the run goes, now."""
        ...

    def due(self) -> bool:
        """Whether it is time for the next ``update``."""
        ...

    def event(self, adapter: str, event: Any) -> None:
        """A JobEvent."""
        ...

    def finish(self, result: State, text: str) -> None:
        """The numbers at the end, and the same in words."""
        ...


def make_progress(json_lines: bool, seconds: float = 2.0) -> Progress:
    if json_lines:
        return JsonProgress(seconds)
    return LiveProgress() if sys.stdout.isatty() else LineProgress(seconds)


class _Timed:
    """Updates every so many seconds."""

    def __init__(self, seconds: float):
        self.seconds, self._next = seconds, 0.0

    def due(self) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self.seconds
        return True


class JsonProgress(_Timed):
    """One JSON object a line, told apart by ``type``: message, progress, event and result."""

    def say(self, text: str) -> None:
        self._line("message", {"message": text})

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        start = time.monotonic()
        with counting(text, self.say):
            yield
        self._line("message", {"message": text, "seconds": round(time.monotonic() - start, 3)})

    def update(self, state: State) -> None:
        self._line("progress", state)

    def event(self, adapter: str, event: Any) -> None:
        self._line("event", {"adapter": adapter, **event.to_json()})

    def finish(self, result: State, text: str) -> None:
        self._line("result", result)

    def _line(self, kind: str, values: State) -> None:
        print(json.dumps({"type": kind, **values}), flush=True)


class LineProgress(_Timed):
    """Plain lines."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def stage(self, text: str) -> Any:
        return stage(text, self.say)

    def update(self, state: State) -> None:
        print("  ".join(filter(None, [_served(state), *map(_job, state["jobs"]), _speed(state)])), flush=True)

    def event(self, adapter: str, event: Any) -> None:
        if event.kind != "metrics":
            print(f"{adapter}: {event.message}", flush=True)

    def finish(self, result: State, text: str) -> None:
        print(text, flush=True)


def _served(state: State) -> str:
    text = f"{state['at']:6.1f} s"
    if state["requests"]:
        text += (
            f"  {state['done']}/{state['requests']} requests, {state['running']} running, {state['waiting']} waiting"
        )
    if state["done"]:
        text += f"  TTFT {ms(state['median_ttft_ms'], 0)} ms, TPOT {ms(state['median_tpot_ms'], 1)} ms"
    return text + ("" if state["attainment"] is None else f", SLO {state['attainment']:.1%}")


def _job(job: State) -> str:
    loss = "" if job["loss"] is None else f" loss {job['loss']:.3f}"
    return f"{job['adapter']} {job['status']} {job['step']}/{job['total_steps']}{loss}"


def _speed(state: State) -> str:
    return f"finetuning {state['finetune_tokens_per_s']:.0f} tokens/s" if state["jobs"] else ""


class LiveProgress(_Timed):
    """A panel that is drawn again and again."""

    def __init__(self):
        super().__init__(LIVE_SECONDS)
        from rich.console import Console
        from rich.live import Live

        self.console = Console(highlight=False)
        self._live = Live(console=self.console, auto_refresh=False)
        atexit.register(self._live.stop)  # however the run ends: it hides the cursor
        self._history: dict[str, list[float]] = {"output_tokens_per_s": [], "finetune_tokens_per_s": []}

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        from rich.progress import Progress as Bar
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        start = time.monotonic()
        with Bar(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=self.console) as bar:
            task = bar.add_task(text, total=None)
            with counting(text, lambda line: bar.update(task, description=line), seconds=0.0):
                yield
            bar.stop()
        self.console.print(f"{text}: {time.monotonic() - start:.1f} s", markup=False)

    def update(self, state: State) -> None:
        for name, values in self._history.items():
            values.append(state[name])
            del values[:-HISTORY]
        self._live.start()
        self._live.update(self._panel(state), refresh=True)

    def event(self, adapter: str, event: Any) -> None:
        if event.kind not in ("metrics", "validation"):
            self.console.print(f"{adapter}: {event.message}", markup=False)

    def finish(self, result: State, text: str) -> None:
        self._live.stop()
        self.console.print(text, markup=False)

    def _panel(self, state: State) -> Any:
        from rich.panel import Panel
        from rich.table import Table

        rows = Table.grid(padding=(0, 2))
        if state["requests"]:
            rows.add_row("requests", _bar(state["done"], state["requests"]), _served(state).strip())
        for job in state["jobs"]:
            rows.add_row(job["adapter"], _bar(job["step"], job["total_steps"]), _live_job(job))
        names = {"output_tokens_per_s": "served", "finetune_tokens_per_s": "finetuned"}
        for name, label in names.items():
            if state["requests"] or name != "output_tokens_per_s":
                rows.add_row(label, sparkline(self._history[name]), f"{state[name]:.0f} tokens/s")
        return Panel(rows, title=f"{state['at']:.0f} s", title_align="left")


def _bar(done: int, total: int) -> Any:
    from rich.progress_bar import ProgressBar

    return ProgressBar(total=max(total, 1), completed=done, width=HISTORY)


def _live_job(job: State) -> str:
    text = f"{job['status']}, step {job['step']}/{job['total_steps']}"
    for key, label in (("loss", "loss"), ("validation_loss", "validation")):
        if job[key] is not None:
            text += f", {label} {job[key]:.3f}"
    return text


def sparkline(values: Sequence[float]) -> str:
    """A bar per value, as high as the value beside the greatest."""
    most = max(values, default=0.0)
    return "".join(BARS[round(value / most * (len(BARS) - 1))] if most else BARS[0] for value in values)
