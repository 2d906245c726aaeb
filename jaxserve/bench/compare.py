"""Two sides of one measurement: what they come to, in words and as JSON."""

from collections.abc import Sequence
from typing import Any

from jaxserve.bench.peers import PeerRun
from jaxserve.bench.report import Run
from jaxserve.bench.workload import Workload

Comparison = tuple[list[str], dict[str, Any]]


def cpu_ratio(ours: Sequence[Run], theirs: Sequence[Run] | Sequence[PeerRun]) -> float:
    """Their least processor time over our least. Beside other work it says more than the clock."""
    return min(run.cpu_seconds for run in theirs) / min(run.cpu_seconds for run in ours)


def fastest(runs: Sequence[Run]) -> Run:
    return max(runs, key=lambda run: run.output_throughput)


def summary(run: Run) -> dict[str, float]:
    return {name: getattr(run, name) for name in ("duration", "cpu_seconds", "output_throughput")}


def against_transformers(ours: Sequence[Run], peer: Sequence[PeerRun], workload: Workload) -> Comparison:
    """Lines to print and JSON; ``peer`` holds the search over orders and batch sizes, and repeats of its best."""
    ranked = sorted(peer, key=lambda run: run.duration)
    in_order = next(run for run in ranked if run.order == "arrival")
    us, them, blind = fastest(ours).output_throughput, ranked[0].output_throughput, in_order.output_throughput
    records = fastest(ours).requests
    same = sum(a.token_ids == ranked[0].token_ids[b] for a, b in zip(records, workload.requests, strict=True))
    lines = [
        f"output tokens/s: JaxServe {us:.1f}, transformers {them:.1f}: {us / them:.2f} times"
        f" (its best: batches of {ranked[0].batch_size}, by {ranked[0].order})",
        f"  in order of arrival it does {blind:.1f} (batches of {in_order.batch_size}): {us / blind:.2f} times",
        f"  by processor time instead of the clock: {cpu_ratio(ours, peer):.2f} times",
        f"  {same} of {len(records)} requests got the same tokens from both",
    ]
    return lines, {
        "output_throughput": them,
        "ratio": us / them,
        "ratio_in_order_of_arrival": us / blind,
        "ratio_by_cpu_seconds": cpu_ratio(ours, peer),
        "same_tokens": same,
        "ours": [summary(run) for run in ours],
        "theirs": [run.summary() for run in peer],
    }


def against_base(ours: Sequence[Run], base: Sequence[Run]) -> Comparison:
    """Lines to print and JSON of a load with adapters and the same load without."""
    us, them = fastest(ours).output_throughput, fastest(base).output_throughput
    lines = [
        f"output tokens/s: with adapters {us:.1f}, base alone {them:.1f}: adapters cost {(1 - us / them) * 100:.1f} %",
        f"  by processor time instead of the clock: {(1 - cpu_ratio(ours, base)) * 100:.1f} %",
    ]
    return lines, {
        "output_throughput": them,
        "ratio": us / them,
        "cost": 1 - us / them,
        "cost_by_cpu_seconds": 1 - cpu_ratio(ours, base),
        "ours": [summary(run) for run in ours],
        "base": [summary(run) for run in base],
    }
