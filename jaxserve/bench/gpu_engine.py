"""The engine on the device: decode steps, prefill, finetuning, adapters and both together, on Llama-3.1-8B's sizes.

One engine with few step shapes serves all parts, because compiling is what takes long.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.bench import gpu_trace
from jaxserve.bench.gpu import Bench, Figure
from jaxserve.bench.random_adapters import check_targets, random_adapter
from jaxserve.bench.replay import Replay
from jaxserve.bench.roofline import ideal_decode_seconds, matmul_params, train_flops
from jaxserve.bench.workload import Row, make_workload
from jaxserve.engine.buckets import Bucket, Buckets
from jaxserve.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxserve import Engine

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TINY = LLAMA_8B | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# log-normal lengths of Azure's conversation trace of 2023: mean and deviation of the logarithm, and the longest
PROMPTS, OUTPUTS = (6.64, 0.99, 14050), (4.96, 0.86, 1000)
TPOT_MS = 45.0
PEFT_SECONDS = 65.0  # most that the other process takes
TOGETHER = 2  # sequences of an optimizer step
LEAD, RUNS = 3, 20  # of a step: before it is timed, and while


def _write_config(bench: Bench, directory: str) -> str:
    config = TINY if bench.smoke else LLAMA_8B | {"num_hidden_layers": bench.layers}
    Path(directory, "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def peft(bench: Bench) -> Iterator[Figure]:
    """PEFT's finetuning, before we take the device's memory."""
    missing = [name for name in ("torch", "peft", "transformers") if find_spec(name) is None]
    if missing:
        yield Figure(name="not installed", value=0, unit="", note=", ".join(missing))
        return
    lengths = ["64"] if bench.smoke else ["2048", "8192"]
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            "-m",
            "jaxserve.bench.gpu_peft",
            _write_config(bench, directory),
            str(TOGETHER),
            *lengths,
        ]
        try:
            done = subprocess.run(command, capture_output=True, timeout=PEFT_SECONDS)
            out, code, problem = done.stdout, done.returncode, done.stderr.decode(errors="replace").strip()[-500:]
        except subprocess.TimeoutExpired as late:
            out, code, problem = late.stdout or b"", 1, f"not over after {PEFT_SECONDS:g} s"
    for line in out.decode().splitlines():
        if line.startswith("{"):
            run = json.loads(line)
            rate = TOGETHER * run["tokens"] / run["seconds"]
            bench.shared[f"peft {run['tokens']}"] = rate
            yield Figure(name=f"PEFT, {TOGETHER} sequences of {run['tokens']}", value=rate, unit="tokens/s")
    if code:
        raise RuntimeError(problem)


class FewBuckets(Buckets):
    """One size of decode rows beside other rows, and none beside a full chunk: what padding they are is little beside
    compiling more."""

    def decodes_beside(self, chunk_rows: int, grad_rows: int = 0) -> tuple[int, ...]:
        if not chunk_rows and not grad_rows:
            return self.decode_rows
        return (0, self.decode_rows[-1])[chunk_rows < self.chunk_rows[-1] :]


@contextmanager
def few_buckets(buckets: Buckets) -> Iterator[None]:
    """Engines that are made meanwhile compile these shapes alone."""
    make = Buckets.__dict__["make"]

    def chosen(cls, max_chunk_rows, max_num_seqs, row_block, max_grad_rows=0, stashed=False) -> Buckets:
        grad_rows = buckets.grad_rows if max_grad_rows else ()
        return FewBuckets(buckets.chunk_rows, buckets.decode_rows, grad_rows, stashed, row_block)

    setattr(Buckets, "make", classmethod(chosen))  # noqa: B010  (a type checker takes it for a method)
    try:
        yield
    finally:
        setattr(Buckets, "make", make)  # noqa: B010


def start(bench: Bench) -> Iterator[Figure]:
    """Makes the engine."""
    from jaxserve import Engine

    most = _most_rows(bench)
    sizes: dict[str, Any] = {
        "max_num_seqs": most,
        "max_num_batched_tokens": 4096,
        "max_model_len": 8704,
        "max_loras": 1 + most // 2,
        "finetune_window": 4096,
        "finetune_stash_tokens": 16896,  # a sequence of 8,192 goes forward while another goes backward
        "gpu_memory_utilization": 0.85,
    }
    # long windows for finetuning alone, and short ones for steps with requests
    rows = (64, most)[bench.few :]
    buckets = Buckets(chunk_rows=(1024, 4096), decode_rows=rows, grad_rows=(1024, 4096))
    if bench.smoke:
        buckets = Buckets(chunk_rows=(32,), decode_rows=(4,), grad_rows=(32,))
        small = {"max_num_batched_tokens": 32, "max_model_len": 256, "max_loras": 5, "finetune_stash_tokens": 256}
        sizes |= small | {"finetune_window": 32, "num_kv_pages": 64, "block_size": 16}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, few_buckets(buckets):
        bench.shared["engine"] = Engine.from_pretrained(
            _write_config(bench, directory),
            load_format="dummy",
            max_finetune_jobs=1,
            max_lora_rank=16,
            enable_prefix_caching=False,
            tpot_objective_ms=TPOT_MS,
            **sizes,
        )
    yield Figure(name="weights and programs", value=time.perf_counter() - began, unit="s")
    yield Figure(name="programs", value=len(bench.shared["engine"].core.specs), unit="")


def _most_rows(bench: Bench) -> int:
    return 4 if bench.smoke else 64 if bench.few else 256


def _engine(bench: Bench) -> "Engine":
    if "engine" not in bench.shared:
        raise RuntimeError("there is no engine: the part that makes it has not come to its end")
    return bench.shared["engine"]


def _step_seconds(engine: "Engine", bucket: Bucket, decodes: list[int], chunk: tuple[int, int] | None) -> float:
    """Seconds of a step of rows made up: decodes by their position, and a prompt's chunk (first position, rows).

    Raises:
      ValueError: more pages than there are.
    """
    core = engine.core
    size = core.config.page_size
    ints, views, floats, _ = core.specs[bucket, False].layout.empty()
    contexts = decodes + ([chunk[0] + chunk[1] - 1] if chunk else [])
    pages = np.random.default_rng(0).permutation(core.config.num_pages).astype(np.int32)
    need = sum(position // size + 1 for position in contexts)
    if need > len(pages):
        raise ValueError(f"needs {need} KV pages, there are {len(pages)}")
    taken = 0
    for slot, position in enumerate(contexts):
        count = position // size + 1
        views["page_table_BM"][slot, :count] = pages[taken : taken + count]
        taken += count
    first = bucket.block_rows
    for slot, position in enumerate(decodes):
        views["position_T"][first + slot] = position
        views["slot_T"][first + slot] = slot
        views["sample_row_R"][slot], views["sample_slot_R"][slot] = first + slot, slot
    if chunk:
        views["position_T"][: chunk[1]] = np.arange(chunk[0], chunk[0] + chunk[1])
        views["slot_T"][: bucket.chunk_rows] = len(decodes)
    return _seconds_each(lambda: core._run((bucket, False), ints, floats, draws=True))


def _seconds_each(run: Callable[[], Any]) -> float:
    """Seconds of one of many runs, where one is under way while the host sends the next, as in an engine's loop."""
    import jax

    under_way, began = deque([run()]), time.perf_counter()
    for i in range(LEAD + RUNS):
        under_way.append(run())
        jax.block_until_ready(under_way.popleft())
        if i == LEAD - 1:
            began = time.perf_counter()
    each = (time.perf_counter() - began) / RUNS
    jax.block_until_ready(under_way)
    return each


def decode(bench: Bench) -> Iterator[Figure]:
    """Decode steps against the time that reading weights, keys and values takes."""
    engine, device = _engine(bench), bench.device
    for context in (64,) if bench.smoke else (1024, 8192):
        for rows in bench.in_time([rows for rows in (1, 4, 16, 64, 256) if rows <= _most_rows(bench)]):
            name, decodes = f"{rows} rows of {context}", [context - 1] * rows
            try:
                each = _step_seconds(engine, engine.core.planner.buckets.fit(0, rows), decodes, None)
            except ValueError as problem:
                yield Figure(name=name, value=None, unit="ms", note=f"not measured: {problem}")
                continue
            floor = device and ideal_decode_seconds(engine.model, decodes, device)
            note = ""
            if floor and device and "copy" in bench.shared:
                share = each / (floor * device.bandwidth / bench.shared["copy"])
                note = f"{share:.2f} of what its bytes take at a copy's rate"
            yield Figure(name=name, value=each * 1e3, unit="ms", bound=floor and floor * 1e3, note=note)


def prefill(bench: Bench) -> Iterator[Figure]:
    """A prompt's chunk with nothing beside it."""
    engine, device = _engine(bench), bench.device
    buckets = engine.core.planner.buckets
    rows = buckets.chunk_rows[-1]
    for first in bench.in_time((0, engine.core.config.max_model_len - rows)):
        each = _step_seconds(engine, buckets.fit(rows, 0), [], (first, rows))
        floor = device and device.flops / (2 * matmul_params(engine.model))
        yield Figure(name=f"{rows} rows from {first}", value=rows / each, unit="tokens/s", bound=floor)


def _job(bench: Bench, length: int, count: int, name: str):
    rng = np.random.default_rng(0)
    examples = [(rng.integers(2, _engine(bench).model.vocab_size, length).tolist(), None) for _ in range(count)]
    return _engine(bench).finetune(examples, name, rank=16, batch_size=TOGETHER, shuffle=False, epochs=1)


def finetune(bench: Bench) -> Iterator[Figure]:
    """A job alone, all linear layers at rank 16; its FLOPs are 4 per parameter and token."""
    engine, device = _engine(bench), bench.device
    for length, count in bench.in_time(((64, 4),) if bench.smoke else ((2048, 96), (8192, 16))):
        _job(bench, length, TOGETHER, f"warm-up-{length}").wait()
        job = _job(bench, length, count, f"alone-{length}")
        began = time.perf_counter()
        job.wait()
        rate = job.trained_tokens / (time.perf_counter() - began)
        if job.status != "succeeded":
            raise RuntimeError(f"the job is {job.status}: {job.error}")
        bench.shared.setdefault("alone", rate)
        theirs = bench.shared.get(f"peft {length}")
        note = f"{rate / theirs:.2f} times PEFT" if theirs else ""
        yield Figure(name=f"{TOGETHER} sequences of {length}", value=rate, unit="tokens/s", note=note)
        if device:
            share = train_flops(engine.model) * rate / device.flops
            yield Figure(name=f"MFU, sequences of {length}", value=100 * share, unit="%")


def adapters(bench: Bench) -> Iterator[Figure]:
    """Decode steps of requests that are dealt out to more and more adapters."""
    engine = _engine(bench)
    rows = 4 if bench.smoke else _most_rows(bench) // 2
    counts = [count for count in (1, 4, 8, 32, 128) if count <= rows]
    weights = random_adapter(engine.model, 16, check_targets(()), 0)
    for i in range(max(counts)):
        engine.put_adapter(f"adapter-{i}", weights)
    base = None
    for count in bench.in_time((0, *counts)):
        each = _decode_seconds(engine, rows, count)
        base = each if base is None else base
        note = f"{100 * (each / base - 1):+.1f} % on the base model's step"
        yield Figure(name=f"{rows} rows of {count} adapters", value=each * 1e3, unit="ms", note=note if count else "")


def _decode_seconds(engine: "Engine", rows: int, count: int) -> float:
    """Median seconds between two steps that give every request a token."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    for i in range(rows):
        engine.add_request([2 + i % 50] * 32, params, adapter=f"adapter-{i % count}" if count else None)
    times, began = [], time.perf_counter()
    while engine.has_work():
        events = engine.step()
        now = time.perf_counter()
        if len(events) == rows:
            times.append(now - began)
        began = now
    return float(np.median(times[2:-2]))


def coserve(bench: Bench) -> Iterator[Figure]:
    """Requests of Azure's lengths beside a job: what finetuning keeps, and what requests get."""
    engine = _engine(bench)
    seconds = 1.0 if bench.smoke else 16.0 if bench.few else 9.0
    for rate in bench.in_time((4,) if bench.smoke else (2, 5) if bench.few else (1, 2, 3, 4, 5)):
        rng = np.random.default_rng(rate)
        arrivals = np.cumsum(rng.exponential(1 / rate, max(int(rate * seconds), 2)))
        lengths = [
            np.minimum(np.exp(rng.normal(mean, deviation, len(arrivals))), top)
            for mean, deviation, top in (PROMPTS, OUTPUTS)
        ]
        scale = 32 if bench.smoke else 1
        rows = [
            Row(float(at), max(int(p / scale), 1), max(int(o / scale), 2))
            for at, p, o in zip(arrivals, *lengths, strict=True)
        ]
        longest = engine.core.config.max_model_len
        workload = make_workload(rows, source="Azure", vocab_size=engine.model.vocab_size, max_model_len=longest)
        job = _job(bench, 64 if bench.smoke else 2048, 1000, f"beside-{rate}")
        deadline = time.perf_counter() + 1.3 * seconds
        run = Replay(
            engine, workload, {f"beside-{rate}": job}, finish_jobs=False, stopped=partial(_is_past, deadline)
        )()
        job.cancel()
        engine.run()
        tpots = [request.tpot * 1e3 for request in run.done if request.tpot is not None]
        trained = run.finetune_tokens / run.duration
        alone = bench.shared.get("alone")
        note = f"{100 * trained / alone:.0f} % of finetuning alone" if alone else ""
        yield Figure(name=f"{rate} requests/s: finetuning", value=trained, unit="tokens/s", note=note)
        if tpots:
            worst = float(np.percentile(tpots, 99))
            note = f"{len(tpots)} of {len(rows)} requests ended; within {TPOT_MS:g} ms: {worst <= TPOT_MS}"
            yield Figure(name=f"{rate} requests/s: TPOT p99", value=worst, unit="ms", note=note)
            first = float(np.percentile([request.ttft * 1e3 for request in run.done], 99))
            yield Figure(name=f"{rate} requests/s: TTFT p99", value=first, unit="ms")


def _is_past(deadline: float) -> bool:
    return time.perf_counter() > deadline


def profile(bench: Bench) -> Iterator[Figure]:
    """The kernels that steps spend their time in."""
    engine = _engine(bench)
    buckets = engine.core.planner.buckets
    most, rows = _most_rows(bench), buckets.chunk_rows[-1]
    length = 64 if bench.smoke else 2048
    steps: dict[str, tuple[Callable[[], Any], int]] = {
        "decode": (
            lambda: _step_seconds(engine, buckets.fit(0, most), [length // 2 - 1] * most, None),
            LEAD + RUNS + 1,
        ),
        "prefill": (lambda: _step_seconds(engine, buckets.fit(rows, 0), [], (0, rows)), LEAD + RUNS + 1),
        "finetuning": (lambda: _job(bench, length, TOGETHER, "profiled").wait(), 1),
    }
    for name, (run, times) in bench.in_time(steps.items()):
        trace = gpu_trace.record(run)
        note = "" if trace.kernels else "the profiler saw no kernel"
        yield Figure(name=f"{name}: kernels", value=1e3 * trace.busy / times, unit="ms", note=note)
        yield Figure(name=f"{name}: idle", value=1e3 * trace.idle / times, unit="ms")
        for kernel in trace.kernels[:16]:
            count = f"{kernel.count / times:.0f} of them"
            yield Figure(name=f"{name}: {kernel.name}"[:46], value=1e3 * kernel.seconds / times, unit="ms", note=count)


def memory(bench: Bench) -> Iterator[Figure]:
    """Most memory that was in use."""
    import jax

    stats = jax.devices()[0].memory_stats()
    device = bench.device
    note = "" if stats else "the device does not say"
    peak = stats["peak_bytes_in_use"] / 1e9 if stats else None
    yield Figure(name="peak", value=peak, unit="GB", bound=device and device.memory / 1e9, note=note)
