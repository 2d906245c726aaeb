"""The backward of the gradient rows, in the step that runs their forward or in a later one.

The forward runs all rows of a step through the same matmuls. Only W gradient rows are differentiated: every linear
layer and attention has its own backward that looks at those rows alone, so no inference row costs a backward matmul,
and the frozen weights get no gradient at all. With a stash (``engine.stash``) the rows' forward ran in an earlier step
and left there what elementwise keeps. Without one they are the first W rows of the step, and how much of the forward
is kept is the remat policy:

    full       each layer's input; the layer is run again, for the gradient rows alone, when its turn comes
    attention  that and attention's output; all but attention is run again
    elementwise  those and what the linear layers gave; norms, rotations and activations are run again, no product is
    none       everything autodiff asks for, of all rows; nothing is run again

Shapes: T rows, W gradient rows, L layers, D hidden, I in, O out, H query heads, K kv heads, C head dim, A accumulator
pages, Y lane pages, R ranks, E out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxserve.adapters.bank import SITE_NAMES, BankShape, SiteBank
from jaxserve.adapters.scales import ScalesShape, SiteScales
from jaxserve.engine import batch as flags
from jaxserve.engine.activations import REMAT
from jaxserve.engine.batch import TokenBatch
from jaxserve.engine.linear import Lanes, Linear, Linears
from jaxserve.engine.stash import GATE_UP, Kept, Stash, StashShape, Tape, take
from jaxserve.kvcache.pool import KV_AXES, kv_spec
from jaxserve.models import decoder
from jaxserve.models.config import LayerConfig, ModelConfig, RopeConfig
from jaxserve.models.layers import rms_norm
from pallas_kernels.cross_entropy import loss_and_gradient
from pallas_kernels.gating import gated
from pallas_kernels.numerics import after, apart, contract, wide_dtype
from pallas_kernels.ragged_paged_attention import (
    AttentionLayout,
    clear_rows,
    ragged_paged_attention,
    ragged_paged_attention_backward,
    read_rows,
)
from pallas_kernels.token_sampling import VocabShard
from sharding import ArraySpec, named_sharding, partition_spec, zeros


@struct.dataclass
class TrainState:
    """What finetuning keeps on the device between steps.

    A lane page holds the gradient of one bank page's worth of an adapter (16 ranks of every layer), in float32 or
    wider. Where a factor is replicated over devices its gradient is not (each device has a term of it), so all
    lanes carry the device as their first axis; the terms are summed once per optimizer step.
    """

    acc: list[tuple[Float[Array, "A K G C"], Float[Array, "A K G C"]]]  # dK, dV; pages that nobody owns are zero
    lanes: dict[str, SiteBank]  # a [devices, L * Y, R, D], members [devices, L * Y, E, 16]
    scale_lanes: dict[str, SiteScales] | None = None  # [devices, L * lanes, ...]; only beside scaled programs
    stash: Stash | None = None  # activations between forward and backward; None: both run in one step


def stash_alone(train: TrainState) -> TrainState:
    """The state without sums."""
    return TrainState(acc=[], lanes={}, stash=train.stash)


def sums_alone(train: TrainState) -> TrainState:
    """The sums of the adapters' gradients without what sequences need."""
    return replace(train, acc=[], stash=None)


@dataclass(frozen=True)
class TrainShape:
    """Sizes of the finetuning state."""

    num_slots: int  # sequences between their first and last window
    acc_pages: int
    lane_pages: int
    remat: str = "full"
    num_lanes: int = 1
    stash_blocks: int = 0  # row blocks of sequences between forward and backward; 0: both run in one step
    row_block: int = 1

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}; it must be one of {', '.join(REMAT)}")


def empty_train_state(
    shape: TrainShape, bank: BankShape, config: ModelConfig, mesh: Mesh, page_size: int, dtype: str
) -> TrainState:
    """All zeros, on the mesh."""
    wide = wide_dtype(jnp.dtype(dtype))
    pool = kv_spec(config, shape.acc_pages, page_size, mesh.size)

    def accumulators() -> jax.Array:
        return zeros(mesh, pool.shape, pool.axes, wide)

    stash = StashShape(config, shape.stash_blocks, shape.row_block, mesh.size, dtype)
    return TrainState(
        acc=[(accumulators(), accumulators()) for _ in range(config.num_layers)],
        lanes=_lanes(bank.specs(), shape.lane_pages, bank, mesh, wide),
        stash=stash.empty(mesh) if shape.stash_blocks else None,
    )


def empty_scale_lanes(shape: TrainShape, bank: BankShape, mesh: Mesh) -> dict[str, SiteScales]:
    """Zeros for the gradients of scales, on the mesh."""
    scales = ScalesShape(bank)
    return _lanes(scales.specs(), shape.num_lanes, bank, mesh, scales.dtype)


def _lanes(specs: Any, pages: int, bank: BankShape, mesh: Mesh, dtype: np.dtype) -> Any:
    """A lane array [devices, L * pages, ...] for each array of the bank, every device with sums of its own."""

    def lane(spec: ArraySpec) -> jax.Array:
        local = named_sharding(mesh, spec.axes).shard_shape(spec.shape)
        return zeros(mesh, (mesh.size, local[0] // bank.num_pages * pages, *local[1:]), ("device",), dtype)

    return jax.tree.map(lane, specs, is_leaf=lambda x: isinstance(x, ArraySpec))


def train_specs(train: TrainState, bank: BankShape) -> Any:
    """The PartitionSpec of every array."""
    pool, lane = partition_spec(KV_AXES), partition_spec(("device",))
    lanes, scale_lanes = jax.tree.map(lambda _: lane, (train.lanes, train.scale_lanes))
    stash = None if train.stash is None else StashShape(bank.config, 1, 1, bank.tensor_parallel, bank.dtype).specs()
    return cast(Any, TrainState)([(pool, pool) for _ in train.acc], lanes, scale_lanes, stash)


class GradientRows:
    """The gradient rows of one step: their layers, differentiable, and their backward.

    Made while tracing, inside ``shard_map``. Without a stash the forward is to run with ``tape``.
    """

    def __init__(self, params: Any, batch: TokenBatch, train: TrainState | None, linears: Linears, spec: Any):
        assert batch.grad is not None, "a step without gradient rows"
        assert train is not None, "a state without room for training"
        self.train: TrainState = train
        self.params, self.grad, self.linears, self.spec = params, batch.grad, linears, spec
        self.W = spec.layout.bucket.grad_rows
        self.tape: Tape | None = None  # there is a stash
        if not spec.layout.bucket.stashed:
            remat = spec.train.remat
            self.tape = AutodiffTape(self) if remat == "none" else Tape(linears, self.W, remat)
        self.pull_layers: dict[LayerConfig, Callable] = {}  # the backward of each kind of layer, traced once
        self.ropes: dict[RopeConfig, tuple[jax.Array, jax.Array]] = {}  # cos and sin, [W, C] each
        slots, W = spec.layout.all_slots, self.W
        self.slot_W = jnp.minimum(self.grad.rows.slot_T, slots - 1)
        self.position_W = self.grad.rows.position_T
        self.layout = AttentionLayout(
            position_T=self.position_W,
            sequence_T=self.slot_W,
            page_table_BM=batch.page_table_BM,
            chunk_rows=W,
            row_block=spec.row_block,
        )
        place_W = jnp.maximum(self.position_W, 0)
        page_W = self.grad.acc_table_BM.at[self.slot_W, place_W // spec.page_size].get(mode="clip")
        self.acc_page_W = jnp.where(self.position_W >= 0, page_W, train.acc[0][0].shape[0])
        self.acc_offset_W = place_W % spec.page_size
        self.settings: dict[str, Any] = {"scale": spec.config.attention_scale, "softcap": spec.config.attention_softcap}

    # backward

    def backward(self, train: TrainState, kv: list) -> tuple[TrainState, jax.Array, jax.Array]:
        """The state with this window's gradients, and each row's loss and target's log-probability [W].

        Args:
          train, kv: as the step's forward has left them.
        """
        self.train, spec = train, self.spec
        head = frozen_head(self.params, spec.config, spec.shard)
        hidden_WD, pull_norm = jax.vjp(lambda x: rms_norm(x, self.params["final_norm"], spec.config), self._last())
        loss_W, logprob_W, d_hidden_WD = loss_and_gradient(hidden_WD, self.grad.loss, head, spec.shard)
        (d_x_WD,) = pull_norm(d_hidden_WD)
        acc, last_sums = list(self.train.acc), []
        for index in reversed(range(spec.config.num_layers)):
            d_x_WD, lanes, sums = self._pull_layer(index, d_x_WD, kv[index], last_sums)
            acc[index] = clear_rows(sums, self.acc_page_W, self.acc_offset_W, jax.tree.leaves(lanes))
            last_sums = jax.tree.leaves((lanes, acc[index]))
            self.train = _with_lanes(self.train, lanes, index)  # the next layer adds to them there: no copy of any
        return replace(self.train, acc=acc), loss_W, logprob_W

    def _last(self) -> Float[Array, "W D"]:
        """What the final norm was of."""
        if self.tape is None:
            return take(self._stash.last_NQD, self._block_N)
        assert self.tape.last_WD is not None, "backward comes after the forward"
        return self.tape.last_WD

    @property
    def _stash(self) -> Stash:
        assert self.train.stash is not None, "a state without a stash"
        return self.train.stash

    @property
    def _block_N(self) -> Int[Array, "N"]:
        """The stash's blocks of these rows."""
        assert self.grad.stash_block_N is not None, "a step whose gradient rows run forward in it"
        return self.grad.stash_block_N

    def _pull_layer(self, index: int, d_x_WD, kv, last_sums: list[jax.Array]):
        """The backward of one layer, after the one behind it has added to its sums: nothing else waits for them, and
        what they are of would be kept until the end."""
        if isinstance(self.tape, AutodiffTape):
            T, d_x_WD = self.spec.layout.bucket.rows, after(d_x_WD, last_sums)
            d_x_TD = jnp.pad(d_x_WD, ((0, T - self.W), (0, 0)))
            d_x_TD, lanes, acc = self.tape.pulls[index]((d_x_TD, self.lanes_of(index)))
            return d_x_TD[: self.W], lanes, acc
        layer_config = self.spec.config.layers[index]
        if layer_config.rope not in self.ropes:
            position_W = jnp.maximum(self.position_W, 0)
            self.ropes[layer_config.rope] = decoder.rotary(self.spec.config, layer_config, position_W, d_x_WD.dtype)
        if layer_config not in self.pull_layers:
            self.pull_layers[layer_config] = jax.jit(partial(self._pull, layer_config))
        p = {**self.params["layers"][index], "index": after(jnp.int32(index), last_sums)}
        lanes, acc = self.lanes_of(index), self.train.acc[index]
        kept = self._stash.layers[index] if self.tape is None else self.tape.kept[index]
        return self.pull_layers[layer_config](p, kept, d_x_WD, kv, lanes, acc)

    def _pull(self, layer_config: LayerConfig, p: dict, kept: Kept, d_x_WD, kv, lanes: dict[str, Lanes], acc):
        """The backward of one layer: dx, and the lanes and accumulators as this window leaves them.

        Args:
          kept: of these rows, or the stash of the layer.
        """
        # nothing of a layer is to be read or run again before its turn: all layers at once would be kept at one time
        stashed = kept
        if self.tape is None:
            kept = take(kept, after(self._block_N, [d_x_WD, p["index"].astype(jnp.float32)]))
            x_WD, products = kept.x_WD, kept.products
        else:
            x_WD, d_x_WD = lax.optimization_barrier((kept.x_WD, d_x_WD))
            products = {site: after(z_WO, [d_x_WD]) for site, z_WO in kept.products.items()}
        rope = self.ropes[layer_config.rope]

        def run(x_WD, lanes, acc):
            left = dict[str, Lanes]()

            def attend(q, k, v, kv, layer):
                return self.attention(q, k, v, acc, kv, layer, kept.attended), kv

            def linear(site, p, x):
                linear, known = self.linears.of_gradient_rows(site, p["index"]), products.get(site)
                if self.tape is None and known is None and linear.scales is None:
                    known = jnp.zeros_like(x_WD)  # down_proj's, which nothing looks at
                y_WO, left[site] = self.linear(linear, p, x, lanes[site], known)
                return y_WO

            def gate_up(p, x):
                return self._gate(linear(GATE_UP, p, x), stashed.products[GATE_UP])

            in_stash = self.tape is None and self.linears.of_gradient_rows(GATE_UP, p["index"]).has_only_factors(p)
            y_WD, _ = decoder.layer(
                p, x_WD, config=self.spec.config, layer=layer_config, rope=rope, linear=linear, attend=attend, kv=kv,
                gate_up=gate_up if in_stash else None,
            )  # fmt: skip
            return y_WD, left

        _, pull = jax.vjp(run, x_WD, lanes, acc)
        return pull((d_x_WD, lanes))

    def _gate(self, gate_up_WE: jax.Array, pool_NQE: jax.Array) -> jax.Array:
        """The gate of what lies in the stash. Its backward reads that once more and computes act(gate) again; else
        act(gate) would be written for it to read."""
        run = partial(gated, activation=self.spec.config.activation)

        def run_backward(_, d_act_WF):
            again_WE = take(pool_NQE, after(self._block_N, [d_act_WF]))
            return jax.vjp(run, again_WE)[1](d_act_WF)

        return _with_vjp(run, lambda gate_up_WE: (run(gate_up_WE), None), run_backward)(gate_up_WE)

    # the differentiable slots

    def lanes_of(self, index: int) -> dict[str, Lanes]:
        """The sums that one layer adds to, by site: of the factors all layers', of the scales its own."""
        L, train = self.spec.config.num_layers, self.train

        def of_layer(lane: jax.Array) -> jax.Array:
            rows = lane.shape[1] // L
            return lane[0, index * rows : (index + 1) * rows]

        scales = dict.fromkeys(SITE_NAMES) if train.scale_lanes is None else train.scale_lanes
        factors = jax.tree.map(lambda lane: lane[0], train.lanes)
        return {site: Lanes(factors[site], jax.tree.map(of_layer, scales[site])) for site in SITE_NAMES}

    def linear(self, linear: Linear, p: dict, x, lanes: Lanes, known=None):
        """``linear``, differentiable in x's first W rows, and ``lanes``, which the forward passes on unread. Their
        cotangents are not gradients but sums: those of the second result as these rows find them, those of ``lanes`` as
        these rows leave them.

        Args:
          known: [W, O], what it gave before scales; by default it is run.
        """
        W, rows = self.W, self.linears.of_gradient_rows(linear.site, p["index"])

        def before_scaling(x):
            return linear.before_scaling(p, x) if known is None else known

        def run(x, lanes):
            return linear.finish(p, before_scaling(x)), lanes

        def run_forward(x, lanes):
            z = before_scaling(x)
            return (linear.finish(p, z), lanes), (x[:W], z[:W] if linear.scales is not None else None)

        def run_backward(kept, cotangents):
            (x_WI, z_WO), (d_y, lanes) = kept, cotangents
            d_y_WO = apart(d_y[:W], self.linears.batch.flags[flags.ALWAYS])
            d_x_WI, lanes = rows.backward(p, x_WI, z_WO, d_y_WO, lanes)
            return jnp.pad(d_x_WI, ((0, d_y.shape[0] - W), (0, 0))), lanes

        return _with_vjp(run, run_forward, run_backward)(x, lanes)

    def attention(self, q, k, v, acc, kv, layer: LayerConfig, known):
        """Attention over pools that hold this step's keys already, differentiable in q, k and v of the first W rows.

        The cotangent of ``acc`` is not a gradient but the accumulators with this window's added; its rows' are read.
        """
        W, table_BM = self.W, self.grad.acc_table_BM
        settings: dict[str, Any] = {**self.settings, "window": layer.window}

        def forward(q):
            if known is not None:
                return known
            k_PKGC, v_PKGC = kv
            return ragged_paged_attention(
                q, k_PKGC, v_PKGC, self.layout, **settings, implementation=self.spec.attention
            )

        def run(q, k, v, acc):
            return forward(q)[0]

        def run_forward(q, k, v, acc):
            out, lse = forward(q)
            return out, (q[:W], out[:W], lse[:W], acc)

        def run_backward(kept, d_out):
            (q_WHC, out_WHC, lse_WH, acc), (k_PKGC, v_PKGC) = kept, kv
            arrays = d_out[:W], q_WHC, out_WHC, lse_WH, k_PKGC, v_PKGC, self.layout, acc, table_BM
            d_q_WHC, acc = ragged_paged_attention_backward(*arrays, **settings, implementation=self.spec.attention)
            d_k_WKC, d_v_WKC = read_rows(acc, self.acc_page_W, self.acc_offset_W)
            rest = ((0, d_out.shape[0] - W), (0, 0), (0, 0))
            pads = (jnp.pad(d.astype(d_out.dtype), rest) for d in (d_q_WHC, d_k_WKC, d_v_WKC))
            return (*pads, acc)

        return _with_vjp(run, run_forward, run_backward)(q, k, v, acc)


class AutodiffTape(Tape):
    """Policy none: the layers over all rows under autodiff, with the differentiable slots of the gradient rows."""

    def __init__(self, gradient: GradientRows):
        super().__init__(gradient.linears, gradient.W, "none")
        self.gradient = gradient
        self.pulls: list[Callable] = []  # vector-Jacobian products of the layers
        self.engine: tuple[Callable, Callable] | None = None  # the step's attend, and rope by kind of layer

    def wrap(self, layer_step: Callable) -> Callable:
        def noted(p, x_TD, kv):
            y_TD, kv = self._run(p, x_TD, kv, len(self.pulls))
            self.last_WD = y_TD[: self.rows]
            return y_TD, kv

        return noted

    def _run(self, p, x_TD, kv, index: int):
        assert self.engine is not None, "the step has not said how it attends"
        (attend, rope), gradient = self.engine, self.gradient
        config = gradient.spec.config
        layer_config = config.layers[index]

        def run(x_TD, lanes, acc):
            left = dict[str, Lanes]()

            def attend_rows(q, k, v, kv, layer):
                out, lse, kv = attend(*lax.stop_gradient((q, k, v)), kv, layer)  # attention has the gradient
                return gradient.attention(q, k, v, acc, kv, layer, (out, lse)), kv

            def linear_rows(site, p, x):
                linear = self.linears.of_all_rows(site, p["index"])
                y_TO, left[site] = gradient.linear(linear, p, x, lanes[site])
                return y_TO

            y_TD, new_kv = decoder.layer(
                p, x_TD, config=config, layer=layer_config, rope=rope(layer_config),
                linear=linear_rows, attend=attend_rows, kv=kv,
            )  # fmt: skip
            return (y_TD, left), new_kv

        lanes, acc = gradient.lanes_of(index), gradient.train.acc[index]
        (y_TD, _), pull, kv = jax.vjp(run, x_TD, lanes, acc, has_aux=True)
        self.pulls.append(pull)
        return y_TD, kv


def frozen_head(params: Any, config: ModelConfig, shard: VocabShard) -> Callable:
    """The head as ``loss_and_gradient`` takes it: this shard's logits, and their pull-back to the hidden states."""
    table_VD = params[decoder.head_name(config)]

    def head(hidden_QD):
        logits_QV = decoder.logits(params, hidden_QD, config)

        def pull(d_QV):
            if config.logits_softcap is not None:
                d_QV = d_QV * (1 - (logits_QV / config.logits_softcap) ** 2)
            return contract(d_QV.astype(table_VD.dtype), table_VD, wide_dtype(table_VD.dtype))

        return shard.known(logits_QV, config.vocab_size), pull

    return head


def _with_vjp(function: Callable, forward: Callable, backward: Callable) -> Callable:
    """``function`` with its own vector-Jacobian product."""
    ruled: Any = jax.custom_vjp(function)
    ruled.defvjp(forward, backward)
    return ruled


def _with_lanes(train: TrainState, lanes: dict[str, Lanes], index: int) -> TrainState:
    """``train`` with the sums as the backward of one layer leaves them, in place."""

    def put(whole: jax.Array, new: jax.Array) -> jax.Array:
        return whole.at[0, index * new.shape[0] : (index + 1) * new.shape[0]].set(new)

    factors = {site: jax.tree.map(lambda whole: whole[None], lane.factors) for site, lane in lanes.items()}
    scales = train.scale_lanes
    if scales is not None:
        scales = {site: jax.tree.map(put, scales[site], lane.scales) for site, lane in lanes.items()}
    return replace(train, lanes=factors, scale_lanes=scales)
