"""An adapter version whose weights are on the device: what a training step publishes."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.adapters.weights import AdapterWeights, Key, LoraPair, ScaleVector, Weights

Fetch = Callable[[Any, AdapterWeights], AdapterWeights]


class LiveWeights(Weights):
    """Looks like AdapterWeights; the parameters come to the host only when somebody asks for them.

    Its digest is of the name it is given: nothing else ever has that content.

    Args:
      like: an adapter with the same modules, ranks and scaling.
      masters: float32 parameters on the device, never donated.
      fetch: (masters, like) to weights on the host.
      name: given to nothing else.
    """

    def __init__(self, like: AdapterWeights, masters: Any, fetch: Fetch, name: str):
        self._like, self.masters, self._fetch = like, masters, fetch
        self._fetched: AdapterWeights | None = None
        self.source: Any = None  # for whoever publishes it
        self.digest = hashlib.sha256(f"live 1 {name}\n".encode() + like.digest).digest()

    def rebind(self, masters: Any) -> None:
        """Takes other parameters, after those it had were lost with the device's state before anybody saw them."""
        self.masters = masters
        self._fetched = None

    @property
    def method(self) -> str:
        return self._like.method

    @property
    def config(self) -> Mapping[str, Any]:
        return self._like.config

    @property
    def scaling(self) -> Mapping[Key, float]:
        return self._like.scaling

    @property
    def rank(self) -> int:
        return self._like.rank

    @property
    def nbytes(self) -> int:
        return self._like.nbytes

    @property
    def pairs(self) -> Mapping[Key, LoraPair]:
        return self.fetched.pairs

    @property
    def vectors(self) -> Mapping[Key, ScaleVector]:
        return self.fetched.vectors

    @property
    def like(self) -> AdapterWeights:
        return self._like

    @property
    def fetched(self) -> AdapterWeights:
        if self._fetched is None:
            self._fetched = self._fetch(self.masters, self._like)
        return self._fetched
