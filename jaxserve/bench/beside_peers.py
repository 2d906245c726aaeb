"""``jaxserve bench peers``: co-serving beside transformers and PEFT that share the same processors by time slices.

Both sides load the same files, get the same requests at the same times for the base model, and train the same adapter
from the same start on the same batches in the same order; what they answer and their losses are compared. Runs of the
two sides take turns in one process. A side's finetuning is also run alone, for the share of it that is kept.
"""

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.adapters.peft_io import save_peft
from jaxserve.bench import sweep
from jaxserve.bench.engine import model_path
from jaxserve.bench.finetune import PeftPeer, how
from jaxserve.bench.peers import TransformersPeer, require_peft, write_dummy_checkpoint
from jaxserve.bench.policies import ALONE
from jaxserve.bench.ran import Asked, Ran, drain_seconds, serving_numbers
from jaxserve.bench.random_adapters import check_targets, random_adapter
from jaxserve.bench.serving import circumstances_of, peer_dtype, write_result, writing_results
from jaxserve.bench.time_sliced import POLICIES, TimeSliced
from jaxserve.bench.workload import NOBODY, Workload
from jaxserve.config import Config
from jaxserve.config.runs import SamplingSection
from jaxserve.config.schema import JobSection
from jaxserve.engine.sizes import objectives
from jaxserve.errors import ConfigError
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.metrics import percent
from jaxserve.models.loader import load_config

if TYPE_CHECKING:
    from jaxserve.bench.live import Live

PEER_ALONE = "peer-finetune-only"
PROBE = "peer-probe"
NAMES = {  # of the kinds of runs
    "coserve": "JaxServe, co-serving",
    "serve-first": "transformers + PEFT, serve-first",
    "alternate": "transformers + PEFT, alternate",
    ALONE: "JaxServe, finetuning alone",
    PEER_ALONE: "PEFT, finetuning alone",
    PROBE: "PEFT, probe",
}
UNUSED = {
    **dict.fromkeys(
        ("coserve.results_dir", "sweep.results_dir"), "bench peers leaves its numbers in bench.result_file"
    ),
    **dict.fromkeys(("sweep.policies", "sweep.rates"), "one rate, bench.request_rate, is run in every way there is"),
    **dict.fromkeys(
        (
            "bench.num_prompts", "bench.trace_speed", "bench.max_concurrency", "bench.against", "bench.num_adapters",
            "bench.save_detailed",
        ),
        "bench peers has no use for it",
    ),
}  # fmt: skip
LOSS_TOLERANCE = 1e-3  # relative; more means that the sides did not do the same work
PROBED_BATCHES = 2
SHOWN_STEPS = 5  # whose losses are printed


def main(config: Config) -> int:
    """Runs the comparison that ``config`` describes and prints it; 1 where the losses of the sides differ."""
    check(config)
    with tempfile.TemporaryDirectory(prefix="jaxserve-bench-") as scratch:
        result = {**circumstances_of(config), **measure(shared(config, Path(scratch)))}
    with writing_results():
        write_result(config, result)
    return 1 if result["losses_agree"] is False else 0


def check(config: Config) -> None:
    """Raises ConfigError for what cannot be run, before anything is loaded."""
    base = "both sides serve the base model"
    wrong = {
        "bench.request_rate: set it; requests come at that rate": config.bench.request_rate is None,
        f"sweep.simulate {config.sweep.simulate}: peers are measured": config.sweep.simulate != "none",
        f"lora.modules: {base}": bool(config.lora.modules),
        f"coserve.answer_with: {base}": bool(config.coserve.answer_with),
        "coserve.jobs: both sides train on made-up examples, see bench.finetune_*": bool(config.coserve.jobs),
        "section job: both sides train with its defaults, see bench.adapter_*": config.job != JobSection(),
        "section sampling: both sides are greedy": config.sampling != SamplingSection(),
    }
    problems = [text for text, holds in wrong.items() if holds]
    try:
        sweep.check(config, UNUSED)
        check_targets(config.bench.adapter_targets)
    except ConfigError as error:
        problems = [*error.errors, *problems]
    if problems:
        raise ConfigError(problems)
    require_peft("bench peers")


def shared(config: Config, scratch: Path) -> Config:
    """What both sides run: a model that both load from the same files in the same dtype, an adapter to start from."""
    path, model, bench, dtype = model_path(config), config.model, config.bench, peer_dtype(config)
    if model.load_format == "dummy":
        write_dummy_checkpoint(path, scratch / "model", dtype, model.seed)
        path = str(scratch / "model")
    targets = check_targets(bench.adapter_targets)
    save_peft(random_adapter(load_config(Path(path)), bench.adapter_rank, targets, bench.seed), scratch / "start")
    job = JobSection(start=str(scratch / "start"), rank=bench.adapter_rank, schedule="constant", shuffle=False)
    files = {"path": path, "load_format": "auto", "dtype": dtype}
    return config.model_copy(
        update={"model": model.model_copy(update=files), "job": job, "sampling": SamplingSection()}
    )


class Peer:
    """The other side: transformers and PEFT on a model directory, on all processors this process may use.

    Trains in the faster of two ways, which a short probe finds: padded batches, or one example at a time.
    """

    def __init__(self, config: Config, examples: Sequence[list[int]], load: Workload):
        assert config.model.path is not None, "check() was not called"
        path, dtype, size = config.model.path, config.model.dtype, config.bench.finetune_batch
        self.config = config
        self.serving = TransformersPeer(path, dtype)
        self.training = PeftPeer(path, config.job.start, dtype, FinetuneConfig(schedule="constant"))
        self.batches = [examples[i : i + size] for i in range(0, len(examples), size)]
        few = self.batches[:PROBED_BATCHES]
        self.training.run(few[:1], padded=False)
        runs = {padded: self.training.run(few, padded) for padded in (True, False)}
        self.probed = {padded: run.rate for padded, run in runs.items()}  # tokens/s
        self.padded = self.probed[True] > self.probed[False]
        self.probe_losses = runs[self.padded].losses
        self.serving.generate(load.requests[:2])

    def run(self, policy: str, load: Workload) -> Ran:
        """One run; see ``time_sliced``."""
        return TimeSliced(
            self.serving.generate,
            self.training.backwards(itertools.cycle(self.batches), self.padded),
            policy,
            load,
            seconds=self.config.sweep.seconds,
            drain_seconds=drain_seconds(objectives(self.config.engine_config())[""], load.requests),
            max_batch=self.config.engine.max_num_seqs,
        )()


def measure(config: Config) -> dict[str, Any]:
    """Loads, runs, prints; returns what goes to the result file.

    Args:
      config: of ``shared``.
    """
    from jaxserve.bench.live import Live

    live = Live(config)
    assert config.bench.request_rate is not None, "check() was not called"
    load = live.workload("", config.bench.request_rate, config.sweep.seconds)
    peer = Peer(config, live.examples(), load)
    goals = sweep.goals_of(config)
    print("\n".join(preface(config, peer, load, goals)), flush=True)
    runs = [run_sides(live, peer, load, turn) for turn in range(config.bench.repeats)]
    found = [row for turn, kinds in enumerate(runs) for row in numbers(kinds, goals, turn)]
    tokens = [same_tokens(kinds["coserve"].requests, kinds[policy].requests) for kinds in runs for policy in POLICIES]
    losses = {kind: list(*ran.losses.values()) for kind, ran in runs[0].items()} | {PROBE: peer.probe_losses}
    apart = difference(losses)
    print("\n".join([HEADER, *map(line, found), *loss_lines(losses, apart), *token_lines(tokens)]))
    return {
        "source": load.source,
        "num_requests": len(load.requests),
        "objectives_ms": {name: goal * 1000 for name, goal in goals.items()},
        "peer_threads": peer.serving.threads,
        "peer_trains": how(peer.padded),
        "peer_probe_tokens_per_s": {how(padded): rate for padded, rate in peer.probed.items()},
        "runs": found,
        "losses": losses,
        "losses_difference": apart,
        "losses_agree": None if apart is None else apart <= LOSS_TOLERANCE,
        "same_tokens": tokens,
    }


def run_sides(live: "Live", peer: Peer, load: Workload, turn: int) -> dict[str, Ran]:
    """Every kind of run once, the sides in turn."""
    rate = live.config.bench.request_rate
    assert rate is not None, "check() was not called"

    def ours(sharing: str, rate: float) -> Ran:
        return live.watched(f"{sharing} {turn}", sharing, rate)  # its requests find no other turn's in the cache

    return {
        "coserve": ours("coserve", rate),
        "serve-first": peer.run("serve-first", load),
        ALONE: ours(ALONE, 0.0),
        "alternate": peer.run("alternate", load),
        PEER_ALONE: peer.run("serve-first", NOBODY),
    }


# numbers


def numbers(kinds: Mapping[str, Ran], goals: Mapping[str, float], turn: int) -> list[dict[str, Any]]:
    """Every run of one turn as JSON; rates count what was done while requests came."""
    rows = []
    for kind, ran in kinds.items():
        alone = kinds[ALONE if kind in (ALONE, "coserve") else PEER_ALONE].finetune_rate
        rows.append(
            {
                "kind": kind,
                "side": NAMES[kind],
                "turn": turn,
                **serving_numbers(ran.requests, ran.seconds, goals),
                "finetune_tokens_per_s": ran.finetune_rate,
                "finetuning_kept": ran.finetune_rate / alone if alone else None,
                "optimizer_steps": sum(map(len, ran.losses.values())),
                "seconds": ran.seconds,
                "duration": ran.duration,
                "cpu_seconds": ran.cpu_seconds,
            }
        )
    return rows


def difference(losses: Mapping[str, Sequence[float]]) -> float | None:
    """How far losses are from those of the first run's same steps at most, relative; None where none is the same."""
    first, *others = losses.values()
    return max((abs(b / a - 1) for other in others for a, b in zip(first, other, strict=False)), default=None)


def same_tokens(ours: Sequence[Asked], theirs: Sequence[Asked]) -> dict[str, int]:
    """Of the requests that both sides answered whole, those with the same tokens."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.error is None and b.error is None]
    return {"same": sum(a.token_ids == b.token_ids for a, b in both), "answered_by_both": len(both)}


# text


def preface(config: Config, peer: Peer, load: Workload, goals: Mapping[str, float]) -> list[str]:
    """What is run, in words."""
    bench, probed = config.bench, ", ".join(f"{how(padded)} {rate:.0f}" for padded, rate in peer.probed.items())
    said = " and ".join(f"{name.upper()} <= {goal * 1000:g} ms" for name, goal in goals.items())
    return [
        f"load: {len(load.requests)} requests in {config.sweep.seconds:g} s; {load.source}; objectives: {said}",
        f"training: batches of {bench.finetune_batch} examples, rank {bench.adapter_rank}; the peer on "
        f"{peer.serving.threads} threads, probed in tokens/s: {probed}; answers in batches of up to "
        f"{config.engine.max_num_seqs}",
    ]


HEADER = (
    f"{'':<34}{'finetune':>9} {'kept':>5} {'answered':>9} {'SLO met':>8} {'TTFT p50':>9} {'p99':>8} {'TPOT p50':>9} "
    f"{'p99':>7} {'output':>8} {'CPU':>6}\n"
    f"{'':<34}{'tokens/s':>9} {'':>5} {'':>9} {'':>8} {'ms':>9} {'ms':>8} {'ms':>9} {'ms':>7} {'tokens/s':>8} {'s':>6}"
)


def line(row: Mapping[str, Any]) -> str:
    """One row of the table."""

    def ms(name: str, kind: str) -> str:
        values = row[f"{name}_ms"]
        return f"{values[kind]:.1f}" if values else "-"

    return (
        f"{row['side']:<34}{row['finetune_tokens_per_s']:>9.0f} {percent(row['finetuning_kept'], 0):>5} "
        f"{row['completed']:>4}/{row['requests']:<4} {percent(row['attainment']):>8} {ms('ttft', 'p50'):>9} "
        f"{ms('ttft', 'p99'):>8} {ms('tpot', 'p50'):>9} {ms('tpot', 'p99'):>7} {row['output_tokens_per_s']:>8.1f} "
        f"{row['cpu_seconds']:>6.0f}"
    )


def loss_lines(losses: Mapping[str, Sequence[float]], apart: float | None) -> list[str]:
    """The first losses side by side."""
    if apart is None:
        return ["losses: JaxServe made no optimizer step; give it more seconds"]
    said = "" if apart <= LOSS_TOLERANCE else f", MORE THAN {LOSS_TOLERANCE:g}: not the same training"
    rows = [
        f"  {NAMES[kind]:<34}{len(found):>4} " + " ".join(f"{loss:.6f}" for loss in found[:SHOWN_STEPS])
        for kind, found in losses.items()
    ]
    return [f"optimizer steps and their first losses; the same steps differ by {apart:.1e} at most{said}", *rows]


def token_lines(found: Sequence[Mapping[str, int]]) -> list[str]:
    pairs = zip(itertools.cycle(POLICIES), found, strict=False)
    return [
        f"{each['same']} of {each['answered_by_both']} requests that co-serving and {policy} answered: the same tokens"
        for policy, each in pairs
    ]
