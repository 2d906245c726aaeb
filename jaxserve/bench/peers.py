"""The same requests through transformers' ``generate`` on the CPU, in padded batches: what a user would write today.

The peer gets its best shot: batch sizes are tried and the fastest is kept, once with the requests in order of arrival
and once sorted by output length, which puts requests together that end together, and which no server knows.
A static batch runs until its longest request is done; only tokens that a request asked for count. All requests are
there from the start: arrival times are left out.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.bench.workload import BenchRequest, Workload
from jaxserve.errors import ConfigError

BATCH_SIZES = (8, 16, 32, 64)
SORT_KEYS: dict[str, Callable[[BenchRequest], float]] = {
    "arrival": lambda request: request.arrival_s,
    "output length": lambda request: request.output_tokens,
}


@dataclass(frozen=True, kw_only=True)
class PeerRun:
    """One run of all requests."""

    order: str
    batch_size: int
    duration: float
    cpu_seconds: float
    output_tokens: int  # asked for
    padded_tokens: int  # computed, with those past a request's end
    token_ids: dict[BenchRequest, list[int]]

    @property
    def output_throughput(self) -> float:
        """Tokens per second."""
        return self.output_tokens / self.duration

    def summary(self) -> dict[str, Any]:
        names = (
            "order",
            "batch_size",
            "duration",
            "cpu_seconds",
            "output_tokens",
            "padded_tokens",
            "output_throughput",
        )
        return {name: getattr(self, name) for name in names}


def require_transformers() -> None:
    """Raises ConfigError where PyTorch or transformers is absent."""
    _require("bench.against transformers", "torch", "transformers")


def require_peft(asked: str = "bench.against peft") -> None:
    """Raises ConfigError where PyTorch, transformers or PEFT is absent; ``asked`` says what needs them."""
    _require(asked, "torch", "transformers", "peft")


def _require(asked: str, *names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError([f"{asked}: {name} is not installed; pip install {' '.join(names)}"])


def write_dummy_checkpoint(config_dir: str | Path, directory: str | Path, dtype: str, seed: int) -> None:
    """Random weights for a config.json, as transformers starts and saves them: both sides load the same files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(config_dir)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(directory)


class TransformersPeer:
    """A model directory in transformers, on all processors this process may use."""

    def __init__(self, directory: str | Path, dtype: str, clock: Callable[[], float] = time.perf_counter):
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.clock = clock
        self.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(self.threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config = GenerationConfig()  # no end token: generate() would take it from here

    def run(self, workload: Workload, order: str, batch_size: int) -> PeerRun:
        """Generates for all requests, ``batch_size`` at a time."""
        requests = sorted(workload.requests, key=SORT_KEYS[order])
        batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
        start, cpu = self.clock(), time.process_time()
        token_ids = {r: ids for batch in batches for r, ids in zip(batch, self.generate(batch), strict=True)}
        return PeerRun(
            order=order,
            batch_size=batch_size,
            duration=self.clock() - start,
            cpu_seconds=time.process_time() - cpu,
            output_tokens=workload.total_output_tokens,
            padded_tokens=sum(len(batch) * _longest(batch) for batch in batches),
            token_ids=token_ids,
        )

    def generate(
        self, batch: Sequence[BenchRequest], each_token: Callable[[], bool] = lambda: False
    ) -> list[list[int]]:
        """Greedy tokens of each request, left-padded prompts, end tokens ignored.

        Args:
          each_token: called when every request has one more token; True ends the batch.
        """
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        width, steps = max(len(r.prompt_ids) for r in batch), _longest(batch)
        pads = [width - len(r.prompt_ids) for r in batch]
        ids = torch.tensor([[0] * pad + list(r.prompt_ids) for pad, r in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        config = GenerationConfig(max_new_tokens=steps, do_sample=False, use_cache=True, pad_token_id=0)
        stopping = StoppingCriteriaList([lambda ids, scores, **_: torch.full((len(ids),), each_token())])
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=stopping)
        return [row[: r.output_tokens] for r, row in zip(batch, out[:, width:].tolist(), strict=True)]

    def search(self, workload: Workload, sizes: Sequence[int] = BATCH_SIZES) -> list[PeerRun]:
        """Every order and batch size once, the fastest first."""
        self.generate(workload.requests[:2])
        count = len(workload.requests)
        fitting = sorted({min(size, count) for size in sizes})
        pairs = [(order, size) for size in fitting for order in (SORT_KEYS if size < count else ("arrival",))]
        runs = [self.run(workload, order, size) for order, size in pairs]
        return sorted(runs, key=lambda run: run.duration)


def _longest(batch: Sequence[BenchRequest]) -> int:
    return max(request.output_tokens for request in batch)
