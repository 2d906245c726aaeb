"""Where an adapter's factors live, derived from where its base matrix lives.

A tensor under tensor parallelism is in one of these states: split along a dimension, replicated, or a partial sum
(each device holds a term of it). A matmul y = x W^T maps states to states at no cost in exactly these ways:

    x replicated, W split on out  -> y split on out         (column-parallel)
    x split on in, W split on in  -> y is a partial sum      (row-parallel; the caller all-reduces it)
    x replicated, W replicated    -> y replicated
    x partial sum, W replicated   -> y is a partial sum      (linear maps commute with sums)

An adapter computes (x A^T) B^T beside the base and adds to y, so its result must be in y's state. Searching the
states of A and B for a chain from x's state to y's state that needs no collective leaves one answer per kind:

    column-parallel (q, k, v, gate, up)   A replicated      B split on out    x A^T replicated
    row-parallel (o, down)                A split on in     B replicated      x A^T a partial sum, and so is the result

Shapes: P pages, R ranks, D in, E out.
"""

from dataclasses import dataclass
from itertools import product

REPLICATED, PARTIAL = "replicated", "partial"
COLUMN_SITES = {"qkv_proj": "heads", "gate_up_proj": "ffn"}  # logical axis of the output
ROW_SITES = {"o_proj": "heads", "down_proj": "ffn"}  # logical axis of the input
COST = {REPLICATED: 1, "split_out": 0, "split_in": 0}  # memory of a factor; splitting it is free


@dataclass(frozen=True)
class ArraySpec:
    """Shape and logical axes of an array to be made."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def matmul_state(x: str, w: str) -> str | None:
    """The state of x W^T, or None where a collective would be needed first."""
    return {
        (REPLICATED, "split_out"): "split",
        ("split", "split_in"): PARTIAL,
        (REPLICATED, REPLICATED): REPLICATED,
        (PARTIAL, REPLICATED): PARTIAL,
    }.get((x, w))


def place_adapter(x: str, y: str) -> tuple[str, str]:
    """The cheapest states of (A, B) that lead from input state x to output state y without a collective."""
    states = (REPLICATED, "split_out", "split_in")
    chains = [(a, b) for a, b in product(states, states) if (h := matmul_state(x, a)) and matmul_state(h, b) == y]
    assert chains, f"no collective-free adapter from {x} to {y}"
    return min(chains, key=lambda chain: COST[chain[0]] + COST[chain[1]])


def lora_specs(site: str) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Logical axes of a site's bank arrays A [P, R, D] and B [P, E, R]."""
    if site in COLUMN_SITES:
        axis, chain = COLUMN_SITES[site], place_adapter(REPLICATED, "split")
    else:
        axis, chain = ROW_SITES[site], place_adapter("split", PARTIAL)
    a = {REPLICATED: (None, None, None), "split_in": (None, None, axis), "split_out": (None, axis, None)}[chain[0]]
    b = {REPLICATED: (None, None, None), "split_in": (None, None, axis), "split_out": (None, axis, None)}[chain[1]]
    return a, b
