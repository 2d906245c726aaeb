"""``jaxserve bench serving``: a trace or made-up load against the engine, alone or side by side with a peer."""

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.bench.compare import Comparison, against_base, against_transformers, fastest
from jaxserve.bench.engine import model_path, options_of, stage
from jaxserve.bench.peers import TransformersPeer, require_transformers, write_dummy_checkpoint
from jaxserve.bench.random_adapters import check_targets, random_adapter
from jaxserve.bench.report import Run, detail, failures, metrics, text_block
from jaxserve.bench.runner import GREEDY, Runner
from jaxserve.bench.workload import Row, Workload, from_first, make_workload, random_rows, read_trace, rescale
from jaxserve.config import Config, dump_config
from jaxserve.errors import ConfigError, EngineError
from jaxserve.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxserve import Engine

PACKAGES = ("jaxserve", "jax", "jaxlib", "numpy", "torch", "transformers", "peft")
WARM_UP_TOKENS = 4
NOT_SAMPLED = {
    "sampling.max_tokens": "the load says how long answers are",
    "sampling.n": "a request of a benchmark has one answer, whose latencies are the request's",
}
PEERS = ("transformers", "peft")  # what bench.against names that loads the model itself


def main(config: Config) -> int:
    """Runs the benchmark that ``config`` describes and prints it; 0, or 1 where a request failed."""
    check(config)
    with model_directory(config) as path:
        result = measure(config, path)
    with writing_results():
        write_result(config, result)
    return 1 if result["failed"] else 0


def check(config: Config) -> None:
    """Raises ConfigError for what cannot be run, before anything is loaded."""
    check_result_file(config)
    wrong = unused(config, {**NOT_SAMPLED, **not_timed(config)})
    if wrong:
        raise ConfigError(wrong)
    bench, adapters = config.bench, config.bench.num_adapters or len(config.lora.modules)
    model_path(config)
    check_targets(bench.adapter_targets)
    if adapters and not config.lora.enable_lora:
        key = "bench.num_adapters" if bench.num_adapters else "lora.modules"
        raise ConfigError([f"{key}: lora.enable_lora is off"])
    if bench.against == "base" and not adapters:
        raise ConfigError(["bench.against base compares adapters with the base alone; set bench.num_adapters"])
    if bench.against == "peft":
        raise ConfigError(["bench.against peft is for bench finetune; serving compares with transformers or base"])
    if bench.against == "transformers":
        if adapters:
            raise ConfigError(["bench.against transformers runs the base model; leave the adapters out"])
        if sampling(config) != GREEDY:
            raise ConfigError(["bench.against transformers is greedy and goes on after end tokens; leave sampling out"])
        if bench.request_rate is not None:
            raise ConfigError(["bench.against transformers has all requests at once; leave bench.request_rate out"])
        require_transformers()


def check_result_file(config: Config) -> None:
    """Raises ConfigError where the result file cannot be written; makes its folder."""
    if config.bench.result_file is None:
        return
    file = Path(config.bench.result_file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        file.open("a").close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise ConfigError([f"bench.result_file {str(file)!r} cannot be written: {error.strerror}"]) from None


def check_results_dir(key: str, directory: str | None) -> None:
    """Raises ConfigError where a directory that ``key`` names takes no files; makes it."""
    if directory is None:
        return
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ConfigError([f"{key} {directory!r} cannot be written: {error.strerror}"]) from None


def not_timed(config: Config) -> dict[str, str]:
    """Keys that say nothing about when requests come, and why, for ``unused``."""
    if config.bench.trace is None:
        return dict.fromkeys(("bench.trace_speed", "bench.trace_scaling"), "there is no bench.trace")
    return {
        "bench.request_rate": "the trace has its own, which bench.trace_speed changes",
        "coserve.burst_factor": "the trace has its own bursts",
    }


def unused(config: Config, reasons: Mapping[str, str]) -> list[str]:
    """Lines for the keys that a command has no use for but were given, with the reason of each.

    Args:
      reasons: by "section.key". A key with its default was not given: `jaxserve config show` writes them all.
    """
    lines = []
    for name, reason in reasons.items():
        section, key = name.split(".")
        options = getattr(config, section)
        if getattr(options, key) != type(options).model_fields[key].default:
            lines.append(f"{name}: {reason}")
    return lines


def write_result(config: Config, result: dict[str, Any]) -> None:
    """To the result file, where there is to be one; ``check_result_file`` made its folder."""
    if config.bench.result_file is not None:
        Path(config.bench.result_file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@contextmanager
def writing_results() -> Iterator[None]:
    """Raises EngineError, which is one line, for what the disk refuses after a run."""
    try:
        yield
    except OSError as error:
        raise EngineError(f"not all results were written: {error}") from None


def write_config(config: Config, place: Path) -> None:
    """Writes config.yaml: the keys that were given. A run makes the others fit them; results.json has them all."""
    given = config.model_dump(mode="json", exclude_unset=True)
    (place / "config.yaml").write_text(dump_config(given, "yaml"), encoding="utf-8")


@contextmanager
def model_directory(config: Config) -> Iterator[str]:
    """Where the weights are; beside a peer, dummy ones are written out first, so that both sides have the same."""
    path, model = model_path(config), config.model
    if config.bench.against not in PEERS or model.load_format != "dummy":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="jaxserve-bench-") as directory:
        write_dummy_checkpoint(path, directory, peer_dtype(config), model.seed)
        yield directory


def peer_dtype(config: Config) -> str:
    return "float32" if config.model.dtype == "auto" else config.model.dtype


def beside_peer(config: Config, options: dict[str, Any]) -> dict[str, Any]:
    """An engine's options; beside a peer it loads the same files in the same dtype."""
    if config.bench.against not in PEERS:
        return options
    return options | {"load_format": "auto", "dtype": peer_dtype(config)}


def measure(config: Config, path: str) -> dict[str, Any]:
    """Loads, runs, prints; returns what goes to the result file."""
    rows, source = rows_of(config)
    if config.bench.trace is not None and config.bench.against == "transformers":
        rows, source = [row._replace(arrival_s=0.0) for row in rows], f"{source}, all at once as for transformers"
    with stage("compiling the step's shapes"):
        engine = make_engine(config, path)
    names = make_adapters(config, engine)
    workload = make_workload(
        rows,
        source=source,
        vocab_size=engine.model.vocab_size,
        max_model_len=engine.core.config.max_model_len,
        shared_prefix_len=config.bench.shared_prefix_len,
        seed=config.bench.seed,
    ).on_adapters(names, config.bench.lora_assignment, config.bench.seed)
    print(f"load: {workload.source}; {workload.num_clipped} of {len(workload.requests)} clipped to the model's length")
    if config.bench.num_adapters:
        bench, targets = config.bench, ", ".join(check_targets(config.bench.adapter_targets))
        print(f"adapters: {bench.num_adapters} of rank {bench.adapter_rank} on {targets}, {bench.lora_assignment}")
    run_load(config, engine, warm_up_load(workload, engine.config.max_num_seqs))
    ours, (lines, comparison) = run_sides(config, engine, workload, path)
    numbers = metrics(fastest(ours), config.bench.goodput)
    print("\n".join([text_block(numbers), *failures(fastest(ours).requests), *lines]))
    details = detail(fastest(ours)) if config.bench.save_detailed else {}
    return {**circumstances(config, workload), **numbers, **comparison, **details}


def make_engine(config: Config, path: str) -> "Engine":
    """The engine with the named adapters, and room for the random ones where the user left that open."""
    from jaxserve import Engine

    bench, lora, room = config.bench, config.lora, dict[str, Any]()
    if bench.num_adapters:
        count = bench.num_adapters + len(lora.modules)
        room = {
            "max_loras": count,
            "max_cpu_loras": max(count, lora.max_cpu_loras),
            "max_lora_rank": bench.adapter_rank,
        }
    options = beside_peer(config, options_of(config, room))
    return Engine.from_pretrained(path, adapters=dict(lora.modules), **options)


def make_adapters(config: Config, engine: "Engine") -> list[str]:
    """Makes the random adapters; the names of all."""
    bench, targets = config.bench, check_targets(config.bench.adapter_targets)
    names = [f"random-{i}" for i in range(bench.num_adapters)]
    for i, name in enumerate(names):
        engine.put_adapter(name, random_adapter(engine.model, bench.adapter_rank, targets, bench.seed + i))
    return [module.name for module in config.lora.modules] + names


def trace_rows(config: Config) -> tuple[list[Row], str]:
    """The rows of the trace, and where they come from in words."""
    bench = config.bench
    assert bench.trace is not None, "no trace"
    rows, since = from_first(read_trace(bench.trace, bench.num_prompts))
    rows = rescale(rows, bench.trace_speed, bench.trace_scaling, bench.seed)
    if not rows:
        raise ConfigError([f"bench.trace_speed {bench.trace_speed:g} leaves none of {bench.num_prompts} requests"])
    how = {"stretch": "time stretched", "thin": "rows thinned"}[bench.trace_scaling]
    return rows, f"trace {bench.trace} at {bench.trace_speed:g} times its rate ({how}){since}"


def rows_of(config: Config) -> tuple[list[Row], str]:
    """The trace's, or made-up ones, with what they are in words."""
    return made_up_rows(config) if config.bench.trace is None else trace_rows(config)


def made_up_rows(config: Config) -> tuple[list[Row], str]:
    """Rows of random lengths, and the same."""
    bench = config.bench
    rows = random_rows(
        bench.num_prompts,
        input_len=bench.random_input_len,
        output_len=bench.random_output_len,
        range_ratio=bench.random_range_ratio,
        rate=bench.request_rate or float("inf"),
        burstiness=bench.burstiness,
        seed=bench.seed,
    )
    when = (
        f"{bench.request_rate:g} requests/s, burstiness {bench.burstiness:g}" if bench.request_rate else "all at once"
    )
    return rows, f"random lengths, {when}, seed {bench.seed}"


def sampling(config: Config) -> SamplingParams:
    """Greedy to the requested length, but for what the user asked for; the load says what the most tokens are."""
    given = config.sampling.model_fields_set - {"max_tokens"}
    return replace(GREEDY, **{name: getattr(config.sampling, name) for name in given})


def goodput_of(config: Config) -> tuple[str, ...]:
    """bench.goodput, or the objectives that the scheduler keeps."""
    kept = {"ttft": config.finetune.ttft_objective_ms, "tpot": config.finetune.tpot_objective_ms}
    return config.bench.goodput or tuple(f"{name}:{ms}" for name, ms in kept.items() if ms is not None)


def run_load(config: Config, engine: "Engine", workload: Workload) -> Run:
    return Runner(engine, workload, sampling(config), config.bench.max_concurrency)()


def warm_up_load(workload: Workload, count: int) -> Workload:
    """The first few requests, all at once, under a tenant of their own: their prefixes are nobody else's."""
    few = workload.requests[:count]
    short = [replace(r, arrival_s=0.0, output_tokens=min(r.output_tokens, WARM_UP_TOKENS)) for r in few]
    return replace(workload, requests=tuple(replace(r, tenant="\x00warm-up") for r in short))


def run_sides(config: Config, engine: "Engine", workload: Workload, path: str) -> tuple[list[Run], Comparison]:
    """Our runs, and what they come to beside the other side's; the two sides take turns."""
    repeats = range(config.bench.repeats)
    if config.bench.against == "base":
        plain = workload.on_adapters(())
        runs = [(run_load(config, engine, workload), run_load(config, engine, plain)) for _ in repeats]
        ours, base = ([pair[side] for pair in runs] for side in (0, 1))
        return ours, named("against_base", against_base(ours, base))
    if config.bench.against == "transformers":
        peer = TransformersPeer(path, peer_dtype(config))
        theirs, ours = peer.search(workload), []
        for _ in repeats:
            ours.append(run_load(config, engine, workload))
            theirs.append(peer.run(workload, theirs[0].order, theirs[0].batch_size))
        return ours, named("against_transformers", against_transformers(ours, theirs, workload))
    return [run_load(config, engine, workload) for _ in repeats], ([], {})


def named(name: str, comparison: Comparison) -> Comparison:
    return comparison[0], {name: comparison[1]}


def circumstances(config: Config, workload: Workload) -> dict[str, Any]:
    """Date, machine, versions, settings and load."""
    return {
        **circumstances_of(config),
        "num_prompts": len(workload.requests),
        "num_clipped": workload.num_clipped,
        "source": workload.source,
    }


def circumstances_of(config: Config) -> dict[str, Any]:
    """Date, machine, versions and settings."""
    import jax

    devices = jax.devices()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": "jaxserve",
        "model_id": config.model.path,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "processors": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "config": config.model_dump(mode="json"),
    }


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
