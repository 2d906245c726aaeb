"""The learning rate of every optimizer step; the same numbers as transformers' get_*_schedule_with_warmup."""

import math
from types import ModuleType
from typing import Any

import numpy as np

from jaxserve.finetune.config import FinetuneConfig


def learning_rate(config: FinetuneConfig, total_steps: int, step: Any, xp: ModuleType = np) -> Any:
    """The rate of the update after ``step`` updates.

    Args:
      step: 0 at the first update; an int, or an array of ``xp``, which is numpy or jax.numpy.
    """
    warmup = config.num_warmup_steps(total_steps)
    rising = step / max(1, warmup)
    done = (step - warmup) / max(1, total_steps - warmup)
    factor = xp.where(step < warmup, rising, _DECAYS[config.schedule](done, xp))
    return config.learning_rate * factor


_DECAYS = {
    "constant": lambda done, xp: xp.ones_like(done),
    "linear": lambda done, xp: xp.maximum(0.0, 1.0 - done),
    "cosine": lambda done, xp: xp.maximum(0.0, 0.5 * (1.0 + xp.cos(math.pi * xp.minimum(done, 1.0)))),
}
