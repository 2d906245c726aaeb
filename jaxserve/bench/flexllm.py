"""``jaxserve bench flexllm``: FlexLLM's tables (arXiv 2402.18789, section 8) rebuilt on the virtual clock.

Their models, objectives and rates per replica; every way to share the devices in the same scheduler. Adapters of rank
16 on down_proj alone, as theirs, and on all linear layers. Matrix products on the A100 are taken to reach 55 % of the
data sheet, on newer devices the roofline's own share.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.bench.policies import ALONE, REQUESTS, Runs, claims, numbers
from jaxserve.bench.sweep import HEADER, claim_lines, goals_of, line
from jaxserve.bench.virtual import Virtual
from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.models.loader import load_config

RATES = (1.0, 2.0, 3.0, 4.0, 5.0)  # requests per second and replica
POLICIES = (
    "coserve", "temporal:64", "temporal:128", "temporal:512", "temporal-dynamic", "separate:25", "separate:50",
    "separate:75", "spatial", REQUESTS, ALONE,
)  # fmt: skip
TTFT_MS = 5000.0
TARGETS = {"down_proj": ("down_proj",), "all-linear": "all-linear"}
STASH_TOKENS = 4096  # two examples of the longest
MATMUL = {"a100-80gb": 0.55}
LENGTHS = {
    "random_input_len": 1155,
    "random_output_len": 211,
    "random_range_ratio": 0.5,
}  # means of Azure's trace of 2023


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


def main(out: str, models: str, seconds: float, devices: Sequence[str], trace: str | None) -> int:
    """Simulates and prints every table; leaves tables.json."""
    directories = [Path(models) / setting.directory for setting in SETTINGS]
    missing = [str(path) for path in directories if not path.is_dir()]
    if missing:
        raise ConfigError([f"--models {models}: no {', '.join(missing)}"])
    found = []
    for device in devices or ("a100-80gb", "h200"):
        for setting, path in zip(SETTINGS, directories, strict=True):
            for targets in TARGETS:
                found.append(table(setting, path, device, targets, seconds, trace))
    place = Path(out)
    place.mkdir(parents=True, exist_ok=True)
    (place / "tables.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"tables: {place / 'tables.json'}")
    return 0


def config_of(setting: Setting, path: Path, device: str, targets: str, seconds: float, trace: str | None) -> Config:
    """What is simulated of one model."""
    sections: dict[str, Any] = {
        "model": {"path": str(path), "max_model_len": 8192},
        "engine": {"tensor_parallel": setting.devices, "max_num_seqs": 256},
        "finetune": {
            "finetune_window": 2048,
            "finetune_stash_tokens": STASH_TOKENS,
            "tpot_objective_ms": setting.tpot_ms,
            "ttft_objective_ms": TTFT_MS,
        },
        "job": {"rank": 16, "target_modules": TARGETS[targets]},
        "bench": {"finetune_shortest": 256, "finetune_longest": 2048, **({"trace": trace} if trace else LENGTHS)},
        "sweep": {
            "simulate": device,
            "seconds": seconds,
            "rates": RATES,
            "policies": POLICIES,
            "matmul_efficiency": MATMUL.get(device),
        },
    }
    return Config(**sections)


def table(setting: Setting, path: Path, device: str, targets: str, seconds: float, trace: str | None) -> dict[str, Any]:
    """One model on one device with one choice of layers, at every rate and under every policy."""
    config = config_of(setting, path, device, targets, seconds, trace)
    backend = Virtual(config=config, model=load_config(path))
    print(
        f"\n{setting.directory} on {setting.devices} x {device}, adapters on {targets}, TPOT <= {setting.tpot_ms:g} ms"
    )
    print("\n".join(backend.assumptions()))
    print(HEADER, flush=True)
    runs, goals = Runs(backend), goals_of(config)
    alone = runs.cell(ALONE, RATES[0]).finetune_rate
    cells = []
    for rate in RATES:
        for policy in POLICIES:
            cells.append(numbers(runs.cell(policy, rate), goals, alone))
            print(line(cells[-1]), flush=True)
    claimed = claims(cells)
    print("\n".join([*claim_lines(claimed), *_beside_published(setting, device, targets, cells)]))
    print("\n".join(_left(cells, runs, alone)))
    return {
        "model": setting.directory,
        "device": device,
        "devices": setting.devices,
        "targets": targets,
        "assumptions": backend.assumptions(),
        "cells": cells,
        "claims": claimed,
        "published": setting.published if (device, targets) == ("a100-80gb", "down_proj") else {},
    }


def _left(cells: Iterable[dict[str, Any]], runs: Runs, alone: float) -> Iterator[str]:
    """What co-serving keeps, and what could be kept at most if prompts cost their products alone: a prompt's token runs
    half of those that a trained one does (2 of 4 P), and decoding rides along for nothing."""
    for cell in cells:
        ran = runs.cell(cell["policy"], cell["rate"]).serving
        if cell["policy"] != "coserve" or ran is None:
            continue
        prompts = sum(step.mix.prefill for step in ran.steps if step.end <= ran.seconds) / ran.seconds / ran.replicas
        kept = cell["finetune_tokens_per_s"] / alone
        yield (
            f"at {cell['rate']:g} requests/s co-serving keeps {kept:.0%} of finetuning alone; the products "
            f"of the prompts leave {max(1 - prompts / 2 / alone, 0):.0%} at most"
        )


def _beside_published(setting: Setting, device: str, targets: str, cells: Iterable[dict[str, Any]]) -> Iterator[str]:
    if (device, targets) != ("a100-80gb", "down_proj"):
        return
    ours = {cell["rate"]: cell["finetune_tokens_per_s"] for cell in cells if cell["policy"] == "coserve"}
    for rate, theirs in setting.published.items():
        yield (
            f"at {rate:g} requests/s FlexLLM published {theirs:g} tokens/s, measured, with prompts of their own; "
            f"simulated here {ours[rate]:.0f}, {ours[rate] / theirs:.2f} times"
        )
