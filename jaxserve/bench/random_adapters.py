"""LoRA adapters of random numbers, for load: A as PEFT starts it, B small enough to leave the model's answers sane.

Shapes: R rank; A is [R, in], B is [out, R].
"""

from collections.abc import Sequence

import numpy as np

from jaxserve.adapters.weights import MEMBERS, AdapterWeights, LoraPair, ModelShape
from jaxserve.errors import ConfigError
from jaxserve.models.config import member_dims

B_SCALE = 0.01


def check_targets(targets: Sequence[str]) -> tuple[str, ...]:
    """These linear layers, or all where none are named.

    Raises:
      ConfigError: a name that no decoder layer has.
    """
    unknown = [name for name in targets if name not in MEMBERS]
    if unknown:
        raise ConfigError([f"bench.adapter_targets names {unknown[0]!r}; there are {', '.join(MEMBERS)}"])
    return tuple(targets) or tuple(MEMBERS)


def random_adapter(model: ModelShape, rank: int, targets: Sequence[str], seed: int) -> AdapterWeights:
    """An adapter on ``targets`` of every layer, its lora_alpha equal to its rank."""
    rng, dims = np.random.default_rng(seed), member_dims(model)
    keys = [(layer, member) for layer in range(model.num_layers) for member in targets]
    pairs = {key: _pair(rng, rank, *dims[key[1]]) for key in keys}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    scaling, root = dict.fromkeys(keys, 1.0), model.module_roots[0]
    return AdapterWeights(method="lora", config=config, scaling=scaling, pairs=pairs, root=root)


def _pair(rng: np.random.Generator, rank: int, inputs: int, outputs: int) -> LoraPair:
    a = rng.uniform(-1, 1, (rank, inputs)) / np.sqrt(inputs)
    return LoraPair(a.astype(np.float32), (B_SCALE * rng.standard_normal((outputs, rank))).astype(np.float32))
