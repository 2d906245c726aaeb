"""The definition of the filters, by sorting, one row at a time, in float64.

Shapes: V vocabulary.
"""

import numpy as np


def kept_tokens(logits_V: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The set of tokens that may be drawn, as a mask; ties at a border are kept whole."""
    logits_V = np.asarray(logits_V, np.float64)
    kept_V = np.isfinite(logits_V)
    if 0 < top_k < kept_V.sum():
        kept_V &= logits_V >= np.sort(logits_V[kept_V])[-top_k]
    weight_V = np.where(kept_V, np.exp(logits_V - logits_V[kept_V].max()), 0)
    if top_p < 1:
        order = np.sort(weight_V)[::-1]
        count = int(np.searchsorted(np.cumsum(order), top_p * order.sum())) + 1
        kept_V &= weight_V >= order[min(count, len(order)) - 1]
    return kept_V & (weight_V >= min_p)


def penalised(
    logits_V: np.ndarray, prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> np.ndarray:
    """Repetition (Keskar et al. 2019, prompt and output), presence and frequency (OpenAI API, output only)."""
    logits_V = np.array(logits_V, np.float64)
    for token in set(prompt) | set(output):
        logits_V[token] = logits_V[token] / repetition if logits_V[token] > 0 else logits_V[token] * repetition
    for token in set(output):
        logits_V[token] -= presence + frequency * output.count(token)
    return logits_V
