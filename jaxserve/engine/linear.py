"""One linear layer of the step: the base matrix, each row's adapter, the sum over shards, the bias.

    z = W (input * x) + B A dropout(x)      summed over shards where the base is row-parallel
    y = output * z + bias

``input``, ``output`` are the row's scales (``adapters.scales``), ones for most methods and not even looked at by a
program without them. ``dropout`` is the identity but for rows that are trained with it.

Shapes: T rows, I in, O out (this shard's), M members of the site.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxserve.adapters.bank import SITE_NAMES, Bank, SiteBank
from jaxserve.adapters.scales import Scales, SiteScales
from jaxserve.engine import batch as flags
from jaxserve.engine.batch import Rows, TokenBatch
from jaxserve.engine.dropout import drop, keep_mask
from jaxserve.models import decoder
from jaxserve.models.layers import accumulator
from jaxserve.models.params import BIASES
from pallas_kernels.gating import gated
from pallas_kernels.lora_gated import lora_gated, lora_gated_linear
from pallas_kernels.lora_matmul import LoraPlan, lora_linear, lora_matmul, lora_matmul_backward
from pallas_kernels.numerics import contract, matmul, stored, wide_dtype
from sharding import AXIS


@dataclass(frozen=True)
class RowScales:
    """The scales of each row at one linear layer."""

    input_TMI: Float[Array, "T M I"]
    output_TO: Float[Array, "T O"]
    bias_T: Float[Array, "T"]
    fused_inputs: Int[Array, ""]  # 0: no row scales an input that several members share

    @property
    def has_inputs_T(self) -> Bool[Array, "T"]:
        return jnp.any(self.input_TMI != 1, axis=(1, 2))


def row_scales(site: SiteScales, page_T: Int[Array, "T"], fused_inputs: Int[Array, ""]) -> RowScales:
    """Gathers the rows' scales; ``page_T`` counts over all layers."""
    output_TO = jnp.concatenate([pool.at[page_T].get(mode="clip") for pool in site.outputs], axis=1)
    return RowScales(
        site.input_PMD.at[page_T].get(mode="clip"), output_TO, site.bias_P.at[page_T].get(mode="clip"), fused_inputs
    )


@dataclass(frozen=True)
class Linear:
    """What a linear layer of one site needs beside its weights and its input."""

    site: str
    bank: SiteBank | None
    plan: LoraPlan | None
    scales: RowScales | None
    parallel: bool  # there is more than one shard
    implementation: str | None = None
    drop: Callable[[jax.Array], jax.Array] | None = None  # of the adapters' input
    lane_page_J: Int[Array, "J"] | None = None  # of gradient rows: the lane page of each adapter work item
    first_lane_page: Int[Array, ""] | int = 0  # the layer's, in the lanes of all layers
    num_lane_pages: int | None = None  # the layer's
    lane_N: Int[Array, "N"] | None = None  # the lane whose scales each row block trains

    def before_scaling(self, p: dict, x_TI: Float[Array, "T I"]) -> Float[Array, "T O"]:
        """z: the base and the adapter, summed over shards."""
        w_OI, bank = p[self.site], self.bank
        if bank is None or self.plan is None:
            z_TO = self.base(w_OI, x_TI)
        else:
            x_TI, adapters = stored(x_TI), (bank.a_PRD, bank.members, self.plan)
            if self.scales is None and self.drop is None:
                z_TO = lora_linear(x_TI, w_OI, *adapters, implementation=self.implementation)
            else:
                base_TO = self.base(w_OI, x_TI)
                z_TO = lora_matmul(self.dropped(x_TI), *adapters, add_to=base_TO, implementation=self.implementation)
        if self.site in decoder.ROW and self.parallel:
            z_TO = lax.psum(z_TO, AXIS)
        return z_TO

    def dropped(self, x_TI: Float[Array, "T I"]) -> Float[Array, "T I"]:
        """What the adapters see of x."""
        return x_TI if self.drop is None else self.drop(x_TI)

    def has_only_factors(self, p: dict) -> bool:
        """All that rows have of their own is added to the base's product."""
        return self.bank is not None and self.plan is not None and self.scales is None and BIASES[self.site] not in p

    def gated(
        self, p: dict, x_TI: Float[Array, "T I"], activation: str, pool: jax.Array | None = None, block_N=None
    ) -> tuple[Float[Array, "T F"], Float[Array, "S Q O"] | None]:
        """act(gate) * up, and the pool with y's row blocks at their places; of gate_up_proj that
        ``has_only_factors``. See ``lora_gated``."""
        assert self.bank is not None
        assert self.plan is not None
        x_TI, adapters = stored(x_TI), (self.bank.a_PRD, self.bank.members, self.plan)
        settings: dict[str, Any] = {"activation": activation, "implementation": self.implementation}
        if not self.plan.chunk_rows:  # so nothing is dropped, and nothing kept
            return lora_gated_linear(x_TI, p[self.site], *adapters, **settings), None
        return lora_gated(self.base(p[self.site], x_TI), self.dropped(x_TI), *adapters, pool, block_N, **settings)

    def base(self, w_OI: Float[Array, "O I"], x_TI: Float[Array, "T I"]) -> Float[Array, "T O"]:
        """W (input * x)."""
        if self.scales is None:
            return matmul(x_TI, w_OI)
        if self.scales.input_TMI.shape[1] == 1:
            return matmul(scaled(x_TI, self.scales.input_TMI[:, 0]), w_OI)
        y_TO = matmul(x_TI, w_OI)
        return lax.cond(self.scales.fused_inputs > 0, self._base_by_member, lambda w, x, y: y, w_OI, x_TI, y_TO)

    def _base_by_member(self, w_OI, x_TI, y_TO):
        """Rows whose input scales differ by member get a product for each; others keep the bits they have."""
        assert self.scales is not None
        parts = zip(self.member_rows(), jnp.unstack(self.scales.input_TMI, axis=1), strict=True)
        by_member_TO = jnp.concatenate([matmul(scaled(x_TI, s_TI), w_OI[rows]) for rows, s_TI in parts], axis=1)
        return jnp.where(self.scales.has_inputs_T[:, None], by_member_TO, y_TO)

    def member_rows(self) -> list[slice]:
        """Where each member's outputs lie in this shard."""
        assert self.bank is not None
        ends = accumulate((b.shape[1] for b in self.bank.members), initial=0)
        return [slice(*bounds) for bounds in pairwise(ends)]

    def finish(self, p: dict, z_TO: Float[Array, "T O"]) -> Float[Array, "T O"]:
        """y, from z."""
        bias_O = p.get(BIASES[self.site])
        if self.scales is None:
            return z_TO if bias_O is None else z_TO + bias_O[None]
        y_TO = scaled(z_TO, self.scales.output_TO)
        if bias_O is None:
            return y_TO
        bias_T1 = self.scales.bias_T[:, None]
        return y_TO + scaled(bias_O[None], 1 + bias_T1 * (self.scales.output_TO - 1))

    def __call__(self, p: dict, x_TI: Float[Array, "T I"]) -> Float[Array, "T O"]:
        return self.finish(p, self.before_scaling(p, x_TI))

    def backward(
        self, p: dict, x_WI: Float[Array, "W I"], z_WO: Float[Array, "W O"], d_y_WO: Float[Array, "W O"], lanes: "Lanes"
    ) -> tuple[Float[Array, "W I"], "Lanes"]:
        """dx of gradient rows, and the lanes with these rows' adapter gradients added."""
        assert self.bank is not None, "gradient rows train an adapter"
        assert self.plan is not None, "gradient rows train an adapter"
        assert self.lane_page_J is not None, "gradient rows have lanes"
        d_z_WO, sums = d_y_WO, lanes.scales
        if self.scales is not None:
            bias_O = p.get(BIASES[self.site])
            scaled_WO = z_WO if bias_O is None else z_WO + self.scales.bias_T[:, None].astype(z_WO.dtype) * bias_O[None]
            sums = _add_outputs(sums, _wide_product(d_y_WO, scaled_WO), self.member_rows(), self.lane_N)
            d_z_WO = scaled(d_y_WO, self.scales.output_TO)
        d_base_WI, sums = self._base_backward(p[self.site], x_WI, d_z_WO, sums)
        d_base_WI = d_base_WI.astype(x_WI.dtype)
        d_x_WI, factors = lora_matmul_backward(
            self.dropped(x_WI), d_z_WO, self.bank.a_PRD, self.bank.members, self.plan,
            self.lane_page_J, (lanes.factors.a_PRD, lanes.factors.members),
            first_page=self.first_lane_page, num_pages=self.num_lane_pages,
            add_to=d_base_WI if self.drop is None else None, implementation=self.implementation,
        )  # fmt: skip
        if self.drop is not None:
            d_x_WI = d_base_WI + self.drop(d_x_WI)  # a diagonal map is its own transpose
        if self.site in decoder.COLUMN and self.parallel:
            d_x_WI = lax.psum(d_x_WI, AXIS)
        return d_x_WI, Lanes(SiteBank(*factors), sums)

    def _base_backward(self, w_OI, x_WI, d_z_WO, sums: SiteScales | None) -> tuple[jax.Array, SiteScales | None]:
        """W^T dz, through the input scales; in float32 or wider where there are any."""
        wide, scales = wide_dtype(x_WI.dtype), self.scales
        if scales is None:
            return contract(d_z_WO, w_OI, x_WI.dtype), sums  # summed in float32 all the same, and rounded once
        d_x_WI = contract(d_z_WO, w_OI, wide)
        if scales.input_TMI.shape[1] == 1:
            sums = _add_inputs(sums, (d_x_WI * x_WI.astype(wide))[:, None], self.lane_N)
            return d_x_WI * scales.input_TMI[:, 0], sums

        def by_member(w_OI, d_z_WO, d_x_WI, sums):
            inner_WMI = jnp.stack([contract(d_z_WO[:, r], w_OI[r], wide) for r in self.member_rows()], axis=1)
            sums = _add_inputs(sums, inner_WMI * x_WI[:, None].astype(wide), self.lane_N)
            d_scaled_WI = jnp.sum(inner_WMI * scales.input_TMI, axis=1)
            return jnp.where(scales.has_inputs_T[:, None], d_scaled_WI, d_x_WI), sums

        def together(w_OI, d_z_WO, d_x_WI, sums):
            return d_x_WI, sums

        return lax.cond(scales.fused_inputs > 0, by_member, together, w_OI, d_z_WO, d_x_WI, sums)


@struct.dataclass
class Lanes:
    """Gradient sums at one site. Row blocks are added one after another: the bits of a sum depend on the order of its
    blocks and not on how they were dealt to steps."""

    factors: SiteBank  # of all layers: each adds to its own pages, in place
    scales: SiteScales | None  # of one layer


def _add_outputs(
    sums: SiteScales | None, value_WO: jax.Array, member_rows: list[slice], lane_N: jax.Array | None
) -> SiteScales:
    assert sums is not None, "scales are trained in lanes"
    pairs = zip(sums.outputs, member_rows, strict=True)
    return replace(sums, outputs=tuple(_add_blocks(pool, value_WO[:, rows], lane_N) for pool, rows in pairs))


def _add_inputs(sums: SiteScales | None, value_WMI: jax.Array, lane_N: jax.Array | None) -> SiteScales:
    assert sums is not None, "scales are trained in lanes"
    return replace(sums, input_PMD=_add_blocks(sums.input_PMD, value_WMI, lane_N))


def _add_blocks(sums: jax.Array, value_W: jax.Array, lane_N: jax.Array | None) -> jax.Array:
    """Adds each row block's sum to the block's lane; other lanes keep their bits, whatever the block holds."""
    assert lane_N is not None, "scales are trained in lanes"
    N, width = lane_N.shape[0], value_W[0].size
    ones = jnp.ones((N, 2, value_W.shape[0] // N), value_W.dtype)
    block_NX = lax.dot_general(
        ones, value_W.reshape(N, -1, width), (((2,), (1,)), ((0,), (0,))), preferred_element_type=sums.dtype
    )[:, 0]
    lane_Y = jnp.arange(sums.shape[0], dtype=jnp.int32).reshape(-1, *(1,) * (sums.ndim - 1))
    for n in range(N):
        sums = jnp.where(lane_Y == lane_N[n], sums + block_NX[n].reshape(1, *sums.shape[1:]), sums)
    return sums


class Linears:
    """The linear layers of one step, over all of its rows or over its gradient rows alone."""

    def __init__(self, bank: Bank | None, scales: Scales | None, batch: TokenBatch, spec: Any):
        self.bank, self.scales, self.batch, self.spec = bank, scales, batch, spec
        # of layer 0; here, so that what is the same in all layers is computed once
        self._plans = {} if bank is None or batch.lora is None else self._plans_of_all_rows()
        self._grad_plans = {} if bank is None or batch.grad is None else self._plans_of_gradient_rows()

    def _plans_of_all_rows(self) -> dict[str, LoraPlan]:
        lora, bucket = self.batch.lora, self.spec.layout.bucket
        assert lora is not None
        return {
            site: LoraPlan(
                block_J=lora.block_SJ[at],
                page_J=lora.page_SJ[at],
                first_J=lora.first_SJ[at],
                stop_J=lora.stop_SJ[at],
                num_items=lora.items_S[at],
                chunk_rows=bucket.forward_block_rows,
                row_block=self.spec.row_block,
            ).with_shared(bucket.rows - bucket.first_row)
            for at, site in enumerate(SITE_NAMES)
        }

    def _plans_of_gradient_rows(self) -> dict[str, LoraPlan]:
        """Their row blocks are trained as a whole: padding rows have no cotangent."""
        grad, row_block, W = self.batch.grad, self.spec.row_block, self.spec.layout.bucket.grad_rows
        assert grad is not None
        return {
            site: LoraPlan(
                block_J=grad.block_SJ[at],
                page_J=grad.page_SJ[at],
                first_J=jnp.zeros_like(grad.block_SJ[at]),
                stop_J=jnp.full_like(grad.block_SJ[at], row_block),
                num_items=grad.items_S[at],
                chunk_rows=W,
                row_block=row_block,
            ).with_shared(W)
            for at, site in enumerate(SITE_NAMES)
        }

    def all_rows(self, site: str, p: dict, x_TI: Float[Array, "T I"]) -> Float[Array, "T O"]:
        return self.of_all_rows(site, p["index"])(p, x_TI)

    def gate_up(self, p: dict, x_TI: Float[Array, "T I"]) -> Float[Array, "T F"]:
        linear, activation = self.of_all_rows("gate_up_proj", p["index"]), self.spec.config.activation
        if not linear.has_only_factors(p):
            return gated(linear(p, x_TI), activation)
        act_TF, _ = linear.gated(p, x_TI, activation)
        return act_TF

    def of_all_rows(self, site: str, layer) -> Linear:
        return self._linear(site, layer, self._plans.get(site), self.batch.rows)

    def of_gradient_rows(self, site: str, layer) -> Linear:
        grad, at = self.batch.grad, SITE_NAMES.index(site)
        assert grad is not None, "a step without gradient rows"
        linear = self._linear(site, layer, self._grad_plans.get(site), grad.rows)
        count = self.spec.train.lane_pages
        return replace(
            linear,
            lane_page_J=grad.lane_SJ[at],
            first_lane_page=layer * count,
            num_lane_pages=count,
            lane_N=grad.lane_N,
        )

    def _linear(self, site: str, layer, plan: LoraPlan | None, rows: Rows) -> Linear:
        """Args: plan: of layer 0."""
        if plan is not None:
            plan = replace(plan, page_J=plan.page_J + layer * self.spec.bank.num_pages)
        scales = None
        if self.scales is not None:
            assert rows.lead_page_T is not None
            page_T = rows.lead_page_T + layer * self.spec.bank.num_pages
            scales = row_scales(self.scales[site], page_T, self.batch.flags[flags.FUSED_INPUTS])
        return Linear(
            site=site,
            bank=None if self.bank is None else self.bank[site],
            plan=plan,
            scales=scales,
            parallel=self.spec.mesh.size > 1,
            implementation=self.spec.lora,
            drop=partial(self._drop, site, layer, rows) if self.spec.layout.dropout else None,
        )

    def _drop(self, site: str, layer, rows: Rows, x_TI: jax.Array) -> jax.Array:
        """Dropout of the rows in blocks. On a CPU nothing is computed where no row asks for any; elsewhere the host
        would wait for a branch, and a rate of 0 changes no bit."""
        assert rows.drop_key_T is not None
        assert rows.drop_rate_T is not None
        key, rate, columns = rows.drop_key_T, rows.drop_rate_T.astype(accumulator(x_TI)), x_TI.shape[1]
        first = lax.axis_index(AXIS) * columns if site in decoder.ROW else 0
        salt = layer * len(SITE_NAMES) + SITE_NAMES.index(site)

        def dropped(x_TI):
            blocks = key.shape[0]
            keep_TI = keep_mask(key, rows.position_T[:blocks], rate, salt, first, columns)
            return jnp.concatenate([drop(x_TI[:blocks], keep_TI, rate), x_TI[blocks:]])

        def where_asked(x_TI):
            return lax.cond(self.batch.flags[flags.DROPOUT] > 0, dropped, lambda x: x, x_TI)

        return lax.platform_dependent(x_TI, cpu=where_asked, default=dropped)


def _wide_product(x: jax.Array, y: jax.Array) -> jax.Array:
    return x.astype(accumulator(x)) * y.astype(accumulator(y))


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x * factor, multiplied in the wider dtype of the two and rounded to that of x."""
    return (x.astype(accumulator(x)) * factor.astype(accumulator(x))).astype(x.dtype)
