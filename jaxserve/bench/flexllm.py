"""``jaxserve bench flexllm``: FlexLLM's tables (arXiv 2402.18789, section 8) rebuilt on the virtual clock.

Theirs are the models, the objectives, the rates per replica and adapters of rank 16 on down_proj; all linear layers are
ours. Every way to share the devices runs in the same scheduler. Matrix products on the A100 are taken to reach 55 % of
the data sheet, on newer devices the roofline's own share.

Their requests are taken to be like ShareGPT's, with the means of vLLM's paper; that lengths spread evenly within half
of the mean and arrivals are Poisson is assumed. A second set of tables has Azure's lengths: prompts seven times as
long. Their examples are Sky-T1's, up to 8,192 tokens, ours have 256 to 2,048.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.bench.arrivals import rows_at
from jaxserve.bench.parallel import Pool
from jaxserve.bench.policies import ALONE, ENOUGH, OURS, Runs, claims, numbers
from jaxserve.bench.roofline import linear_params
from jaxserve.bench.serving import check_results_dir, writing_results
from jaxserve.bench.sweep import HEADER, claim_lines, goals_of, line
from jaxserve.bench.virtual import Virtual
from jaxserve.config import Config
from jaxserve.config.runs import SweepSection
from jaxserve.errors import ConfigError

TABLES = "tables.json"
RATES = (1.0, 2.0, 3.0, 4.0, 5.0)  # requests per second and replica
POLICIES = SweepSection().policies
TTFT_MS = 5000.0
TARGETS = {"down_proj": ("down_proj",), "all-linear": "all-linear"}
STASH_TOKENS = 4096  # two examples of the longest
WINDOW = {"a100-80gb": 512}  # rows of a backward: what is left of a step in 45 to 75 ms lies within its sizes
MATMUL = {"a100-80gb": 0.55}


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of requests, uniform within half of them."""

    prompt: int
    output: int
    source: str


LENGTHS = {
    "sharegpt": Lengths(161, 338, "ShareGPT as vLLM's paper has it, arXiv 2309.06180, section 6.1: like FlexLLM's"),
    "azure": Lengths(1155, 211, "Azure's conversations of 2023, Splitwise, arXiv 2311.18677: longer than FlexLLM's"),
}
# What is asked of co-serving: times the best other way; of adapters on down_proj with FlexLLM's lengths, for 8B, times
# what they published, and the share kept of finetuning alone at the highest rate.
TIMES_OTHER, TIMES_PUBLISHED, KEPT = 1.2, 1.8, {"a100-80gb": 0.68, "h200": 0.85}


@dataclass(frozen=True)
class Setting:
    """One of their models."""

    directory: str
    devices: int
    tpot_ms: float
    published: dict[float, float]  # finetune tokens/s on A100 80GB, down_proj, by requests per second


SETTINGS = (
    Setting("llama-3.1-8b", 1, 45.0, {1.0: 2352, 5.0: 1799}),
    Setting("qwen2.5-14b", 2, 75.0, {1.0: 941, 5.0: 555}),
    Setting("qwen2.5-32b", 4, 75.0, {1.0: 803, 5.0: 559}),
)


def main(
    out: str, models: str, seconds: float, devices: Sequence[str], lengths: Sequence[str], trace: str | None
) -> int:
    """Simulates and prints every table; leaves tables.json.

    Args:
      devices, lengths: by default all; a trace has its own lengths.
    """
    directories = [Path(models) / setting.directory for setting in SETTINGS]
    missing = [str(path) for path in directories if not path.is_dir()]
    if missing:
        raise ConfigError([f"--models {models}: no {', '.join(missing)}"])
    if trace and lengths:
        raise ConfigError([f"--lengths {lengths[0]}: the requests of --trace have their own"])
    check_results_dir("--out", out)
    found, begun = [], deque()
    with Pool() as pool:
        for load in [trace] if trace else lengths or LENGTHS:
            for device in devices or ("a100-80gb", "h200"):
                for setting, path in zip(SETTINGS, directories, strict=True):
                    for targets in TARGETS:
                        begun.append(Table(setting, path, device, targets, seconds, load, pool))
                        if len(begun) > 1:  # the processes never wait for one table's last run
                            found.append(begun.popleft().told())
                            _leave(found, out)
        for each in begun:
            found.append(each.told())
            _leave(found, out)
    print("\n".join(["", *asked_lines(found), f"tables: {Path(out) / TABLES}"]))
    return 0


def _leave(found: Sequence[dict[str, Any]], out: str) -> None:
    """Writes the tables so far: all of them take long, and may be stopped."""
    with writing_results():
        (Path(out) / TABLES).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def config_of(setting: Setting, path: Path, device: str, targets: str, seconds: float, load: str) -> Config:
    """What is simulated of one model.

    Args:
      load: a name of ``LENGTHS``, or the path of a trace.
    """
    requests: dict[str, Any] = {"trace": load}
    if load in LENGTHS:
        means = LENGTHS[load]
        requests = {
            "random_input_len": means.prompt,
            "random_output_len": means.output,
            "random_range_ratio": 0.5,
        }
    sections: dict[str, Any] = {
        "model": {"path": str(path), "max_model_len": 8192},
        "engine": {"tensor_parallel": setting.devices, "max_num_seqs": 256},
        "finetune": {
            "finetune_window": WINDOW.get(device, 2048),
            "finetune_stash_tokens": STASH_TOKENS,
            "tpot_objective_ms": setting.tpot_ms,
            "ttft_objective_ms": TTFT_MS,
        },
        "job": {"rank": 16, "target_modules": TARGETS[targets]},
        "bench": {"finetune_shortest": 256, "finetune_longest": 2048, **requests},
        "sweep": {
            "simulate": device,
            "seconds": seconds,
            "rates": RATES,
            "policies": POLICIES,
            "matmul_efficiency": MATMUL.get(device),
        },
    }
    return Config(**sections)


class Table:
    """One model on one device with one choice of layers, at every rate and under every policy; its runs are begun."""

    def __init__(self, setting: Setting, path: Path, device: str, targets: str, seconds: float, load: str, pool: Pool):
        self.setting, self.device, self.targets, self.load = setting, device, targets, load
        self.config = config_of(setting, path, device, targets, seconds, load)
        self.virtual = Virtual.of(self.config)
        cells = [(ALONE, RATES[0]), *((policy, rate) for rate in RATES for policy in POLICIES)]
        self.runs = Runs(pool.backend(self.virtual, cells))

    def told(self) -> dict[str, Any]:
        """Prints the table as its runs end, and returns it."""
        setting, device, targets, load, runs = self.setting, self.device, self.targets, self.load, self.runs
        means = LENGTHS.get(load)
        if means is None:
            said = f"at the first rate, {rows_at(self.config, RATES[0], self.config.sweep.seconds)[1]}"
        else:
            said = f"{means.prompt} prompt and {means.output} output tokens on average ({means.source}); "
            said += "gaps are exponential"
        print(
            f"\n{setting.directory} on {setting.devices} x {device}, adapters on {targets}, "
            f"TPOT <= {setting.tpot_ms:g} ms"
            f"\nRequests: {said}."
        )
        print("\n".join(self.virtual.assumptions()))
        print(HEADER, flush=True)
        goals, alone = goals_of(self.config), runs.cell(ALONE, RATES[0]).finetune_rate
        cells = []
        for rate in RATES:
            for policy in POLICIES:
                cells.append(numbers(runs.cell(policy, rate), goals, alone))
                print(line(cells[-1]), flush=True)
        found = {
            "model": setting.directory,
            "device": device,
            "devices": setting.devices,
            "targets": targets,
            "requests": load,
            "assumptions": self.virtual.assumptions(),
            "cells": cells,
            "claims": claims(cells),
            "published": setting.published if (device, targets) == ("a100-80gb", "down_proj") else {},
        }
        lines = [*claim_lines(found["claims"]), *_beside_published(found), *_left(cells, runs, alone, self.virtual)]
        print("\n".join(lines), flush=True)
        return found


def asked_lines(tables: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Where the tables reach what is asked of co-serving, and where they do not."""
    claimed = [(found, claim) for found in tables for claim in found["claims"] if claim["requests_alone_meet"]]
    met = sum((claim["coserve_attainment"] or 0.0) >= ENOUGH for _, claim in claimed)
    yield (
        f"of {len(claimed)} cells in which requests alone meet their objectives for {ENOUGH:.0%}, co-serving does "
        f"in {met}"
    )
    for found in tables:
        here = [claim for table, claim in claimed if table is found and claim["times_best_other"] is not None]
        yield (
            f"  {found['requests']}, {found['model']}, {found['device']}, {found['targets']}: times the best other "
            + ", ".join(
                f"{claim['times_best_other']:.2f} ({claim['coserve_policy']} over {claim['best_other']})"
                for claim in here
            )
            + f"; at least {TIMES_OTHER:g} in {sum(claim['times_best_other'] >= TIMES_OTHER for claim in here)} "
            f"of {len(here)}"
        )
    for found in tables:
        if (found["requests"], found["model"], found["targets"]) != ("sharegpt", SETTINGS[0].directory, "down_proj"):
            continue
        ours = {cell["rate"]: cell for cell in found["cells"] if cell["policy"] == OURS}
        kept, wanted = ours[RATES[-1]]["finetuning_kept"], KEPT.get(found["device"])
        yield (
            f"8B with lengths like FlexLLM's on {found['device']}: kept at {RATES[-1]:g} requests/s {kept:.1%}"
            + (f" of {wanted:.0%} asked" if wanted else "")
            + "".join(
                f"; times published at {rate:g}: {ours[rate]['finetune_tokens_per_s'] / theirs:.2f} of "
                f"{TIMES_PUBLISHED:g} asked"
                for rate, theirs in found["published"].items()
            )
        )


def _left(cells: Iterable[dict[str, Any]], runs: Runs, alone: float, virtual: Virtual) -> Iterator[str]:
    """What co-serving keeps, and what could be kept at most if prompts cost the time of their products alone, and
    decoding rode along for nothing."""
    devices = virtual.config.engine.tensor_parallel
    token_seconds = 2 * linear_params(virtual.model) / (virtual.device.flops * virtual.efficiency.matmul * devices)
    for cell in cells:
        ran = runs.cell(cell["policy"], cell["rate"]).serving
        if cell["policy"] != OURS or ran is None:
            continue
        prompts = sum(step.mix.prefill for step in ran.steps if step.end <= ran.seconds) / ran.seconds / ran.replicas
        kept = cell["finetune_tokens_per_s"] / alone
        yield (
            f"at {cell['rate']:g} requests/s co-serving keeps {kept:.0%} of finetuning alone; the products "
            f"of the prompts leave {max(1 - prompts * token_seconds, 0):.0%} at most"
        )


def _beside_published(found: dict[str, Any]) -> Iterator[str]:
    ours = {cell["rate"]: cell["finetune_tokens_per_s"] for cell in found["cells"] if cell["policy"] == OURS}
    for rate, theirs in found["published"].items():
        yield (
            f"at {rate:g} requests/s FlexLLM published {theirs:g} tokens/s, measured, with requests and examples of "
            f"their own; simulated here {ours[rate]:.0f}, {ours[rate] / theirs:.2f} times"
        )
