"""A bare finetuning harness: windows of given sequences through the compiled step, and the same by plain autodiff.

The oracle is written without any of the engine's slots: dense attention, LoRA as two einsums, jax.grad of the whole.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models

from jaxserve.adapters.bank import SITE_NAMES, BankShape, write_page
from jaxserve.engine.batch import LORA_ROWS, BatchLayout
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.gradient import TrainShape
from jaxserve.engine.pack import Packer, Slots
from jaxserve.engine.state import empty_state
from jaxserve.engine.step import StepSpec, step
from jaxserve.finetune.windows import FinetunePlan, Lane, Targets, TrainSequence, cut, total_rows
from jaxserve.models import decoder
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import matmul
from jaxserve.models.params import BIASES, SITES, member_dims, param_specs
from jaxserve.scheduler.plan import StepPlan
from sharding import make_mesh, named_sharding

PAGE, BLOCK, W, CHUNK, DECODE, PAGES_PER_SEQ = 16, 8, 32, 64, 8, 8
NUM_PAGES, TRAIN_SLOTS, NUM_SLOTS = 64, 6, 4


def random_params(config: ModelConfig, dtype: str, seed: int = 0, tp: int = 1):
    """Spread widely enough that no part of the model is close to doing nothing; in float32 less, for conditioning."""
    rng, mesh = np.random.default_rng(seed), make_mesh(tp)

    def make(spec):
        scale = 0.5 if len(spec.shape) == 1 else 0.3 if dtype == "float64" else 0.05
        value = rng.normal(size=spec.shape) * scale + (spec.init == "ones")
        return jax.device_put(value.astype(dtype), named_sharding(mesh, spec.axes))

    return jax.tree.map(make, param_specs(config, tp), is_leaf=lambda x: hasattr(x, "axes"))


def random_adapter(config: ModelConfig, rank: int, scaling: float, rng, members=None) -> dict:
    """(layer, member) -> (A [r, in], B [out, r], scaling)."""
    chosen = members or list(member_dims(config))
    return {
        (layer, m): (rng.normal(size=(rank, i)) * 0.3, rng.normal(size=(o, rank)) * 0.3, scaling)
        for layer in range(config.num_layers)
        for m, (i, o) in member_dims(config).items()
        if m in chosen
    }


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
        **overrides,
    ):
        self.config = ModelConfig.from_dict(tiny_models.config_dict(family, **overrides))
        self.params, self.mesh, self.dtype = random_params(self.config, dtype, tp=tp), make_mesh(tp), dtype
        self.bank = BankShape(self.config, 1 + lanes * pages, tp, dtype)
        self.train = TrainShape(TRAIN_SLOTS, acc_pages=40, lane_pages=lanes * pages, remat=remat)
        self.bucket = Bucket(CHUNK, DECODE, W)
        blocks = -(-self.bucket.rows // LORA_ROWS) + lanes
        self.layout = BatchLayout(
            self.bucket, NUM_SLOTS, PAGES_PER_SEQ, blocks, blocks * pages,
            train_slots=TRAIN_SLOTS, grad_items=W // BLOCK * pages, row_block=BLOCK, scaled=scaled,
        )  # fmt: skip
        self.spec = StepSpec(
            config=self.config, mesh=self.mesh, layout=self.layout, row_block=BLOCK, page_size=PAGE, max_logprobs=2,
            bank=self.bank, train=self.train,
        )  # fmt: skip
        self.state = empty_state(
            self.config, self.mesh, num_pages=NUM_PAGES, page_size=PAGE, num_slots=NUM_SLOTS, dtype=dtype,
            bank=self.bank, train=self.train,
        )  # fmt: skip
        slots = Slots(NUM_SLOTS, PAGES_PER_SEQ, TRAIN_SLOTS)
        vocab, bank_pages = self.config.vocab_size, self.bank.num_pages
        self.packer = Packer(
            slots, {(self.bucket, scaled): self.layout}, BLOCK, NUM_PAGES, PAGE, vocab, bank_pages, self.train
        )
        self.pages, self.free_pages, self.free_acc = pages, list(range(NUM_PAGES)), list(range(40))
        self.steps = 0

    def lane(self, index: int, pairs: dict, rank: int) -> Lane:
        """Uploads an adapter and gives it a lane."""
        contents = self.bank.paged(pairs, rank)
        bank_pages = tuple(1 + index * self.pages + i for i in range(len(contents)))
        for page, content in zip(bank_pages, contents, strict=True):
            cast = jax.tree.map(lambda x: x.astype(self.dtype), content)
            self.state = self.state.replace(bank=write_page(self.state.bank, np.int32(page), cast, self.bank.num_pages))
        sites = tuple(i for i, s in enumerate(SITE_NAMES) if {m for _, m in pairs} & set(SITES[s]))
        return Lane(index, bank_pages, sites, tuple(index * self.pages + i for i in range(len(contents))))

    def sequence(self, lane: Lane, token_ids, weights, window: int, slot: int) -> TrainSequence:
        windows = cut(len(token_ids), window)
        seq = TrainSequence(
            np.asarray(token_ids, np.int32), Targets(weights=np.asarray(weights, np.float32)), lane, windows
        )
        seq.slot = slot
        needed = -(-len(token_ids) // PAGE)
        seq.pages = [self.free_pages.pop() for _ in range(needed)]
        seq.acc_pages = [self.free_acc.pop() for _ in range(needed)]
        return seq

    def run(self, grads=(), forwards=(), plan: StepPlan | None = None):
        """One step with these windows."""
        plan = StepPlan(
            index=self.steps, chunks=(), decodes=(), samples=(), chunk_rows=0, finetune=FinetunePlan(grads, forwards)
        )
        packed = self.packer.pack(plan, self.bucket)
        self.state, output = step(self.params, self.state, packed.ints, packed.floats, spec=self.spec)
        self.steps += 1
        row = 0
        for w in grads:
            w.seq.losses[w.start + 1 : w.end + 1] = np.asarray(output.loss_W)[row : row + w.length]
            w.seq.logprobs[w.start + 1 : w.end + 1] = np.asarray(output.train_logprob_W)[row : row + w.length]
            row += -(-w.length // BLOCK) * BLOCK
        return output

    def train_on(self, sequences, rng) -> None:
        """All windows of all sequences, in a random legal order and packing."""
        while not all(seq.done for seq in sequences):
            grads, forwards = [], []
            for seq in rng.permutation(np.array(sequences, object)):
                window = seq.next_backward
                if window and total_rows([*grads, window], BLOCK) <= W and rng.random() < 0.8:
                    grads.append(window)
                    seq.num_backward += 1
                elif (window := seq.next_forward) and total_rows([*forwards, window], BLOCK) <= CHUNK:
                    forwards.append(window)
                    seq.num_forward += 1
            self.run(tuple(grads), tuple(forwards))

    def gradients(self, lane: Lane, pairs: dict, rank: int) -> dict:
        """What the lane accumulated, as (layer, member) -> (dA, dB) of PEFT's factors (scaling taken out)."""
        L, tp = self.config.num_layers, self.mesh.size
        assert tp == 1
        found = {}
        for site, members in SITES.items():
            lanes = self.state.train.lanes[site]
            a = np.asarray(lanes.a_PRD)[0].reshape(L, -1, len(members), 16, lanes.a_PRD.shape[-1])
            for i, member in enumerate(members):
                b = np.asarray(lanes.members[i])[0].reshape(L, -1, *lanes.members[i].shape[2:])
                for layer in range(L):
                    if (layer, member) in pairs:
                        d_a = np.concatenate([a[layer, p, i] for p in lane.lane_pages])[:rank]
                        d_b = np.concatenate([b[layer, p] for p in lane.lane_pages], axis=1)[:, :rank]
                        found[layer, member] = (d_a, d_b * pairs[layer, member][2])
        return found


def oracle(config: ModelConfig, params, pairs: dict, token_ids, weights):
    """Loss and gradients of one sequence by jax.grad over the whole of it."""
    scaling = {key: value[2] for key, value in pairs.items()}
    factors = {key: (jnp.asarray(a), jnp.asarray(b)) for key, (a, b, _) in pairs.items()}

    def loss(factors):
        def linear(site, p, x):
            outs = []
            for member in SITES[site]:
                out = member_dims(config)[member][1]
                if (p["index"], member) in factors:
                    a, b = factors[p["index"], member]
                    outs.append(scaling[p["index"], member] * jnp.einsum("tr,or->to", jnp.einsum("ti,ri->tr", x, a), b))
                else:
                    outs.append(jnp.zeros((x.shape[0], out), x.dtype))
            y = matmul(x, p[site]) + jnp.concatenate(outs, 1).astype(x.dtype)
            return y if p.get(BIASES[site]) is None else y + p[BIASES[site]][None]

        layers = [{**p, "index": i} for i, p in enumerate(params["layers"])]
        ids = jnp.asarray(token_ids, jnp.int32)
        hidden, _ = decoder.forward(
            {**params, "layers": layers}, ids, jnp.arange(len(token_ids), dtype=jnp.int32), config=config,
            lookup=decoder.plain_lookup, linear=linear, attend=decoder.plain_attend(config),
            kv=[None] * config.num_layers,
        )  # fmt: skip
        logits = decoder.logits(params, hidden, config)[:-1, : config.vocab_size]
        logprob = jax.nn.log_softmax(logits, axis=-1)[jnp.arange(len(token_ids) - 1), ids[1:]]
        return -jnp.sum(logprob * jnp.asarray(weights, logprob.dtype)[1:]), logprob

    (value, logprob), gradients = jax.jit(partial(jax.value_and_grad, has_aux=True)(loss))(factors)
    return float(value), np.asarray(logprob), jax.tree.map(np.asarray, gradients)


def relative(found, expected) -> float:
    """Greatest relative error over the arrays, in norm."""
    worst = 0.0
    for key, arrays in expected.items():
        for x, y in zip(found[key], arrays, strict=True):
            worst = max(worst, float(np.linalg.norm(x - y) / (np.linalg.norm(y) + 1e-30)))
    return worst


__all__ = ["Trainer", "oracle", "random_adapter", "random_params", "relative"]
