"""The vectors of (IA)3 and DoRA on the device: factors of a linear layer's input and of its output.

    y = output * (W (input * x) + B A x) + bias * (output or 1)

(IA)3 trains input or output and scales the bias along (arXiv 2205.05638, and PEFT). DoRA's output is
magnitude / |W + B A|, row by row, and leaves the bias alone (arXiv 2402.09353). Each bank page has a row of every
array; an adapter uses that of its first page, and the rows of page 0, the bare base model, are ones.

Placement follows the base matrix: input factors lie as its columns do, output factors as its rows do.

Shapes: L layers, P pages, M members of a site, D in, E out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxserve.adapters import dora, ia3
from jaxserve.adapters.bank import BankShape, with_page
from jaxserve.adapters.weights import AdapterWeights, Key, Weights
from jaxserve.models.config import member_dims
from jaxserve.models.params import SITES
from pallas_kernels.numerics import wide_dtype
from sharding import ArraySpec, full, lora_specs

SCALED_METHODS = frozenset({dora.NAME, ia3.NAME})
INPUT, OUTPUT, MAGNITUDE = "input_scale", "output_scale", "magnitude"


@struct.dataclass
class SiteScales:
    """The factors of one site, in float32 or wider; layers lie one after another in the page axis."""

    input_PMD: Float[Array, "LP M D"]
    outputs: tuple[Float[Array, "LP E"], ...]  # of each member
    bias_P: Float[Array, "LP"]  # 1: the bias is scaled like the output


Scales = dict[str, SiteScales]


@dataclass(frozen=True)
class ScalesShape:
    """Shapes of the scales that belong to a bank."""

    bank: BankShape

    @property
    def dtype(self) -> np.dtype:
        return wide_dtype(jnp.dtype(self.bank.dtype))

    def specs(self) -> dict[str, Any]:
        """ArraySpec of every array."""
        rows, dims = self.bank.config.num_layers * self.bank.num_pages, member_dims(self.bank.config)
        made, site_scales = {}, cast(Any, SiteScales)
        for site, members in SITES.items():
            a_axes, b_axes = lora_specs(site)
            inputs = ArraySpec((rows, len(members), dims[members[0]][0]), (None, None, a_axes[2]))
            outputs = tuple(ArraySpec((rows, len(self.bank.rows(m))), (None, b_axes[1])) for m in members)
            made[site] = site_scales(inputs, outputs, ArraySpec((rows,), (None,)))
        return made

    def empty(self, mesh: Mesh) -> Scales:
        """Scales that change nothing, on the mesh."""

        def make(spec: ArraySpec) -> jax.Array:
            return full(mesh, spec.shape, spec.axes, self.dtype, 0 if len(spec.shape) == 1 else 1)

        return jax.tree.map(make, self.specs(), is_leaf=_is_spec)

    def page(self, weights: AdapterWeights | None) -> dict[str, Any]:
        """One page's content: {site: (input [L, M, D], (output [L, E], ...), bias [L])}; None: ones.

        DoRA's output holds the magnitudes; ``engine.lanes.set_gains`` divides them by the rows' lengths on the device.
        """
        L, dims = self.bank.config.num_layers, member_dims(self.bank.config)
        vectors = weights.vectors if weights is not None else {}
        content = {}
        for site, members in SITES.items():
            input_LMD = np.ones((L, len(members), dims[members[0]][0]), self.dtype)
            outputs = []
            for index, member in enumerate(members):
                output_LE = np.ones((L, dims[member][1]), self.dtype)
                for layer in range(L):
                    vector = vectors.get((layer, member))
                    if vector is not None and vector.kind == INPUT:
                        input_LMD[layer, index] = vector.value
                    elif vector is not None:
                        output_LE[layer] = vector.value
                outputs.append(output_LE[:, self.bank.rows(member)])
            scaled_bias = weights is not None and not weights.pairs
            content[site] = (input_LMD, tuple(outputs), np.full(L, float(scaled_bias), self.dtype))
        return content


@partial(jax.jit, donate_argnames="scales", static_argnames="num_pages")
def write_scales(scales: Scales, page: jax.Array, content: dict, num_pages: int) -> Scales:
    """Writes one page of every layer, in place."""
    write = partial(with_page, page=page, num_pages=num_pages)
    return {
        site: SiteScales(*jax.tree.map(write, (old.input_PMD, old.outputs, old.bias_P), content[site]))
        for site, old in scales.items()
    }


def is_scaled(weights: Weights) -> bool:
    """Whether the adapter has scales at all."""
    return weights.method in SCALED_METHODS


def fused_inputs(weights: Weights) -> bool:
    """Whether an input is scaled at a site whose members share it: each member then needs its own product."""
    if weights.method != ia3.NAME:
        return False
    fused = {member for members in SITES.values() if len(members) > 1 for member in members}
    return any(vector.kind == INPUT and member in fused for (_, member), vector in weights.like.vectors.items())


def magnitudes(weights: AdapterWeights) -> Mapping[Key, np.ndarray]:
    """DoRA's magnitudes, by module."""
    return {key: vector.value for key, vector in weights.vectors.items() if vector.kind == MAGNITUDE}


def _is_spec(x: Any) -> bool:
    return isinstance(x, ArraySpec)
