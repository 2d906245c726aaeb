"""How long a step must take: the floating point operations and bytes of its parts, on a named device.

Plain arithmetic on a ModelConfig and the sizes of one step, without JAX. ``step_work`` lists the parts; ``seconds``
adds them up: each takes the longer of its arithmetic and its memory traffic, and they follow each other. With ``FLOOR``
that is the time no implementation of these parts can beat; ``EXPECTED`` is what good kernels reach of the device.

Sizes are those of one device of ``tensor_parallel``; FLOPs count a multiplication and an addition as two.

Letters: D hidden, F ffn, V vocab, H query heads, K kv heads, C head dim, L layers, W gradient rows, R drawn tokens.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from jaxserve.engine.activations import stash_bytes
from jaxserve.models.config import ModelConfig

PAGE_RANK = 16  # adapters are stored, and multiplied, in units of so many ranks
HEAD_CHUNK = 256  # gradient rows whose logits exist at one time, on a GPU
WIDE = 4  # bytes of what is summed in float32
NUM_KEPT = 4096  # parts of steps of different sizes that are remembered
MEMBERS = {  # of each site, by the names that PEFT's target_modules have
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
ROW_PARALLEL = ("o_proj", "down_proj")  # split on what goes in, the others on what comes out
ALL_LINEAR = tuple(member for members in MEMBERS.values() for member in members)


@dataclass(frozen=True, kw_only=True)
class Device:
    """Data sheet numbers of one accelerator."""

    name: str
    memory: float  # bytes
    bandwidth: float  # bytes per second
    flops: float  # per second, dense, 16-bit operands
    link: float  # bytes per second to the others of a node, one way


DEVICES = {
    "a100-80gb": Device(name="NVIDIA A100 80GB", memory=80e9, bandwidth=2.039e12, flops=312e12, link=300e9),
    "h100": Device(name="NVIDIA H100 80GB", memory=80e9, bandwidth=3.35e12, flops=989e12, link=450e9),
    "h200": Device(name="NVIDIA H200", memory=141e9, bandwidth=4.8e12, flops=989e12, link=450e9),
}


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the device's numbers that are reached, and what starting a kernel costs."""

    matmul: float = 1.0
    attention: float = 1.0
    attention_backward: float = 1.0
    bandwidth: float = 1.0
    link: float = 1.0
    launch: float = 0.0  # seconds from one kernel to the next
    collective: float = 0.0  # seconds of a collective that moves nothing


FLOOR = Efficiency()
# Measured on an H200 (README): the products of a prefill step 0.73 to 0.90, a large square one 0.68 to 0.81;
# attention 0.35 to 0.44 forward and 0.24 to 0.34 backward (of five products, the two kernels do seven); a copy 0.87.
EXPECTED = Efficiency(
    matmul=0.75, attention=0.4, attention_backward=0.3, bandwidth=0.85, link=0.7, launch=1.5e-6, collective=10e-6
)


class Segment(NamedTuple):
    """Rows of one sequence, one after another."""

    rows: int
    start: int = 0  # tokens of the sequence before them

    def keys(self, window: int | None) -> int:
        """Keys that the rows see, added up over the rows."""
        if window is None or self.start + self.rows <= window:
            return self.rows * self.start + self.rows * (self.rows + 1) // 2
        growing = max(min(window - self.start, self.rows), 0)
        return growing * self.start + growing * (growing + 1) // 2 + (self.rows - growing) * window

    def keys_read(self, window: int | None) -> int:
        """Keys that at least one of them sees."""
        seen = self.start + self.rows
        return seen if window is None else min(seen, window + self.rows - 1)


@dataclass(kw_only=True, slots=True)
class StepLoad:
    """What one step holds."""

    decodes: Sequence[int] = ()  # of each decode row: tokens of its sequence before it
    chunks: Sequence[Segment] = ()  # prefill chunks, and finetune windows that only go forward
    stashed_rows: int = 0  # of them, those whose activations are kept for a later step
    grads: Sequence[Segment] = ()  # windows whose backward runs in this step
    drawn: int | None = None  # tokens; by default one per decode row
    adapters: Sequence[int] = ()  # ranks of the adapters in the batch
    adapter_rows: int | None = None  # rows that have one; by default all where there are adapters
    grad_rank: int = 16
    targets: Sequence[str] = ALL_LINEAR  # linear layers that every adapter changes

    @property
    def chunk_rows(self) -> int:
        return sum([rows for rows, _ in self.chunks])

    @property
    def grad_rows(self) -> int:
        return sum([rows for rows, _ in self.grads])

    @property
    def num_drawn(self) -> int:
        return len(self.decodes) if self.drawn is None else self.drawn


class Work(NamedTuple):
    """One part of a step on one device."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    link_bytes: float = 0.0
    kernels: float = 0.0
    collectives: float = 0.0
    kind: str = "matmul"  # the field of Efficiency that its FLOPs reach

    @property
    def is_nothing(self) -> bool:
        return not (self.flops or self.bytes or self.link_bytes)

    def times(self, times: float) -> "Work":
        """So many of it."""
        return Work(
            self.name,
            self.flops * times,
            self.bytes * times,
            self.link_bytes * times,
            self.kernels * times,
            self.collectives * times,
            self.kind,
        )

    def seconds(self, device: Device, efficiency: Efficiency = FLOOR) -> float:
        return seconds([self], device, efficiency)


def seconds(work: Iterable[Work], device: Device, efficiency: Efficiency = FLOOR) -> float:
    """The parts one after another."""
    return Pace(device, efficiency).seconds(work)


class Pace:
    """How fast a device does what."""

    def __init__(self, device: Device, efficiency: Efficiency = FLOOR):
        self._flops = {
            "matmul": device.flops * efficiency.matmul,
            "attention": device.flops * efficiency.attention,
            "attention_backward": device.flops * efficiency.attention_backward,
        }
        self._bandwidth, self._link = device.bandwidth * efficiency.bandwidth, device.link * efficiency.link
        self._launch, self._collective = efficiency.launch, efficiency.collective

    def seconds(self, work: Iterable[Work], before: float = 0.0) -> float:
        """The parts one after another, and after so many seconds."""
        total = before
        for _, flops, moved, link_bytes, kernels, collectives, kind in work:
            arithmetic, memory = flops / self._flops[kind], moved / self._bandwidth
            starts = kernels * self._launch + collectives * self._collective
            total += (arithmetic if arithmetic > memory else memory) + link_bytes / self._link + starts
        return total


# sizes of a model


def site_dims(model: ModelConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """(in, (out of each member)) of the linear layers, those that share an input together, unsharded."""
    D, F = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {"qkv_proj": (D, (q, kv, kv)), "o_proj": (q, (D,)), "gate_up_proj": (D, (F, F)), "down_proj": (F, (D,))}


def linear_params(model: ModelConfig) -> int:
    """Weights of all linear layers of all layers."""
    return model.num_layers * sum(inputs * sum(outs) for inputs, outs in site_dims(model).values())


def matmul_params(model: ModelConfig) -> int:
    """Weights that a token is multiplied with, the head among them: the P of "2 P FLOPs per token"."""
    return linear_params(model) + model.vocab_size * model.hidden_size


def weight_bytes(model: ModelConfig, itemsize: int = 2, tensor_parallel: int = 1) -> int:
    """Bytes of the weights on one device; norms and biases, which are nothing beside the rest, left out."""
    tables = 1 if model.tie_word_embeddings else 2
    params = linear_params(model) + tables * model.vocab_size * model.hidden_size
    return math.ceil(params / tensor_parallel) * itemsize


def kv_bytes(model: ModelConfig, itemsize: int = 2, tensor_parallel: int = 1) -> int:
    """Bytes of one token's keys and values on one device."""
    heads = max(model.num_kv_heads // tensor_parallel, 1)
    return 2 * model.num_layers * heads * model.head_dim * itemsize


def finetune_bytes(model: ModelConfig, itemsize: int = 2, tensor_parallel: int = 1) -> int:
    """The same of a token that is trained on: keys and values, and their gradients' float32 sums. Activations in a
    stash come to it."""
    return kv_bytes(model, itemsize, tensor_parallel) + kv_bytes(model, WIDE, tensor_parallel)


def train_flops(model: ModelConfig) -> int:
    """FLOPs per token that finetuning needs, attention left out: a forward and dx, no dW (4 P)."""
    return 4 * matmul_params(model)


# the parts of a step


def step_work(
    model: ModelConfig, load: StepLoad, *, tensor_parallel: int = 1, itemsize: int = 2, remat: str | None = "full"
) -> tuple[Work, ...]:
    """Every part of one step on one device.

    Args:
      remat: what the backward computes again: none; elementwise (what lies between products); attention (all but
        attention); full. None: gradient rows have a stash; they do not run forward, and read what elementwise keeps.
    """
    return Steps(model, tensor_parallel=tensor_parallel, itemsize=itemsize, remat=remat).work(load)


def ideal_decode_seconds(model: ModelConfig, decodes: Sequence[int], device: Device, itemsize: int = 2) -> float:
    """Every weight and every key and value read once, and nothing else: the floor decode steps are measured by."""
    weights = matmul_params(model) * itemsize
    return (weights + sum(context + 1 for context in decodes) * kv_bytes(model, itemsize)) / device.bandwidth


class Steps:
    """The parts of many steps of one model; what depends on row counts alone is worked out once. See ``step_work``."""

    def __init__(self, model: ModelConfig, *, tensor_parallel: int = 1, itemsize: int = 2, remat: str | None = "full"):
        self.model, self.shards, self.itemsize, self.remat = model, tensor_parallel, itemsize, remat
        self._query_heads = model.num_heads // tensor_parallel
        self._kv_heads = max(model.num_kv_heads // tensor_parallel, 1)
        self._stash_bytes = stash_bytes(model, itemsize, tensor_parallel)
        self._windows = tuple(Counter(layer.window for layer in model.layers).items())  # (window, layers that have it)
        self._of_rows = lru_cache(NUM_KEPT)(self.of_rows)
        self._adapters = lru_cache(NUM_KEPT)(self.adapters)

    def work(self, load: StepLoad) -> tuple[Work, ...]:
        """Every part of one step on one device."""
        return (*self._of_rows(*self.sizes(load)), *(part for part in self.of_contexts(load) if not part.is_nothing))

    def sizes(self, load: StepLoad) -> tuple[int, int, int, int, tuple[str, ...]]:
        """The arguments of ``of_rows``."""
        return self._forward_rows(load), load.num_drawn, load.grad_rows, load.grad_rank, tuple(load.targets)

    def _forward_rows(self, load: StepLoad) -> int:
        return len(load.decodes) + load.chunk_rows + (0 if self.remat is None else load.grad_rows)

    def of_contexts(self, load: StepLoad) -> list[Work]:
        """The parts that depend on contexts and requests."""
        parts = self.attention(load)
        # gate and up of row blocks are read once for all that becomes of them (pallas_kernels.lora_gated)
        once = bool(load.chunks) and (self.remat is None or not load.grads)
        if load.adapters:
            adapter_rows = self._forward_rows(load) if load.adapter_rows is None else load.adapter_rows
            parts.append(self._adapters(adapter_rows, tuple(load.adapters), tuple(load.targets), once))
        if load.stashed_rows:
            read_before = 2 * self.model.intermediate_size // self.shards * self.model.num_layers if once else 0
            parts.append(self._stash("stash written", load.stashed_rows, read_before * self.itemsize))
        if load.grads:
            parts += self.attention_backward(load)
        return parts

    def of_rows(
        self, rows: int, drawn: int, grad_rows: int, grad_rank: int, targets: tuple[str, ...]
    ) -> tuple[Work, ...]:
        """The parts that know nothing of contexts and requests.

        Args:
          rows: that run forward.
        """
        parts = [*self.linears("linear", rows), self.between(rows), *self.head(rows, drawn)]
        parts.append(self.all_reduces("all-reduce", rows))
        if grad_rows:
            parts += self.backward(grad_rows, grad_rank, targets)
        return tuple(part for part in parts if not part.is_nothing)

    def linears(self, name: str, rows: int, bytes_out: int | None = None) -> list[Work]:
        """The products of all layers: one part for each kind of matrix, since each is bound by what it is bound by."""
        if not rows:
            return []
        parts = []
        for site, (inputs, outs) in self._local_dims().items():
            moved = (inputs * outs + rows * inputs) * self.itemsize + rows * outs * (bytes_out or self.itemsize)
            parts.append(
                Work(f"{name} {site}", 2 * rows * inputs * outs, moved, kernels=1).times(self.model.num_layers)
            )
        return parts

    def _local_dims(self) -> dict[str, tuple[int, int]]:
        return {
            site: (inputs // self.shards, sum(outs)) if site in ROW_PARALLEL else (inputs, sum(outs) // self.shards)
            for site, (inputs, outs) in site_dims(self.model).items()
        }

    def attention(self, load: StepLoad) -> list[Work]:
        parts = []
        if load.decodes:
            keys = sum([layers * _keys_of_decodes(load.decodes, window) for window, layers in self._windows])
            parts.append(self._attention("attention of decodes", 4, len(load.decodes), keys, keys, kernels=2))
        blocks = load.chunks if self.remat is None else [*load.chunks, *load.grads]
        if blocks:
            parts.append(self._attention_of("attention of blocks", blocks, 4, kernels=2))
        return parts

    def _attention_of(
        self, name: str, segments: Sequence[Segment], flops: int, kernels: int, kind: str = "attention", more: int = 0
    ) -> Work:
        keys = reads = 0
        for window, layers in self._windows:
            keys += layers * sum([segment.keys(window) for segment in segments])
            reads += layers * sum([segment.keys_read(window) for segment in segments])
        return self._attention(name, flops, sum([rows for rows, _ in segments]), keys, reads, kernels, kind, more)

    def _attention(
        self,
        name: str,
        flops: int,
        rows: int,
        keys: int,
        reads: int,
        kernels: int,
        kind: str = "attention",
        more: int = 0,
    ) -> Work:
        """``flops`` per query head, key seen and element of the head: 4 forward, for two products.

        Args:
          keys: seen by the rows, reads: seen by at least one; both added up over the layers.
          more: bytes.
        """
        m, heads, query_heads = self.model, self._kv_heads, self._query_heads
        rows *= m.num_layers
        moved = 2 * reads * heads + 2 * rows * query_heads + 2 * rows * heads  # K, V; q, out; K, V written
        work, moved = flops * keys * query_heads * m.head_dim, moved * m.head_dim * self.itemsize + more
        return Work(name, work, moved, 0.0, kernels * m.num_layers, 0.0, kind)

    def between(self, rows: int, passes: int = 1) -> Work:
        """Norms, rotations, activations and residuals: what lies between two products goes to memory and back."""
        m = self.model
        heads = self._query_heads + 2 * self._kv_heads
        elements = 9 * m.hidden_size + 2 * heads * m.head_dim + 3 * m.intermediate_size // self.shards
        return Work("between products", bytes=rows * elements * self.itemsize, kernels=7).times(m.num_layers * passes)

    def head(self, rows: int, R: int) -> list[Work]:
        m = self.model
        table = math.ceil(m.vocab_size / self.shards) * m.hidden_size
        parts = [Work("embedding", bytes=2 * rows * m.hidden_size * self.itemsize, kernels=1)]
        if R:
            logits = R * math.ceil(m.vocab_size / self.shards) * WIDE
            parts.append(Work("head", 2 * R * table, table * self.itemsize + logits, kernels=1))
            parts.append(Work("sampling", bytes=4 * logits, kernels=8))
        return parts

    def adapters(self, rows: int, ranks: tuple[int, ...], targets: tuple[str, ...], gated: bool = False) -> Work:
        """Each adapter's factors are read once; two kernels for each site, the second adds to what the base wrote.

        Args:
          gated: what gate and up get is added where they are gated.
        """
        flops = moved = 0
        mean_rank = sum(map(_padded, ranks)) / len(ranks)
        sites = self._adapted(targets)
        for site, members, inputs, outs in sites:
            flops += 2 * rows * mean_rank * (members * inputs + outs)
            moved += sum(_padded(rank) * (members * inputs + outs) for rank in ranks) + rows * inputs
            moved += 0 if gated and site == "gate_up_proj" else 2 * rows * outs
        return Work("adapters", flops, moved * self.itemsize, kernels=2 * len(sites)).times(self.model.num_layers)

    def _adapted(self, targets: tuple[str, ...]) -> list[tuple[str, int, int, int]]:
        """(site, members with an adapter, in, out of those members together) of those that have one, on one device."""
        found = []
        for site, (inputs, outs) in site_dims(self.model).items():
            adapted = [out for name, out in zip(MEMBERS[site], outs, strict=True) if name in targets]
            if adapted:
                by_row = site in ROW_PARALLEL
                local = (inputs // self.shards, sum(adapted)) if by_row else (inputs, sum(adapted) // self.shards)
                found.append((site, len(adapted), *local))
        return found

    def all_reduces(self, name: str, rows: int, per_layer: int = 2) -> Work:
        """The residual stream summed over the devices: a ring moves 2 (n - 1) / n of it over each link."""
        moved = 2 * (self.shards - 1) / self.shards * rows * self.model.hidden_size * self.itemsize
        layers = self.model.num_layers if self.shards > 1 else 0
        return Work(name, link_bytes=moved, collectives=1).times(per_layer * layers)

    # gradient rows

    def backward(self, W: int, grad_rank: int, targets: tuple[str, ...]) -> list[Work]:
        """All but the attention of the gradient rows."""
        again = self.remat in ("attention", "full")
        parts = self._loss(W)
        if again:
            parts += self.linears("linear again", W)
        if self.remat is None:
            parts.append(self._stash("stash read", W))
        if self.remat != "none":
            parts.append(self.between(W))
        parts += self.linears("linear backward", W, bytes_out=WIDE)
        parts.append(self.between(W, passes=2))
        parts.append(self._adapters_backward(W, grad_rank, targets, again))
        return [*parts, self.all_reduces("all-reduce backward", W, per_layer=4 if again else 2)]

    def _stash(self, name: str, rows: int, read_before: int = 0) -> Work:
        """Read at one place, but for so many bytes of a row that somebody has read, and written at the other."""
        return Work(name, bytes=rows * (2 * self._stash_bytes - read_before), kernels=6 * self.model.num_layers)

    def attention_backward(self, load: StepLoad) -> list[Work]:
        m = self.model
        parts = [self._attention_of("attention again", load.grads, 4, kernels=1)] if self.remat == "full" else []
        sums = 4 * sum([segment.keys_read(None) for segment in load.grads]) * self._kv_heads * m.head_dim * WIDE
        five_products, kind = 10, "attention_backward"
        parts.append(
            self._attention_of("attention backward", load.grads, five_products, 3, kind, more=sums * m.num_layers)
        )
        return parts

    def _loss(self, W: int) -> list[Work]:
        """The head's two products, logits and dx, a chunk of rows at a time."""
        m = self.model
        vocab, chunks = math.ceil(m.vocab_size / self.shards), math.ceil(W / HEAD_CHUNK)
        table = vocab * m.hidden_size
        moved = 2 * chunks * table * self.itemsize + 4 * W * vocab * WIDE
        return [Work("loss", 4 * W * table, moved, kernels=6 * chunks)]

    def _adapters_backward(self, W: int, grad_rank: int, targets: tuple[str, ...], again: bool) -> Work:
        """h and dh, dx, dA and dB; lanes are read and written in float32."""
        rank = _padded(grad_rank)
        flops = moved = 0
        sites = self._adapted(targets)
        for _, members, inputs, outs in sites:
            size = rank * (members * inputs + outs)
            flops += (3 + again) * 2 * W * size
            moved += W * (4 * inputs + 3 * outs) * self.itemsize + size * (2 * self.itemsize + 2 * WIDE)
        return Work("adapters backward", flops, moved, kernels=5 * len(sites)).times(self.model.num_layers)


class StepClock:
    """Seconds of many steps of one model on one device."""

    def __init__(self, steps: Steps, device: Device, efficiency: Efficiency = FLOOR):
        self._steps, self._pace = steps, (pace := Pace(device, efficiency))
        self._of_rows = lru_cache(NUM_KEPT)(lambda *sizes: pace.seconds(steps.of_rows(*sizes)))

    def seconds(self, load: StepLoad) -> float:
        """The same as ``seconds`` of the parts: these are added up in the same order."""
        return self._pace.seconds(self._steps.of_contexts(load), self._of_rows(*self._steps.sizes(load)))


def _keys_of_decodes(contexts: Sequence[int], window: int | None) -> int:
    """Keys that single rows behind so many tokens see, added up."""
    if window is None:
        return sum(contexts) + len(contexts)
    return sum([min(context + 1, window) for context in contexts])


def _padded(rank: int) -> int:
    return -(-rank // PAGE_RANK) * PAGE_RANK
