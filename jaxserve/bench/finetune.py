"""``jaxserve bench finetune``: how fast a job trains, alone or side by side with PEFT and PyTorch.

Both sides train the same adapter from the same start on the same batches, and losses are compared. PyTorch gets each
batch in the faster of two ways: padded to its longest example, or example by example without padding. Tokens are those
that the loss is about; padding does not count. The sides take turns.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxserve.adapters.peft_io import save_peft
from jaxserve.bench.engine import NO_MODEL, options_of, room_alone, stage
from jaxserve.bench.peers import require_peft
from jaxserve.bench.random_adapters import check_targets, random_adapter
from jaxserve.bench.serving import (
    beside_peer,
    check_result_file,
    circumstances_of,
    model_directory,
    peer_dtype,
    unused,
    write_result,
    writing_results,
)
from jaxserve.config import Config
from jaxserve.errors import ConfigError, EngineError
from jaxserve.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from jaxserve import Engine

UNUSED: dict[str, str] = dict.fromkeys(
    (
        "bench.trace", "bench.trace_speed", "bench.trace_scaling", "bench.num_prompts", "bench.request_rate",
        "bench.burstiness", "bench.random_input_len", "bench.random_output_len", "bench.random_range_ratio",
        "bench.shared_prefix_len", "bench.max_concurrency", "bench.num_adapters", "bench.lora_assignment",
        "bench.goodput", "bench.save_detailed", "lora.modules",
    ),
    "bench finetune sends no requests and trains one adapter, see bench.finetune_* and bench.adapter_*",
)  # fmt: skip
Examples = Sequence[list[int]]  # token ids


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """One run over all batches."""

    how: str
    seconds: float
    cpu_seconds: float  # of the process: what a busy machine's other work does not change much
    tokens: int
    losses: list[float]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def make_examples(count: int, shortest: int, longest: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids; lengths uniform in [shortest, longest]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, count)
    return [rng.integers(0, vocab_size, int(length)).tolist() for length in lengths]


def train(engine: "Engine", examples: Examples, adapter: str, fields: dict[str, Any]) -> TrainRun:
    """One of our jobs from its first step to its last; its adapter is not kept.

    Raises:
      EngineError: the job failed.
    """
    job = engine.finetune([(ids, None) for ids in examples], adapter=adapter, **fields)
    start, cpu = time.perf_counter(), time.process_time()
    job.wait()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if job.status != "succeeded":
        raise EngineError(f"the job is {job.status}: {job.error}")
    engine.unload_adapter(adapter)
    return TrainRun(how="JaxServe", seconds=seconds, cpu_seconds=cpu, tokens=job.trained_tokens, losses=job.losses)


class Backward(NamedTuple):
    """A part of an optimizer step."""

    tokens: int
    loss: float  # the step's is the sum of its parts
    ends_step: bool


class PeftPeer:
    """The same training in PEFT and PyTorch.

    Args:
      directory: the model; adapter: a PEFT directory, the start of each run.
    """

    def __init__(self, directory: str, adapter: str | Path, dtype: str, config: FinetuneConfig):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.torch, self.config = torch, config
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        self.model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.trained]

    def run(self, batches: Sequence[Examples], padded: bool) -> TrainRun:
        """All batches, from the adapter's start."""
        start, cpu, losses, tokens, loss = time.perf_counter(), time.process_time(), [], 0, 0.0
        for done in self.backwards(batches, padded):
            tokens, loss = tokens + done.tokens, loss + done.loss
            if done.ends_step:
                losses.append(loss)
                loss = 0.0
        return TrainRun(
            how=how(padded),
            seconds=time.perf_counter() - start,
            cpu_seconds=time.process_time() - cpu,
            tokens=tokens,
            losses=losses,
        )

    def backwards(self, batches: Iterable[Examples], padded: bool) -> Iterator[Backward]:
        """The same, bit by bit: the optimizer's update is made with the last backward of its batch."""
        torch, c = self.torch, self.config
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.start, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(self.trained, lr=c.learning_rate, weight_decay=c.weight_decay)
        for batch in batches:
            optimizer.zero_grad()
            total = _num_trained(batch)
            *parts, last = [batch] if padded else [[ids] for ids in batch]
            for part in parts:
                yield Backward(_num_trained(part), self._backward(part, total), ends_step=False)
            loss = self._backward(last, total)
            if c.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.trained, c.max_grad_norm)
            optimizer.step()
            yield Backward(_num_trained(last), loss, ends_step=True)

    def _backward(self, examples: Examples, total: int) -> float:
        torch = self.torch
        longest = max(map(len, examples))
        ids = torch.zeros(len(examples), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(examples):
            ids[row, : len(example)] = labels[row, : len(example)] = torch.tensor(example)
        out = self.model(ids, attention_mask=(labels >= 0).long(), labels=labels)
        loss = out.loss * _num_trained(examples) / total
        loss.backward()
        return float(loss.detach())


def _num_trained(examples: Examples) -> int:
    return sum(len(ids) - 1 for ids in examples)


def how(padded: bool) -> str:
    """A way of PEFT's in words."""
    return "PEFT, padded batches" if padded else "PEFT, one example at a time"


def main(config: Config) -> int:
    """Runs the benchmark that ``config`` describes and prints it."""
    check_result_file(config)
    wrong = unused(config, UNUSED)
    if config.model.path is None:
        wrong.append(NO_MODEL)
    if not config.lora.enable_lora:
        wrong.append("lora.enable_lora is off: nothing can be finetuned")
    if wrong:
        raise ConfigError(wrong)
    if config.bench.against not in ("none", "peft"):
        raise ConfigError([f"bench.against {config.bench.against}: jaxserve bench finetune compares with peft"])
    check_targets(config.bench.adapter_targets)
    if config.bench.against == "peft":
        require_peft()
    with model_directory(config) as path, tempfile.TemporaryDirectory(prefix="jaxserve-bench-") as scratch:
        result = measure(config, path, Path(scratch))
    with writing_results():
        write_result(config, result)
    return 0


def measure(config: Config, path: str, scratch: Path) -> dict[str, Any]:
    """Loads, runs, prints; returns what goes to the result file."""
    from jaxserve import Engine

    bench, peer = config.bench, config.bench.against == "peft"
    options = beside_peer(config, options_of(config, room_alone(config, bench.adapter_rank)))
    with stage("compiling the step's shapes"):
        engine = Engine.from_pretrained(path, **options)
    longest = min(bench.finetune_longest, engine.core.config.max_example_len)
    shortest = min(bench.finetune_shortest, longest)
    examples = make_examples(bench.finetune_examples, shortest, longest, engine.model.vocab_size, bench.seed)
    size, start = bench.finetune_batch, scratch / "start"
    targets = check_targets(bench.adapter_targets)
    save_peft(random_adapter(engine.model, bench.adapter_rank, targets, bench.seed), start)
    fields = {"start": str(start), "schedule": "constant", "shuffle": False, "batch_size": size}
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    train(engine, examples[: 2 * size], "warm-up", fields)
    ours: list[TrainRun] = []
    theirs: list[TrainRun] = []
    other: PeftPeer | None = None
    for repeat in range(bench.repeats):
        ours.append(train(engine, examples, f"run-{repeat}", fields))
        if peer and other is None:
            other = PeftPeer(path, start, peer_dtype(config), FinetuneConfig(**fields))
            other.run(batches[:1], padded=False)
        if other is not None:
            theirs += [other.run(batches, padded) for padded in (True, False)]
    best = max(ours, key=lambda run: run.rate)
    print(
        f"{len(examples)} examples of {shortest} to {longest} tokens, batches of {size}; "
        f"rank {bench.adapter_rank} on {', '.join(targets)}"
    )
    print("\n".join(lines(best, theirs)))
    return {
        **circumstances_of(config),
        "ours": [asdict(run) for run in ours],
        "theirs": [asdict(run) for run in theirs],
        "tokens_per_s": best.rate,
        "ratio": best.rate / max(run.rate for run in theirs) if theirs else None,
    }


def lines(best: TrainRun, theirs: Sequence[TrainRun]) -> list[str]:
    """What is printed: our best run, and theirs of each kind."""
    told = [
        f"{best.how:<28} {best.rate:8.0f} tokens/s {best.tokens / best.cpu_seconds:8.0f} tokens per processor second"
    ]
    for how in dict.fromkeys(run.how for run in theirs):
        run = max((run for run in theirs if run.how == how), key=lambda run: run.rate)
        apart = max(abs(a / b - 1) for a, b in zip(best.losses, run.losses, strict=True))
        told.append(
            f"{how:<28} {run.rate:8.0f} tokens/s {run.tokens / run.cpu_seconds:8.0f} tokens per processor second; "
            f"JaxServe does {best.rate / run.rate:.2f} times as many, losses differ by {apart:.1e} at most"
        )
    return told
