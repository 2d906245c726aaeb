"""Brings adapters into the device's bank: cut on the thread that loads them, written by the engine's loop."""

from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.adapters.bank import Bank, BankShape, write_page
from jaxserve.adapters.scales import MAGNITUDE, Scales, ScalesShape, magnitudes, write_scales
from jaxserve.adapters.weights import AdapterWeights
from jaxserve.engine.lanes import SITE_OF, leaf_axes, set_gains
from jaxserve.models.config import ModelConfig, member_dims
from sharding import named_sharding


class BankWriter:
    """Host side of the bank, and owner of the scales, which exist once an adapter has asked for them."""

    def __init__(self, shape: BankShape, mesh: Mesh, adapter_pages: int):
        self.shape, self.mesh, self.adapter_pages = shape, mesh, adapter_pages
        self.scales: Scales | None = None
        self._cut: WeakKeyDictionary[AdapterWeights, list[dict]] = WeakKeyDictionary()  # goes with the weights

    @property
    def config(self) -> ModelConfig:
        return self.shape.config

    def enable_scales(self) -> None:
        """Makes room for scales; those of the adapters in the bank must be written again."""
        self.scales = ScalesShape(self.shape).empty(self.mesh)

    def prepare(self, weights: AdapterWeights) -> None:
        """Cuts an adapter into bank pages on the caller's thread, so that the loop only uploads."""
        if weights not in self._cut:
            self._cut[weights] = self._pages(weights)

    def _pages(self, weights: AdapterWeights) -> list[dict]:
        return self.shape.paged(weights.factors(), weights.rank)

    def write(self, bank: Bank, weights: AdapterWeights, pages: list[int], params: Any) -> Bank:
        """Writes an adapter into its pages; ``params`` is the base model, for DoRA."""
        for page, content in zip(pages, self._cut.get(weights) or self._pages(weights), strict=True):
            bank = write_page(bank, np.int32(page), content, self.shape.num_pages)
        if self.scales is not None:
            self._write_scales(bank, weights, pages, params)
        return bank

    def _write_scales(self, bank: Bank, weights: AdapterWeights | None, pages: list[int], params: Any) -> None:
        assert self.scales is not None
        content = ScalesShape(self.shape).page(weights)
        self.scales = write_scales(self.scales, np.int32(pages[0]), content, self.shape.num_pages)
        if weights is None or magnitudes(weights):
            self._set_gains(bank, weights, pages, params)

    def compile_scales(self, scales: Scales, bank: Bank, params: Any) -> None:
        """Compiles what writes scales, for arrays of which the shapes are given."""
        content = ScalesShape(self.shape).page(None)
        write_scales.lower(scales, np.int32(0), content, self.shape.num_pages).compile()
        gains = self._gains(None, [0])
        set_gains.lower(scales, bank, params, *gains, mesh=self.mesh, shape=self.shape).compile()

    def _set_gains(self, bank: Bank, weights: AdapterWeights | None, pages: list[int], params: Any) -> None:
        gains = self._gains(weights, pages)
        self.scales = set_gains(self.scales, bank, params, *gains, mesh=self.mesh, shape=self.shape)

    def _gains(self, weights: AdapterWeights | None, pages: list[int]) -> tuple[Any, np.ndarray, Any]:
        """Magnitudes, pages and factors. Every member takes part, so that one program serves every DoRA adapter: factor
        0 leaves a layer alone."""
        dims, L = member_dims(self.config), self.config.num_layers
        values = {member: np.ones((L, dims[member][1]), np.float32) for member in SITE_OF}
        factors = {member: {MAGNITUDE: np.zeros(L, np.float32)} for member in SITE_OF}
        for (layer, member), value in magnitudes(weights).items() if weights is not None else ():
            values[member][layer], factors[member][MAGNITUDE][layer] = value, 1
        placed = {
            member: jax.device_put(
                values[member][:, self.shape.rows(member)], named_sharding(self.mesh, leaf_axes(member, MAGNITUDE))
            )
            for member in SITE_OF
        }
        padded = np.zeros(self.adapter_pages, np.int32)  # page 0 holds zeros
        padded[: len(pages)] = pages
        return placed, padded, factors

    def warm_up(self, bank: Bank, params: Any) -> Bank:
        """Runs every program on page 0, which it leaves as it is."""
        bank = write_page(bank, np.int32(0), self.shape.paged({}, 1)[0], self.shape.num_pages)
        if self.scales is not None:
            self._write_scales(bank, None, [0], params)
        return bank
