"""An adapter version whose weights are on the device: what a training step publishes."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jaxserve.adapters.weights import AdapterWeights, Key, LoraPair


@dataclass(frozen=True, eq=False)
class LiveWeights:
    """Looks like AdapterWeights; the factors come to the host only when somebody asks for them.

    Its digest names the job and the step that made it: nothing else ever has that content.
    """

    like: AdapterWeights  # same modules, ranks and scaling
    masters: Any  # float32 factors on the device, never donated
    fetch: Callable[[Any, AdapterWeights], dict[Key, LoraPair]] = field(repr=False)
    job: str = ""
    step: int = 0

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(f"live 1 {self.job} {self.step}".encode() + self.like.digest).digest()

    @property
    def method(self) -> str:
        return self.like.method

    @property
    def config(self) -> Mapping[str, Any]:
        return self.like.config

    @property
    def scaling(self) -> Mapping[Key, float]:
        return self.like.scaling

    @property
    def rank(self) -> int:
        return self.like.rank

    @property
    def nbytes(self) -> int:
        return self.like.nbytes

    @property
    def pairs(self) -> Mapping[Key, LoraPair]:
        return self.fetched.pairs

    @cached_property
    def fetched(self) -> AdapterWeights:
        """The weights on the host, for files."""
        return replace(self.like, pairs=self.fetch(self.masters, self.like))
