"""The kernels on the device: against the definition in float64, against their floors and XLA's implementations."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.bench.gpu import Bench, Figure
from pallas_kernels import block_write as blocks
from pallas_kernels import lora_gated as gate
from pallas_kernels import lora_matmul as lora
from pallas_kernels import paged_kv_write as write
from pallas_kernels import ragged_paged_attention as attention
from pallas_kernels.block_write import cases as block_cases
from pallas_kernels.dispatch import MOSAIC
from pallas_kernels.lora_gated import cases as gate_cases
from pallas_kernels.lora_matmul import cases as lora_cases
from pallas_kernels.paged_kv_write import cases as write_cases
from pallas_kernels.ragged_paged_attention import cases as attention_cases

TOLERANCE = 0.01  # of the largest value, in bfloat16
TIMED = 0.2  # seconds that a timing takes, about
TURNS = 50
WEIGHTS = 8  # matrices that are read by turns: together more than the device's cache holds


def kernel(bench: Bench) -> str:
    return "xla" if bench.smoke else MOSAIC


# time


def seconds_each(step: Callable[..., Any], carry: Any, *fixed: Any) -> float:
    """Least seconds of one ``step(carry, *fixed)``, which gives the next carry; the first one is donated.

    The steps are turns of a loop on the device whose number the compiler knows, so nothing waits for the host.
    """

    def turns(carry: Any, fixed: Any) -> Any:
        return lax.fori_loop(0, TURNS, lambda _, carry: step(carry, *fixed), carry)

    loop, times = jax.jit(turns, donate_argnums=0), []
    carry = jax.block_until_ready(loop(carry, fixed))
    while sum(times) < TIMED:
        start = time.perf_counter()
        carry = jax.block_until_ready(loop(carry, fixed))
        times.append(time.perf_counter() - start)
    return min(times) / TURNS


def device(bench: Bench) -> Iterator[Figure]:
    """Which device this is."""
    devices = jax.devices()
    bench.facts["device"] = f"{len(devices)} x {devices[0].device_kind}"
    yield Figure(name=devices[0].device_kind, value=len(devices), unit="devices")


def ceilings(bench: Bench) -> Iterator[Figure]:
    """What the device does at its best: a copy, and a product of large matrices."""
    size = 1 << (20 if bench.smoke else 30)  # bytes
    each = seconds_each(lambda x: x + 1, jnp.zeros(size // 4, jnp.float32))
    device = bench.device
    bench.shared["copy"] = copied = 2 * size / each
    yield Figure(name="copy", value=copied / 1e9, unit="GB/s", bound=device and device.bandwidth / 1e9)
    n = 256 if bench.smoke else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) / n**0.5 for i in range(2))
    each = seconds_each(lambda a, b: (a @ b).astype(jnp.bfloat16), a, b)
    yield Figure(name="matmul", value=2 * n**3 / each / 1e12, unit="TFLOP/s", bound=device and device.flops / 1e12)


# right


def oracle(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """The definition in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):

        def wide(x: Any) -> Any:
            x = np.asarray(x)
            return jnp.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

        return jax.tree.map(np.asarray, function(*jax.tree.map(wide, args), **settings))


def apart(got: Any, expected: Any) -> float:
    """The largest difference of any pair of arrays, as a share of the largest value of the pair's second."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite]):
            return float("inf")
        difference = np.abs(a[finite] - b[finite]).max(initial=0)
        worst = max(worst, float(difference / np.abs(b[finite]).max(initial=1e-3)))
    return worst


def correctness(bench: Bench) -> Iterator[Figure]:
    """Each kernel at small and awkward shapes; the part fails, at its end, where one is wrong."""
    wrong = []
    for name, check in bench.in_time(_checks(bench)):
        try:
            error = check()
        except Exception as problem:
            reason = f"{type(problem).__name__}: {problem}"
            wrong.append(f"{name}: {reason}")
            yield Figure(name=name, value=None, unit="of max", note=f"FAILED {reason}"[:500])
            continue
        if not error <= TOLERANCE:
            wrong.append(f"{name}: {error:.2g} of the largest value")
        yield Figure(name=name, value=error, unit="of max", note="" if error <= TOLERANCE else "WRONG")
    if wrong:
        raise AssertionError(f"{len(wrong)} kernels are wrong: " + "; ".join(wrong))


def _checks(bench: Bench) -> Iterator[tuple[str, Callable[[], float]]]:
    few = slice(1) if bench.smoke else slice(None)

    def check(op: Callable[..., Any], make: Callable[..., Any], **settings: Any) -> Callable[[], float]:
        return partial(_error, partial(op, **settings), make, kernel(bench))

    for case in write_cases.CASES[few]:
        yield f"write {case}", check(write.paged_kv_write, partial(case.make, jnp.bfloat16))
    for case in block_cases.CASES[few]:
        yield f"block write {case}", check(blocks.block_write, partial(case.make, jnp.bfloat16))
    for case in attention_cases.KERNEL_CASES[few]:
        yield (
            f"attention {case}",
            check(attention.ragged_paged_attention, partial(case.make, jnp.bfloat16), **case.settings),
        )
        if case.chunks:
            make = partial(_backward_args, replace(case, decodes=()))
            yield f"attention backward {case}", check(attention.ragged_paged_attention_backward, make, **case.settings)
    for case in lora_cases.KERNEL_CASES[few]:
        yield f"adapters {case}", check(lora.lora_matmul, partial(case.make, jnp.bfloat16))
    for case in gate_cases.CASES[few]:
        op = partial(gate.lora_gated, activation=case.activation)
        yield f"adapters and gate {case}", check(op, partial(case.make, jnp.bfloat16))
    for case in gate_cases.LINEAR_CASES[few]:
        op = partial(gate.lora_gated_linear, activation=case.activation)
        yield f"linear and gate {case}", check(op, partial(case.adapters.make_linear, jnp.bfloat16))
    for case in lora_cases.LINEAR_CASES[few]:
        yield f"linear {case}", check(lora.lora_linear, partial(case.make_linear, jnp.bfloat16))
    for case in [case for case in lora_cases.KERNEL_CASES if case.chunks and not case.singles][few]:
        yield f"adapters backward {case}", check(lora.lora_matmul_backward, partial(_lora_backward_args, case))


def _error(op: Callable[..., Any], make: Callable[[], tuple[Any, ...]], name: str) -> float:
    """Of the implementation of that name, beside the definition."""
    args = make()
    got = jax.jit(partial(op, implementation=name))(*args)
    return apart(got, oracle(partial(op, implementation="reference"), *args))


def _backward_args(case) -> tuple[Any, ...]:
    q, k, v, layout = case.make(jnp.bfloat16)
    run = partial(attention.ragged_paged_attention, **case.settings, implementation="xla")
    out, lse = jax.jit(run)(q, k, v, layout)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.bfloat16)
    sums = jnp.zeros(k.shape, jnp.float32), jnp.zeros(k.shape, jnp.float32)
    return d_out, q, out, lse, k, v, layout, sums, layout.page_table_BM


def _lora_backward_args(case) -> tuple[Any, ...]:
    x, a, members, plan = case.make(jnp.bfloat16)
    return x, case.make_cotangent(jnp.bfloat16), a, members, plan, jnp.asarray(case.lane_items()), case.make_lanes()


# fast


@dataclass(frozen=True)
class Timed:
    """A kernel at a production shape."""

    name: str
    floor: float | None  # microseconds
    run: Callable[..., Any]  # run(carry, *fixed, implementation=...) gives the next carry
    carry: Any
    fixed: tuple[Any, ...]
    calls: int = 1  # of the kernel in a run


def speed(bench: Bench) -> Iterator[Figure]:
    """Each kernel at a production shape; then XLA's implementations of the same, which take longer to compile."""
    for implementation in dict.fromkeys((kernel(bench), "xla")):
        for timed in bench.in_time(_timed(bench)):
            each = seconds_each(partial(timed.run, implementation=implementation), timed.carry, *timed.fixed)
            value = each / timed.calls * 1e6
            yield Figure(name=f"{timed.name} {implementation}", value=value, unit="us", bound=timed.floor)


def _timed(bench: Bench) -> Iterator[Timed]:
    device = bench.device

    def floor(flops: float, moved: float) -> float | None:
        return device and max(flops / device.flops, moved / device.bandwidth) * 1e6

    for case in attention_cases.KERNEL_CASES[:1] if bench.smoke else attention_cases.BENCH_CASES:
        q, k, v, layout = case.make(jnp.bfloat16)
        keys = sum((start + n) for start, n in case.chunks) + sum(p + 1 for p in case.decodes)
        seen = sum(n * start + n * (n + 1) // 2 for start, n in case.chunks) + sum(p + 1 for p in case.decodes)
        moved = 2 * (2 * keys * case.num_kv_heads + 2 * q.shape[0] * case.num_heads) * case.head_dim
        flops = seen * case.num_heads * case.head_dim
        attend = partial(_attend, case)
        yield Timed(f"attention {case}", floor(4 * flops, moved), attend, q, (k, v, layout))
        if case.chunks and not case.decodes:
            d_out, *fixed, sums, table = _backward_args(case)
            pull = partial(_attend_backward, case)
            carry, fixed = (d_out, sums), (tuple(fixed), table)
            yield Timed(f"attention backward {case}", floor(10 * flops, moved), pull, carry, fixed)
    for case in lora_cases.KERNEL_CASES[:1] if bench.smoke else lora_cases.BENCH_CASES:
        x, a, members, plan = case.make(jnp.bfloat16)
        T, D = x.shape
        E, ranks = sum(case.dims_out), sum(case.ranks)
        bound = floor(2 * T * 16 * (D * len(members) + E), 2 * (ranks * (D * len(members) + E) + T * (D + 2 * E)))
        yield Timed(f"adapters {case}", bound, _multiply, jnp.zeros((T, E), x.dtype), (x, a, members, plan))
    for case in gate_cases.CASES[:1] if bench.smoke else gate_cases.BENCH_CASES:
        gate_up, *fixed, pool, place = case.make(jnp.bfloat16)
        moved = gate_up.nbytes * 3 // 2 + 2 * place.size * case.adapters.row_block * gate_up.shape[1]
        run = partial(_gate, case.activation)
        yield Timed(f"adapters and gate {case}", floor(0, moved), run, pool, (gate_up, *fixed, place))
    linears = lora_cases.LINEAR_CASES[:1] if bench.smoke else lora_cases.LINEAR_BENCH_CASES
    ops = [("linear", lora.lora_linear, case) for case in linears]
    gates = gate_cases.LINEAR_CASES[:1] if bench.smoke else gate_cases.LINEAR_BENCH_CASES
    ops += [
        ("linear and gate", partial(gate.lora_gated_linear, activation=case.activation), case.adapters)
        for case in gates
    ]
    for name, op, case in ops:
        x, *adapters = case.make(jnp.bfloat16)
        (T, D), E = x.shape, sum(case.dims_out)
        make = jax.jit(partial(jax.random.normal, shape=(E, D), dtype=x.dtype))
        weights = tuple(make(key) for key in jax.random.split(jax.random.key(0), WEIGHTS))
        bound = floor(2 * T * D * E, 2 * (D * E + T * (D + E)))
        yield Timed(f"{name} {case}", bound, partial(_project, op), x, (weights, *adapters), calls=WEIGHTS)
    for case in write_cases.CASES[:1] if bench.smoke else write_cases.BENCH_CASES:
        *pools, k, v, page, offset = case.make(jnp.bfloat16)
        yield Timed(f"write {case}", floor(0, 4 * k.nbytes), _put, tuple(pools), (k, v, page, offset))
    for case in block_cases.CASES[:1] if bench.smoke else block_cases.BENCH_CASES:
        pools, rows, place = case.make(jnp.bfloat16)
        moved = 4 * case.blocks * case.row_block * sum(case.dims)
        yield Timed(f"block write {case}", floor(0, moved), blocks.block_write, pools, (rows, place))


def _attend(case, q, k, v, layout, *, implementation: str):
    return attention.ragged_paged_attention(q, k, v, layout, **case.settings, implementation=implementation)[0]


def _attend_backward(case, carry, fixed, table, *, implementation: str):
    d_out, sums = carry
    run = partial(attention.ragged_paged_attention_backward, **case.settings, implementation=implementation)
    return run(d_out, *fixed, sums, table)


def _multiply(y, x, a, members, plan, *, implementation: str):
    moving = x * (1 + 0 * y[0, 0])  # so that no half of it leaves the loop
    return lora.lora_matmul(moving, a, members, plan, add_to=y, implementation=implementation)


def _gate(activation, pool, gate_up, x, a, members, plan, place, *, implementation: str):
    moving = x * (1 + 0 * pool[0, 0, 0])
    run = partial(gate.lora_gated, activation=activation, implementation=implementation)
    return run(gate_up, moving, a, members, plan, pool, place)[1]


def _project(op, x, weights, a, members, plan, *, implementation: str):
    """One product after another, each with other weights; XLA merges those that could be side by side."""
    name, last = "separate" if implementation == "xla" else implementation, []
    for w in weights:
        x, y = lax.optimization_barrier((x, op(x, w, a, members, plan, implementation=name)))
        last.append(y[0, 0])
    return x * (1 + 0 * sum(last))


def _put(pools, *rows, implementation: str):
    return write.paged_kv_write(*pools, *rows, implementation=implementation)
