"""``jaxserve demo``: the model and the data that come with the package, served in bursts while two adapters learn."""

from pathlib import Path

from jaxserve.assets import PROMPTS
from jaxserve.bench.load import Bursts
from jaxserve.cli.coserve import run
from jaxserve.config import Config

TITLE = "JaxServe demo: one model serves while two adapters learn"
RATE = 1.5  # requests per second between bursts
BURSTS = Bursts(factor=10.0, seconds=3.0, period=12.0)
STEPS = 50  # of each job: enough for both styles to show


def main(out: str, seconds: float, json_lines: bool) -> int:
    """Runs it and says where the report is; the status is that of ``jaxserve coserve``."""
    return run(settings(out, seconds), json_lines, TITLE, PROMPTS)


def settings(out: str, seconds: float) -> Config:
    """The run, as ``jaxserve coserve`` takes it; sizes are such that few step shapes have to be compiled."""
    return Config.model_validate(
        {
            "model": {"path": "demo:storyteller", "dtype": "float32", "max_model_len": 128},
            "engine": {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 16},
            "lora": {"max_lora_rank": 16},
            "finetune": {"finetune_window": 64, "tpot_objective_ms": 40.0, "ttft_objective_ms": 1000.0},
            "job": {
                "rank": 16,
                "alpha": 32.0,
                "learning_rate": 3e-3,
                "schedule": "cosine",
                "warmup_steps": 5,
                "batch_size": 8,
                "max_steps": STEPS,
                "validation_fraction": 0.1,
            },
            "coserve": {
                "jobs": ["pirate=demo:pirate", "cards=demo:cards"],
                "prompts": "demo:pirate",
                "burst_factor": BURSTS.factor,
                "burst_seconds": BURSTS.seconds,
                "burst_period": BURSTS.period,
                "results_dir": str(Path(out)),
            },
            "bench": {
                "num_prompts": num_requests(seconds),
                "request_rate": RATE,
                "random_output_len": 32,
                "seed": 1,
            },
        }
    )


def num_requests(seconds: float) -> int:
    """About as many as come in so many seconds, bursts included."""
    inside = sum(min(end, seconds) - start for start, end in BURSTS.spans(seconds))
    return max(round(RATE * (seconds + (BURSTS.factor - 1) * inside)), 1)
