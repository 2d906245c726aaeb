"""A bare finetuning harness: windows of given sequences through the compiled step, and the same by plain autodiff.

The oracle is written without any of the engine's slots: dense attention, LoRA as two einsums, jax.grad of the whole.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import quick
import tiny_models

from jaxserve.adapters.bank import SITE_NAMES, BankShape
from jaxserve.adapters.scales import fused_inputs
from jaxserve.adapters.weights import AdapterWeights, LoraPair, ScaleVector
from jaxserve.engine.bank_writer import BankWriter
from jaxserve.engine.batch import BatchLayout
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.gradient import TrainShape, empty_scale_lanes
from jaxserve.engine.lanes import adapter_lengths, factors_of, take_gradients
from jaxserve.engine.pack import Packer, Slots
from jaxserve.engine.state import empty_state
from jaxserve.engine.step import StepSpec, step
from jaxserve.finetune.windows import FinetunePlan, Lane, Targets, TrainSequence, total_rows
from jaxserve.models import decoder
from jaxserve.models.config import ModelConfig, member_dims
from jaxserve.models.params import BIASES, SITES, param_specs
from jaxserve.scheduler.plan import StepPlan
from sharding import make_mesh, named_sharding

PAGE, BLOCK, W, CHUNK, DECODE, PAGES_PER_SEQ = 16, 8, 32, 64, 8, 8
NUM_PAGES, TRAIN_SLOTS, NUM_SLOTS, STASH_BLOCKS = 64, 6, 4, 40
LONGEST = 104  # tokens of a sequence that the oracle looks at


def random_params(config: ModelConfig, dtype: str, seed: int = 0, tp: int = 1):
    """Spread widely enough that no part of the model is close to doing nothing; in float32 less, for conditioning."""
    rng, mesh = np.random.default_rng(seed), make_mesh(tp)

    def make(spec):
        scale = 0.5 if len(spec.shape) == 1 else 0.3 if dtype == "float64" else 0.05
        value = rng.normal(size=spec.shape) * scale + (spec.init == "ones")
        return jax.device_put(value.astype(dtype), named_sharding(mesh, spec.axes))

    return jax.tree.map(make, param_specs(config, tp), is_leaf=lambda x: hasattr(x, "axes"))


def random_adapter(
    config: ModelConfig, rng, method: str = "lora", rank: int = 5, scaling: float = 1.5, members=None, inputs=()
) -> AdapterWeights:
    """An adapter of every layer; ``scaling`` and all entries are float32 numbers. ``inputs``: (IA)3's on inputs."""
    dims, pairs, vectors = member_dims(config), {}, {}
    for layer in range(config.num_layers):
        for member in members or list(dims):
            (size_in, size_out), key = dims[member], (layer, member)
            if method != "ia3":
                pairs[key] = LoraPair(rng.normal(size=(rank, size_in)) * 0.3, rng.normal(size=(size_out, rank)) * 0.3)
            if method == "dora":
                vectors[key] = ScaleVector("magnitude", 1 + rng.random(size_out))
            if method == "ia3":
                kind = "input_scale" if member in inputs else "output_scale"
                vectors[key] = ScaleVector(kind, 1 + 0.5 * rng.normal(size=size_in if member in inputs else size_out))
    return AdapterWeights(
        method=method, config={}, scaling=dict.fromkeys(pairs, float(np.float32(scaling))), pairs=pairs, vectors=vectors
    )


class Trainer:
    """One engine's worth of device state, driven by hand."""

    def __init__(
        self,
        family: str,
        dtype: str,
        remat: str = "full",
        tp: int = 1,
        lanes: int = 2,
        pages: int = 2,
        scaled: bool = False,
        dropout: bool = False,
        stashed: bool = False,
        **overrides,
    ):
        self.config = ModelConfig.from_dict(tiny_models.config_dict(family, **overrides))
        self.params, self.mesh, self.dtype = random_params(self.config, dtype, tp=tp), make_mesh(tp), dtype
        self.bank = BankShape(self.config, 1 + lanes * pages, tp, dtype)
        self.train = TrainShape(
            TRAIN_SLOTS, acc_pages=40, lane_pages=lanes * pages, remat="full" if stashed else remat, num_lanes=lanes,
            stash_blocks=STASH_BLOCKS if stashed else 0, row_block=BLOCK,
        )  # fmt: skip
        self.bucket = Bucket(CHUNK, 0 if stashed else DECODE, W, stashed)  # finetuning alone carries none
        runs = self.bucket.forward_block_rows // BLOCK + DECODE
        self.layout = BatchLayout(
            self.bucket, NUM_SLOTS, PAGES_PER_SEQ, runs * pages,
            train_slots=TRAIN_SLOTS, grad_items=W // BLOCK * pages, row_block=BLOCK, scaled=scaled,
            dropout=dropout,
        )  # fmt: skip
        self.spec = StepSpec(
            config=self.config, mesh=self.mesh, layout=self.layout, row_block=BLOCK, page_size=PAGE,
            bank=self.bank, train=self.train, scaled=scaled,
        )  # fmt: skip
        self.state = empty_state(
            self.config, self.mesh, num_pages=NUM_PAGES, page_size=PAGE, num_slots=NUM_SLOTS, dtype=dtype,
            bank=self.bank, train=self.train,
        )  # fmt: skip
        self.writer = BankWriter(self.bank, self.mesh, pages)
        if scaled:
            self.writer.enable_scales()
            scale_lanes = empty_scale_lanes(self.train, self.bank, self.mesh)
            self.state = self.state.replace(train=self.state.train.replace(scale_lanes=scale_lanes))
        slots = Slots(NUM_SLOTS, PAGES_PER_SEQ, TRAIN_SLOTS)
        vocab, bank_pages = self.config.vocab_size, self.bank.num_pages
        self.packer = Packer(
            slots, {(self.bucket, True): self.layout}, BLOCK, NUM_PAGES, PAGE, vocab, bank_pages, self.train
        )
        self.pages, self.free_pages, self.free_acc = pages, list(range(NUM_PAGES)), list(range(40))
        self.free_blocks = list(range(STASH_BLOCKS if stashed else 0))
        self.steps = 0
        self._quick: Any = None

    def lane(self, index: int, adapter: AdapterWeights) -> Lane:
        """Uploads an adapter and gives it a lane."""
        first, count = index * self.pages, max(1, -(-adapter.rank // 16))
        bank_pages, lane_pages = tuple(1 + first + i for i in range(count)), tuple(first + i for i in range(count))
        bank = self.writer.write(self.state.bank, adapter, list(bank_pages), self.params)
        self.state = self.state.replace(bank=bank)
        sites = tuple(i for i, s in enumerate(SITE_NAMES) if {m for _, m in adapter.pairs} & set(SITES[s]))
        return Lane(index, bank_pages, sites, lane_pages, bool(adapter.vectors), fused_inputs(adapter))

    def sequence(self, lane: Lane, token_ids, weights, window: int, slot: int, **options) -> TrainSequence:
        targets = Targets(weights=np.asarray(weights, np.float32))
        seq = TrainSequence(np.asarray(token_ids, np.int32), targets, lane, window=window, **options)
        seq.slot = slot
        needed = -(-len(token_ids) // PAGE)
        seq.pages = [self.free_pages.pop() for _ in range(needed)]
        seq.acc_pages = [self.free_acc.pop() for _ in range(needed)]
        if self.free_blocks:
            seq.row_block = BLOCK
            seq.stash_blocks = [self.free_blocks.pop() for _ in range(-(-seq.num_rows // BLOCK))]
        return seq

    def run(self, grads=(), forwards=(), plan: StepPlan | None = None):
        """One step with these windows."""
        plan = StepPlan(index=self.steps, chunks=(), chunk_rows=0, finetune=FinetunePlan(grads, forwards))
        packed = self.packer.pack(plan, self.bucket, True)
        arguments = self.params, self.state, packed.ints, packed.floats, self.writer.scales
        if self.dtype == "float64":  # whose bits nobody compares
            self._quick = self._quick or step.lower(*arguments, spec=self.spec).compile(compiler_options=quick.OPTIONS)
            self.state, output = self._quick(*arguments)
        else:
            self.state, output = step(*arguments, spec=self.spec)
        self.steps += 1
        row = 0
        for w in grads:
            w.seq.losses[w.start + 1 : w.end + 1] = np.asarray(output.loss_W)[row : row + w.length]
            w.seq.logprobs[w.start + 1 : w.end + 1] = np.asarray(output.train_logprob_W)[row : row + w.length]
            row += -(-w.length // BLOCK) * BLOCK
        return output

    def train_on(self, sequences, rng) -> None:
        """All rows of all sequences, in windows of random lengths, in a random legal order and packing."""
        while not all(seq.done for seq in sequences):
            grads, forwards = [], []
            for seq in rng.permutation(np.array(sequences, object)):
                room = W - total_rows(grads, BLOCK)
                window = seq.backward_window(int(rng.integers(room + 1)))
                needed = window and (window.end if seq.stash_blocks else window.start)
                if window and (seq.backward_begun or needed <= seq.forwarded) and rng.random() < 0.8:
                    grads.append(window)
                    seq.take_backward(window)
                    continue
                room = int(rng.integers(CHUNK - total_rows(forwards, BLOCK) + 1))
                if seq.stash_blocks:
                    room -= room % BLOCK
                window = seq.forward_window(room, last=int(rng.integers(1, W + 1)))
                if window:
                    forwards.append(window)
                    seq.take_forward(window)
            self.run(tuple(grads), tuple(forwards))

    def gradients(self, lane: Lane, adapter: AdapterWeights) -> dict:
        """What the lane accumulated, as the engine takes it; the lane is empty afterwards."""
        factors, norms = factors_of(adapter, self.config), {}
        if adapter.method == "dora":
            norms = adapter_lengths(
                self.state.bank, self.params, jnp.asarray(lane.adapter_pages, jnp.int32),
                mesh=self.mesh, shape=self.bank, members=tuple(factors),
            )  # fmt: skip
        train, found = take_gradients(
            self.state.train, jnp.asarray(lane.lane_pages, jnp.int32), jnp.int32(lane.index), factors, norms,
            mesh=self.mesh, rank=adapter.rank, num_layers=self.config.num_layers,
        )  # fmt: skip
        self.state = self.state.replace(train=train)
        return {
            (layer, m): {leaf: np.asarray(value)[layer] for leaf, value in leaves.items()}
            for m, leaves in found.items()
            for layer in range(self.config.num_layers)
        }


class Oracle:
    """Loss and gradients of one sequence of one adapter by jax.grad over the whole of it.

    Sequences are padded behind their end, where nothing that is before looks, so that all of them share a program.

    Args:
      drop: (layer, site, x, key) to what the adapter's A sees of x.
    """

    def __init__(self, config: ModelConfig, params, adapter: AdapterWeights, drop=None):
        self.config, self.params, self.adapter = config, params, adapter
        self.drop = drop or (lambda layer, site, x, key: x)
        self._gradient = jax.jit(jax.value_and_grad(self._loss, has_aux=True), compiler_options=quick.OPTIONS)

    def __call__(self, token_ids, weights, key: int = 0):
        """Loss, log-probabilities of the tokens after the first, and gradients by module.

        Args:
          key: of the example's dropout.
        """
        wide, adapter = self.params["embed"].dtype, self.adapter
        leaves: dict = {}
        for at, pair in adapter.pairs.items():
            leaves[at] = {"a": jnp.asarray(pair.a, wide), "b": jnp.asarray(pair.b, wide)}
        for at, vector in adapter.vectors.items():
            leaves.setdefault(at, {})[vector.kind] = jnp.asarray(vector.value, wide)
        padding = (0, LONGEST - len(token_ids))
        ids, weights = np.pad(np.asarray(token_ids, np.int32), padding), np.pad(np.asarray(weights, wide), padding)
        (value, logprob), gradients = self._gradient(leaves, self.params, ids, weights, np.int32(key))
        return float(value), np.asarray(logprob)[: len(token_ids) - 1], jax.tree.map(np.asarray, gradients)

    def _loss(self, leaves, params, ids, weights, key):
        config, adapter = self.config, self.adapter

        def linear(site, p, x):
            outs, row = [], 0
            for member in SITES[site]:
                rows = slice(row, row := row + member_dims(config)[member][1])
                w, bias, at = p[site][rows], p.get(BIASES[site]), (p["index"], member)
                outs.append(module(w, None if bias is None else bias[rows], x, at, leaves.get(at, {}), site))
            return jnp.concatenate(outs, 1).astype(x.dtype)

        def module(w, bias, x, at, leaf, site):
            """One linear layer as PEFT writes it."""
            y = jnp.einsum("ti,oi->to", x * leaf["input_scale"][None] if "input_scale" in leaf else x, w)
            if "a" in leaf:
                update = adapter.scaling[at] * jnp.einsum("or,ri->oi", leaf["b"], leaf["a"])
                y = y + jnp.einsum("ti,oi->to", self.drop(at[0], site, x, key), update)
            if "magnitude" in leaf:
                length = jax.lax.stop_gradient(jnp.linalg.norm(w + update, axis=1))
                y = y * (leaf["magnitude"] / length)[None]
            y = y if bias is None else y + bias[None]
            return y * leaf["output_scale"][None] if "output_scale" in leaf else y

        layers = [{**p, "index": i} for i, p in enumerate(params["layers"])]
        hidden, _ = decoder.forward(
            {**params, "layers": layers}, ids, jnp.arange(LONGEST, dtype=jnp.int32), config=config,
            lookup=decoder.plain_lookup, linear=linear, attend=decoder.plain_attend(config),
            kv=[None] * config.num_layers,
        )  # fmt: skip
        logits = decoder.logits(params, hidden, config)[:-1, : config.vocab_size]
        logprob = jax.nn.log_softmax(logits, axis=-1)[jnp.arange(LONGEST - 1), ids[1:]]
        return -jnp.sum(logprob * weights[1:]), logprob


def relative(found, expected) -> float:
    """Greatest relative error over the arrays, in norm."""
    worst = 0.0
    for key, leaves in expected.items():
        assert found[key].keys() == leaves.keys()
        for leaf, y in leaves.items():
            worst = max(worst, float(np.linalg.norm(found[key][leaf] - y) / (np.linalg.norm(y) + 1e-30)))
    return worst


__all__ = ["Oracle", "Trainer", "random_adapter", "random_params", "relative"]
