"""Named shapes of the op, shared by tests and benchmarks.

Shapes: R rows, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.token_sampling.rows import SampleRows


@dataclass(frozen=True, kw_only=True)
class SamplingCase:
    """One call: the same parameters for every row, another seed for each."""

    name: str
    num_rows: int = 32
    vocab_size: int = 300
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    ties: bool = False  # logits rounded to whole numbers
    masked: float = 0.0  # share of tokens at -inf
    spread: float = 3.0  # standard deviation of the logits

    def __str__(self) -> str:
        return self.name

    @property
    def filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def make(self, seed: int = 0) -> tuple[jax.Array, SampleRows]:
        """Random (logits [R, V] float32, rows)."""
        rng = np.random.default_rng(seed)
        logits_RV = rng.standard_normal((self.num_rows, self.vocab_size)) * self.spread
        logits_RV = np.round(logits_RV) if self.ties else logits_RV
        logits_RV[rng.random(logits_RV.shape) < self.masked] = -np.inf
        logits_RV[:, rng.integers(self.vocab_size)] = 0.0  # at least one that can be drawn
        return jnp.asarray(logits_RV, jnp.float32), self.rows(rng)

    def rows(self, rng: np.random.Generator) -> SampleRows:
        R = self.num_rows
        floats = (self.temperature, self.top_p, self.min_p, 1.0, 0.0, 0.0)
        temperature, top_p, min_p, repetition, presence, frequency = (jnp.full(R, x, jnp.float32) for x in floats)
        return SampleRows(
            temperature_R=temperature,
            top_k_R=jnp.full(R, self.top_k, jnp.int32),
            top_p_R=top_p,
            min_p_R=min_p,
            repetition_R=repetition,
            presence_R=presence,
            frequency_R=frequency,
            seed_R2=jnp.asarray(rng.integers(0, 2**32, (R, 2)), jnp.uint32),
            choice_R=jnp.zeros(R, jnp.int32),
            position_R=jnp.arange(R, dtype=jnp.int32),
        )


CASES = (
    SamplingCase(name="plain"),
    SamplingCase(name="top-k", top_k=7),
    SamplingCase(name="top-k-1", top_k=1),
    SamplingCase(name="top-k-ties", top_k=20, ties=True),
    SamplingCase(name="top-k-all", top_k=300),
    SamplingCase(name="top-k-beyond", top_k=2**31 - 1, top_p=0.9),
    SamplingCase(name="top-p", top_p=0.8),
    SamplingCase(name="top-p-tiny", top_p=1e-6),
    SamplingCase(name="top-p-ties", top_p=0.6, ties=True),
    SamplingCase(name="min-p", min_p=0.02),
    SamplingCase(name="min-p-1", min_p=1.0, ties=True),
    SamplingCase(name="all", top_k=40, top_p=0.9, min_p=0.01),
    SamplingCase(name="all-ties-masked", top_k=40, top_p=0.9, min_p=0.01, ties=True, masked=0.8),
    SamplingCase(name="one-left", top_k=5, top_p=0.5, masked=1.0),
    SamplingCase(name="odd-vocabulary", vocab_size=7, top_k=3),
    SamplingCase(name="cold", temperature=1e-5, top_p=0.9),
    SamplingCase(name="hot", temperature=2.0, top_k=50),
    SamplingCase(name="far-apart", spread=1e4, top_p=0.9, min_p=0.1),
    SamplingCase(name="flat", spread=0.0, top_k=3, top_p=0.1),
)

BENCH_CASES = (
    SamplingCase(name="64x128k-greedy", num_rows=64, vocab_size=128_256, temperature=0.0),
    SamplingCase(name="64x128k-plain", num_rows=64, vocab_size=128_256),
    SamplingCase(name="64x128k-filters", num_rows=64, vocab_size=128_256, top_k=50, top_p=0.9, min_p=0.01),
)
