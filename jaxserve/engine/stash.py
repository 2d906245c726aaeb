"""What the forward of finetune rows leaves for their backward, and where it waits for it.

While a step is traced, a ``Tape`` notes what the forward of its first rows leaves. Gradient rows that run forward in
their own step take it from there. With a stash, forward and backward run in different steps: the forward writes the
activations of its row blocks to blocks of the stash, layer by layer, and the backward reads them, so that no row runs
forward twice and nothing is multiplied again (FlexLLM, arXiv 2402.18789, section 5: of a frozen model's activations
only those are kept that the adapters' gradients need).

Shapes: T rows, W of them that are noted, N row blocks, or blocks of the stash, Q rows per block, D hidden, H query
heads, C head dim, O out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxserve.engine.linear import Linears
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import SITES, param_specs
from pallas_kernels.block_write import block_write
from pallas_kernels.gating import gated
from pallas_kernels.numerics import after, wide_dtype
from sharding import partition_spec, zeros

GATE_UP = "gate_up_proj"


@struct.dataclass
class Kept:
    """What a layer's forward leaves for its backward."""

    x_WD: Float[Array, "W D"]  # the layer's input
    attended: tuple[jax.Array, jax.Array] | None = None  # attention's output and log-sum-exp
    products: dict[str, jax.Array] = field(default_factory=dict)  # [W, O] of the sites, before scales


@struct.dataclass
class Stash:
    """Activations of row blocks, [N, Q, ...] each. A block belongs to one sequence at a time; all of it is written
    before it is read."""

    layers: list[Kept]
    last_NQD: Float[Array, "N Q D"]  # after the last layer, before the final norm


def stashed_sites(config: ModelConfig) -> tuple[str, ...]:
    """The linear layers whose products are kept. What down_proj gives is only added to its layer's input, unless a norm
    comes between."""
    return tuple(site for site in SITES if site != "down_proj" or config.post_norms)


@dataclass(frozen=True)
class StashShape:
    """What it takes to make a stash."""

    config: ModelConfig
    num_blocks: int
    row_block: int
    tensor_parallel: int
    dtype: str

    def empty(self, mesh: Mesh) -> Stash:
        """All zeros, on the mesh."""
        return self._of(partial(zeros, mesh))

    def specs(self) -> Any:
        """The PartitionSpec of every array."""
        return self._of(lambda shape, axes, dtype: partition_spec(axes))

    def _of(self, make: Callable[[tuple[int, ...], tuple[str | None, ...], Any], Any]) -> Any:
        """A Stash of what is made of each array's shape, logical axes and dtype."""

        def array(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any = self.dtype) -> Any:
            return make((self.num_blocks, self.row_block, *shape), (None, None, *axes), dtype)

        config, kept = self.config, cast(Any, Kept)

        def of_layer(params: Any) -> Kept:
            attended = (
                array((config.num_heads, config.head_dim), ("heads", None)),
                array((config.num_heads,), ("heads",), wide_dtype(np.dtype(self.dtype))),
            )
            products = {site: array(params[site].shape[:1], params[site].axes[:1]) for site in stashed_sites(config)}
            return kept(residual(), attended, products)

        def residual() -> Any:
            return array((config.hidden_size,), ("embed",))

        layers = param_specs(config, self.tensor_parallel)["layers"]
        return cast(Any, Stash)([of_layer(params) for params in layers], residual())


def put(stash: Any, rows: Any, block_N: Int[Array, "N"]) -> Any:
    """Arrays of the stash with the first N * Q rows written to these of its blocks; one out of range is dropped."""
    pools, tree = jax.tree.flatten(stash)
    new = tree.flatten_up_to(rows)
    for dtype in {pool.dtype: None for pool in pools}:
        mine = [i for i, pool in enumerate(pools) if pool.dtype == dtype]
        flat = [pools[i].reshape(*pools[i].shape[:2], -1) for i in mine]
        written = block_write(flat, [new[i].reshape(new[i].shape[0], -1) for i in mine], block_N)
        for i, pool in zip(mine, written, strict=True):
            pools[i] = pool.reshape(pools[i].shape)
    return jax.tree.unflatten(tree, pools)


def take(stash: Any, block_N: Int[Array, "N"]) -> Any:
    """The rows in these blocks, N * Q of them in all; a block out of range reads zeros."""

    def read(pool):
        rows = pool.at[block_N].get(mode="fill", fill_value=0)
        return rows.reshape(-1, *pool.shape[2:])

    return jax.tree.map(read, stash)


class Tape:
    """Notes what the layers' forward leaves of their first rows; filled while a step is traced, inside ``shard_map``.

    Args:
      rows: how many of the first rows are noted; None: all.
      remat: see ``engine.gradient``.
    """

    def __init__(self, linears: Linears, rows: int | None, remat: str):
        self.linears, self.rows, self.remat = linears, rows, remat
        self.kept: list[Kept] = []
        self.last_WD: Float[Array, "W D"] | None = None  # after the last layer, before the final norm
        self._open: Kept | None = None  # of the layer that is being traced
        self._place: jax.Array | None = None

    def wrap(self, layer_step: Callable) -> Callable:
        """Wraps the forward of a kind of layer, ``(p, x_TD, kv) -> (x_TD, kv)``; it is traced once."""

        @jax.jit
        def run(p, x_TD, kv, place):
            self._open, self._place = Kept(x_TD[: self.rows]), place
            y_TD, kv = layer_step(p, x_TD, kv)
            kept, self._open = self._open, None
            return y_TD, kv, kept

        def noted(p, x_TD, kv):
            y_TD, kv, kept = run(self.begin(p), x_TD, kv, self.place())
            self.keep(kept)
            self.last_WD = y_TD[: self.rows]
            return y_TD, kv

        return noted

    def begin(self, p: dict) -> dict:
        """The parameters that the next layer is to run with."""
        return p

    def place(self) -> jax.Array | None:
        """Where the next layer is to write what ``gate_up_proj`` gives, if it does."""
        return None

    def keep(self, kept: Kept) -> None:
        """Takes what a layer leaves."""
        self.kept.append(kept)

    def attended(self, out_THC: jax.Array, lse_TH: jax.Array) -> None:
        """Notes what attention gave."""
        if self._open is not None and self.remat in ("elementwise", "attention"):
            self._open = replace(self._open, attended=(out_THC[: self.rows], lse_TH[: self.rows]))

    def linear(self, site: str, p: dict, x_TI: jax.Array) -> jax.Array:
        """The linear slot of the forward; notes what it gave."""
        linear = self.linears.of_all_rows(site, p["index"])
        if self._open is None or self.remat != "elementwise":
            return linear(p, x_TI)
        z_TO = linear.before_scaling(p, x_TI)
        self._open = replace(self._open, products=self._open.products | {site: z_TO[: self.rows]})
        return linear.finish(p, z_TO)

    def gate_up(self, p: dict, x_TD: jax.Array) -> jax.Array:
        """The slot of gate_up_proj and the gate."""
        return gated(self.linear(GATE_UP, p, x_TD), self.linears.spec.config.activation)


class StashTape(Tape):
    """Notes it in the stash.

    Args:
      block_N: of the rows, which are N * Q; see ``put``.
    """

    def __init__(self, linears: Linears, stash: Stash, block_N: Int[Array, "N"]):
        super().__init__(linears, None, "elementwise")  # a slice would be a copy of what is written
        self.stash, self._block_N, self._layers = stash, block_N, list[Kept]()
        self._written = set[str]()  # sites whose kept products are the stash's already, with these rows in them

    def begin(self, p: dict) -> dict:
        # nothing else waits for the writes, and what they write would be kept until the end
        return {**p, "index": after(p["index"], jax.tree.leaves(self._layers[-1:]))}

    def place(self) -> jax.Array:
        return self.stash.layers[len(self._layers)].products[GATE_UP]

    def gate_up(self, p: dict, x_TD: jax.Array) -> jax.Array:
        linear = self.linears.of_all_rows(GATE_UP, p["index"])
        if not linear.has_only_factors(p):
            return super().gate_up(p, x_TD)
        assert self._open is not None, "a layer is being traced"
        assert self._place is not None, "the stash has a place for it"
        activation = self.linears.spec.config.activation
        act_TF, pool_NQO = linear.gated(p, x_TD, activation, self._place, self._block_N)
        self._open, self._written = replace(self._open, products=self._open.products | {GATE_UP: pool_NQO}), {GATE_UP}
        return act_TF

    def keep(self, kept: Kept) -> None:
        place = self.stash.layers[len(self._layers)]
        sites = [site for site in place.products if site not in self._written]
        place, new = (replace(of, products={site: of.products[site] for site in sites}) for of in (place, kept))
        written = {site: kept.products[site] for site in self._written}
        rest = put(place, new, self._block_N)
        self._layers.append(replace(rest, products=rest.products | written))

    def written(self) -> Stash:
        """The stash after the last layer."""
        return Stash(self._layers, put(self.stash.last_NQD, self.last_WD, self._block_N))
