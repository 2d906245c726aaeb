"""Drawing tokens on the device, every parameter an array."""

from pallas_kernels.token_sampling.rows import GREEDY_BELOW, SampleRows
from pallas_kernels.token_sampling.xla import (
    COUNT_MASK,
    PROMPT_BIT,
    VocabShard,
    filter_mask,
    log_normaliser,
    penalise,
    pick,
    sample,
    top_tokens,
)

__all__ = [
    "COUNT_MASK",
    "GREEDY_BELOW",
    "PROMPT_BIT",
    "SampleRows",
    "VocabShard",
    "filter_mask",
    "log_normaliser",
    "penalise",
    "pick",
    "sample",
    "top_tokens",
]
