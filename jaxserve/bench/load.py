"""The requests of a co-serving run: arrivals with bursts, and real prompts where there are some."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxserve.adapters.files import strict_json
from jaxserve.assets import locate
from jaxserve.bench.engine import tokenizer_of
from jaxserve.bench.workload import BenchRequest, Row, Workload, clip, make_workload
from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.finetune.errors import DataError
from jaxserve.finetune.records import Problems, read_lines
from jaxserve.tokenizer import Tokenizer

BASE = "base"  # the base model, where adapters are named


def unknown_answers(config: Config, trained: Iterable[str]) -> list[str]:
    """A line for each name in coserve.answer_with that is no adapter's, ``trained`` ones among them."""
    known = {BASE, *(module.name for module in config.lora.modules), *trained}
    return [f"coserve.answer_with: there is no {name!r}" for name in config.coserve.answer_with if name not in known]


class Bursts(NamedTuple):
    """Requests come at ``factor`` times their rate for ``seconds`` of every ``period``, first after half a period."""

    factor: float
    seconds: float
    period: float

    @classmethod
    def of(cls, config: Config) -> "Bursts":
        """Those of made-up requests; a trace has none."""
        options = config.coserve
        factor = options.burst_factor if config.bench.trace is None else 1.0
        return cls(factor, options.burst_seconds, options.burst_period)

    @property
    def gain(self) -> float:
        """Requests in the mean over those that come without bursts."""
        return 1 + (self.factor - 1) * self.seconds / self.period

    def spans(self, end: float) -> list[tuple[float, float]]:
        """(start, end) in seconds of the bursts that begin before ``end``."""
        starts = np.arange(self.period / 2, end, self.period).tolist()
        return [(start, start + self.seconds) for start in starts] if self.factor > 1 else []

    def squeeze(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows, their arrivals closer together in the bursts; gaps outside stay as they are."""
        if self.factor == 1:
            return list(rows)
        last = max((row.arrival_s for row in rows), default=0.0)
        knots = [0.0, *(knot for span in self.spans(last) for knot in span), last + self.period]
        gained = np.diff(knots)
        gained[1::2] *= self.factor  # every second stretch is a burst
        before = np.concatenate([[0.0], np.cumsum(gained)])
        arrivals = np.interp([row.arrival_s for row in rows], before, knots).tolist()
        return [row._replace(arrival_s=arrival) for row, arrival in zip(rows, arrivals, strict=True)]

    def __str__(self) -> str:
        return f"bursts of {self.factor:g} times the rate for {self.seconds:g} s every {self.period:g} s"


def check_prompts(config: Config) -> None:
    """Raises ConfigError where coserve.prompts cannot be read, ModelError for a broken tokenizer."""
    if config.coserve.prompts is not None:
        read_prompts(locate(config.coserve.prompts), tokenizer_of(config))


def read_prompts(path: str, tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """Token ids of the prompts of a JSONL file, each line {"messages": [...]} or {"prompt": "..."}; other keys are
    left alone. Messages end before the assistant's last answer and are rendered by the model's chat template.

    Raises:
      ConfigError: the first ten bad lines, each by its number and reason.
    """
    if tokenizer is None:
        raise ConfigError([f"{path}: text needs a tokenizer, and the model has none"])
    problems, prompts = Problems(), list[tuple[int, ...]]()
    try:
        for number, line in read_lines(path, problems):
            try:
                prompts.append(_prompt(line, tokenizer))
            except (ValueError, TypeError) as error:  # among them what the template and the JSON reader refuse
                problems.add(f"line {number}", str(error).removeprefix(": "))
        problems.check()
    except DataError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.errors]) from None
    if not prompts:
        raise ConfigError([f"{path}: no prompts"])
    return prompts


def _prompt(line: bytes, tokenizer: Tokenizer) -> tuple[int, ...]:
    value = strict_json(line, "")
    if not isinstance(value, dict) or not isinstance(value.get("messages", value.get("prompt")), list | str):
        raise ValueError("must be an object with messages or prompt")
    if "messages" not in value:
        ids = tokenizer.encode(value["prompt"])
    else:
        messages = value["messages"]
        if not all(
            isinstance(m, dict) and (isinstance(m.get("content"), str | list) or m.get("tool_calls")) for m in messages
        ):
            raise ValueError("messages must be objects with role and content")
        asked = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
        asked = [{key: item for key, item in message.items() if key != "weight"} for message in asked]
        ids = tokenizer.apply_chat_template(asked, tools=value.get("tools"))
    if not ids:
        raise ValueError("the prompt is empty")
    return tuple(ids)


def with_prompts(
    rows: Sequence[Row], prompts: Sequence[tuple[int, ...]], *, source: str, max_model_len: int, seed: int = 0
) -> Workload:
    """Gives rows real prompts, whose lengths take the place of the rows': all of them in turn, shuffled."""
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    requests, num_clipped = [], 0
    for number, row in enumerate(rows):
        ids = prompts[order[number % len(order)]]
        asked = row._replace(prompt_tokens=len(ids))
        fitting = clip(asked, max_model_len)
        num_clipped += fitting != asked
        requests.append(
            BenchRequest(
                arrival_s=row.arrival_s,
                prompt_ids=ids[: fitting.prompt_tokens],
                output_tokens=fitting.output_tokens,
                tenant=row.tenant,
            )
        )
    return Workload(requests=tuple(requests), source=source, num_clipped=num_clipped)


def make_load(
    config: Config,
    rows: Sequence[Row],
    source: str,
    names: Sequence[str],
    *,
    vocab_size: int,
    max_model_len: int,
    tokenizer: Tokenizer | None = None,
    seed: int | None = None,
) -> Workload:
    """Rows with prompts, real ones where coserve.prompts names some, dealt out to adapters.

    Args:
      names: of the adapters, ``BASE`` among them for the base model; none: all on the base model.
      tokenizer: for real prompts.
      seed: by default bench.seed.

    Raises:
      ConfigError: of ``read_prompts``.
    """
    bench, prompts = config.bench, config.coserve.prompts
    seed = bench.seed if seed is None else seed
    if prompts is not None and rows:
        source += f", prompts of {prompts}, whose lengths they keep"
        known = read_prompts(locate(prompts), tokenizer)
        load = with_prompts(rows, known, source=source, max_model_len=max_model_len, seed=seed)
    else:
        load = make_workload(
            rows,
            source=source,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            shared_prefix_len=bench.shared_prefix_len,
            seed=seed,
        )
    return load.on_adapters([None if name == BASE else name for name in names], bench.lora_assignment, bench.seed)
