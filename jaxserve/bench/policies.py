"""Ways to share devices between requests and finetuning, put together from runs of replicas.

Most ways are one run: every replica does the same. ``separate:S`` and ``coserve:S`` give S percent of the replicas to
requests, so each of those gets 100/S times the rate, and finetune on the others; with ``coserve:S`` those that get
requests finetune as well. ``spatial`` runs two processes on each device. What a way comes to is always per replica, so
that all of them are judged by the devices they take.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxserve.bench.ran import Ran, run_name, serving_numbers, step_numbers

ENOUGH = 0.99  # share of requests that must meet their objectives for a rate to count as served
ALONE = "finetune-only"
REQUESTS = "inference-only"
OURS = "coserve"
SOME = {"separate": REQUESTS, OURS: OURS}  # NAME:S to what the replicas do that get the requests


class Backend(Protocol):
    """Runs replicas: an engine here, or simulated ones."""

    def run(self, sharing: str, rate: float) -> Ran:
        """Every replica shares in one way and gets ``rate`` requests per second; 0: none."""
        ...

    def spatial(self, rate: float) -> tuple[Ran, Ran]:
        """Two processes on each device: the requests' and the finetuning's."""
        ...


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to share at one rate of requests."""

    policy: str
    rate: float  # requests per second and replica
    serving: Ran | None
    training: Ran | None
    serves: float = 1.0  # share of the replicas that do as ``serving``
    trains: float = 1.0  # share of the replicas that do as ``training``
    arithmetic: str = ""

    @property
    def finetune_rate(self) -> float:
        """Tokens per second and replica, those that only serve among them."""
        trained = self.trains * self.training.finetune_rate if self.training is not None else 0.0
        if self.serving is None or self.serving is self.training:
            return trained
        return self.serves * self.serving.finetune_rate + trained


class Runs:
    """The runs that cells are made of, each made once."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self._known: dict[str, tuple[Ran, ...]] = {}

    def __iter__(self):
        return (ran for runs in self._known.values() for ran in runs)

    def cell(self, policy: str, rate: float) -> Cell:
        """Of a policy's name, which ``SweepSection`` has checked."""
        if policy == "spatial":
            serving, training = self._get(f"spatial at {rate:g}", lambda: self.backend.spatial(rate))
            return Cell(policy=policy, rate=rate, serving=serving, training=training)
        if not shares_one_engine(policy):
            kind, _, number = policy.partition(":")
            return self._some(policy, rate, int(number) / 100, SOME[kind])
        ran = self._run(policy, rate)
        serving, training = (None if policy == ALONE else ran), (None if policy == REQUESTS else ran)
        return Cell(policy=policy, rate=rate, serving=serving, training=training)

    def _some(self, policy: str, rate: float, serves: float, sharing: str) -> Cell:
        serving, training, trains = self._run(sharing, rate / serves), self._run(ALONE, rate), 1 - serves
        finetunes = "" if sharing == REQUESTS else f" and finetune, {_each(serves, serving)}"
        return Cell(
            policy=policy,
            rate=rate,
            serving=serving,
            training=training,
            serves=serves,
            trains=trains,
            arithmetic=(
                f"{serves:.0%} of the replicas serve, {rate:g} / {serves:g} = {rate / serves:g} requests/s each"
                f"{finetunes}; {trains:.0%} finetune, {_each(trains, training)}"
            ),
        )

    def _run(self, sharing: str, rate: float) -> Ran:
        rate = 0.0 if sharing == ALONE else rate
        return self._get(run_name(sharing, rate), lambda: (self.backend.run(sharing, rate),))[0]

    def _get(self, name: str, make) -> tuple[Ran, ...]:
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]


def is_ours(policy: str) -> bool:
    """Whether it is co-serving, on all replicas or on some."""
    return policy.partition(":")[0] == OURS


def shares_one_engine(policy: str) -> bool:
    """Whether every replica shares its device in this way, in one process."""
    kind, _, number = policy.partition(":")
    return kind != "spatial" and not (number and kind in SOME)


def _each(share: float, ran: Ran) -> str:
    return f"{share:g} x {ran.finetune_rate:.0f} = {share * ran.finetune_rate:.0f} tokens/s per replica"


def numbers(cell: Cell, goals: Mapping[str, float], alone: float | None) -> dict[str, Any]:
    """Everything about a cell as JSON.

    Args:
      goals: objectives in seconds; alone: tokens per second of finetuning that has the devices to itself.
    """
    serving, training = cell.serving, cell.training
    found: dict[str, Any] = {
        "policy": cell.policy,
        "rate": cell.rate,
        "serving_run": serving and serving.name,
        "training_run": training and training.name,
        "serves": cell.serves,
        "trains": cell.trains,
        "arithmetic": cell.arithmetic,
        "finetune_tokens_per_s": cell.finetune_rate,
        "finetuning_kept": cell.finetune_rate / alone if alone else None,
        "clipped": serving.clipped if serving else 0,
        "preemptions": serving.preemptions if serving else 0,
        "evictions": sum(ran.evictions for ran in {id(r): r for r in (serving, training) if r}.values()),
    }
    if serving is not None:
        found |= serving_numbers(serving.requests, serving.seconds, goals, serving.replicas / cell.serves)
    watched = serving or training
    return found | (step_numbers(watched.steps, watched.seconds) if watched else {})


def claims(cells: Sequence[Mapping[str, Any]], enough: float = ENOUGH) -> list[dict[str, Any]]:
    """Co-serving, on as many of the replicas as is best, beside the best other way that keeps the objectives, at every
    rate.

    Args:
      cells: of ``numbers``.
    """
    found = []
    for rate in sorted({cell["rate"] for cell in cells}):
        here = {cell["policy"]: cell for cell in cells if cell["rate"] == rate}
        all_ours = [cell for name, cell in here.items() if is_ours(name)]
        if not all_ours:
            continue
        plain, ours = here.get(REQUESTS), _best(cell for cell in all_ours if _keeps(cell, enough)) or all_ours[0]
        served = None if plain is None else (plain["attainment"] or 0.0) >= enough
        others = [cell for name, cell in here.items() if not is_ours(name) and name not in (ALONE, REQUESTS)]
        best = _best(cell for cell in others if _keeps(cell, enough))
        rival = best["finetune_tokens_per_s"] if best else 0.0
        found.append(
            {
                "rate": rate,
                "requests_alone_meet": served,
                "coserve_policy": ours["policy"],
                "coserve_attainment": ours["attainment"],
                "coserve_tokens_per_s": ours["finetune_tokens_per_s"],
                "others": len(others),
                "best_other": best and best["policy"],
                "best_other_tokens_per_s": rival,
                "times_best_other": ours["finetune_tokens_per_s"] / rival if rival else None,
            }
        )
    return found


def _keeps(cell: Mapping[str, Any], enough: float) -> bool:
    return cell.get("attainment") is not None and cell["attainment"] >= enough


def _best(cells: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return max(cells, key=lambda cell: cell["finetune_tokens_per_s"], default=None)
