"""Filters by bisection on the float's bits, draws by the Gumbel-max trick; nothing is sorted or gathered.

Every function works on one shard of the vocabulary; ``shard`` sums over shards (a shard of one costs nothing).

Shapes: R rows, V vocabulary of this shard, N top tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.numerics import row_sum
from pallas_kernels.token_sampling.rows import SampleRows, row_keys

PROMPT_BIT = 1 << 14  # in a count: the token occurs in the prompt; the bits below count the output
COUNT_MASK = PROMPT_BIT - 1


@dataclass(frozen=True)
class VocabShard:
    """Which part of the vocabulary this device holds: ``size`` shards along the mesh axis ``axis``."""

    axis: str | None = None
    size: int = 1

    def offset(self, width: int) -> Int[Array, ""]:
        return lax.axis_index(self.axis) * width if self.size > 1 else jnp.int32(0)

    def tokens(self, width: int) -> Int[Array, "V"]:
        """The token ids of this shard's columns."""
        return self.offset(width) + jnp.arange(width, dtype=jnp.int32)

    def known(self, logits_RV: Float[Array, "R V"], vocab_size: int) -> Float[Array, "R V"]:
        """The logits, those of the vocabulary's padding at -inf."""
        return jnp.where((self.tokens(logits_RV.shape[1]) < vocab_size)[None], logits_RV, -jnp.inf)

    def sum(self, x: jax.Array) -> jax.Array:
        return lax.psum(x, self.axis) if self.size > 1 else x

    def max(self, x: jax.Array) -> jax.Array:
        return lax.pmax(x, self.axis) if self.size > 1 else x

    def min(self, x: jax.Array) -> jax.Array:
        return lax.pmin(x, self.axis) if self.size > 1 else x

    def gather(self, x_RN: jax.Array) -> jax.Array:
        """Concatenates small per-shard candidates along the last axis."""
        return lax.all_gather(x_RN, self.axis, axis=-1, tiled=True) if self.size > 1 else x_RN


def argmax(x_RV: Float[Array, "R V"], shard: VocabShard) -> Int[Array, "R"]:
    """The lowest token id with the greatest value, over all shards."""
    V = x_RV.shape[1]
    best_R = jnp.argmax(x_RV, axis=1).astype(jnp.int32)
    if shard.size == 1:
        return best_R
    value_R = jnp.max(x_RV, axis=1)
    token_R = jnp.where(value_R == shard.max(value_R), best_R + shard.offset(V), jnp.iinfo(jnp.int32).max)
    return shard.min(token_R)


def log_normaliser(logits_RV: Float[Array, "R V"], shard: VocabShard) -> Float[Array, "R"]:
    """log(sum(exp(logits))) over the whole vocabulary."""
    top_R = shard.max(jnp.max(logits_RV, axis=1))
    top_R = jnp.where(jnp.isfinite(top_R), top_R, 0)
    return top_R + jnp.log(shard.sum(row_sum(jnp.exp(logits_RV - top_R[:, None]))))


def pick(x_RV: Float[Array, "R V"], token_R: Int[Array, "R"], shard: VocabShard) -> Float[Array, "R"]:
    """x[r, token[r]]; token ids are global."""
    V = x_RV.shape[1]
    local_R = token_R - shard.offset(V)
    mine_R = (local_R >= 0) & (local_R < V)
    value_R = jnp.take_along_axis(x_RV, jnp.clip(local_R, 0, V - 1)[:, None], axis=1)[:, 0]
    return shard.sum(jnp.where(mine_R, value_R, 0))


def top_tokens(
    x_RV: Float[Array, "R V"], count: int, shard: VocabShard
) -> tuple[Float[Array, "R N"], Int[Array, "R N"]]:
    """The ``count`` greatest values of each row and their token ids, greatest first."""
    V = x_RV.shape[1]
    value_RN, token_RN = lax.top_k(x_RV, min(count, V))
    if shard.size == 1:
        return value_RN, token_RN.astype(jnp.int32)
    value_RN, token_RN = shard.gather(value_RN), shard.gather(token_RN.astype(jnp.int32) + shard.offset(V))
    value_RN, index_RN = lax.top_k(value_RN, count)
    return value_RN, jnp.take_along_axis(token_RN, index_RN, axis=1)


def penalise(logits_RV: Float[Array, "R V"], count_RV: Int[Array, "R V"], rows: SampleRows) -> Float[Array, "R V"]:
    """Repetition (prompt and output), presence and frequency (output) penalties from per-row token counts."""
    output_RV = (count_RV & COUNT_MASK).astype(logits_RV.dtype)
    scale_RV = jnp.where(count_RV != 0, rows.repetition_R[:, None], 1).astype(logits_RV.dtype)
    logits_RV = jnp.where(logits_RV > 0, logits_RV / scale_RV, logits_RV * scale_RV)
    logits_RV = logits_RV - rows.frequency_R[:, None] * output_RV
    return logits_RV - rows.presence_R[:, None] * (output_RV > 0).astype(logits_RV.dtype)


def sample(
    logits_RV: Float[Array, "R V"],
    rows: SampleRows,
    any_random: jax.Array | bool,
    any_filter: jax.Array | bool,
    shard: VocabShard,
) -> Int[Array, "R"]:
    """Draws a token per row. ``any_random``, ``any_filter`` let a batch skip what none of its rows needs: numbers of
    the device, or what the program is for."""
    greedy_R = argmax(logits_RV, shard)

    def draw(logits_RV):
        scaled_RV = logits_RV / jnp.where(rows.temperature_R > 0, rows.temperature_R, 1)[:, None]
        scaled_RV = _if(any_filter, lambda x: _filter(x, rows, shard), lambda x: x, scaled_RV)
        return argmax(scaled_RV + _gumbel(rows, scaled_RV.shape[1], shard).astype(scaled_RV.dtype), shard)

    drawn_R = _if(any_random, draw, lambda _: greedy_R, logits_RV)
    return jnp.where(rows.temperature_R > 0, drawn_R, greedy_R)


def _if(wanted: jax.Array | bool, do: Callable, otherwise: Callable, x: jax.Array) -> jax.Array:
    if isinstance(wanted, bool):
        return do(x) if wanted else otherwise(x)
    return lax.cond(wanted, do, otherwise, x)


def _filter(scaled_RV: Float[Array, "R V"], rows: SampleRows, shard: VocabShard) -> Float[Array, "R V"]:
    kept_RV = filter_mask(scaled_RV, rows, shard)
    return jnp.where(kept_RV, scaled_RV, -jnp.inf)


def filter_mask(scaled_RV: Float[Array, "R V"], rows: SampleRows, shard: VocabShard) -> Bool[Array, "R V"]:
    """Which tokens top-k, then top-p, then min-p leave, of logits already divided by the temperature."""
    order_RV = _ordered_bits(scaled_RV)
    width = shard.sum(jnp.int32(scaled_RV.shape[1]))
    wanted_R = jnp.where(rows.top_k_R > 0, rows.top_k_R, width)
    ones_RV = jnp.ones(scaled_RV.shape, jnp.int32)
    kept_RV = order_RV >= _threshold(order_RV, ones_RV, jnp.minimum(wanted_R, width), shard)[:, None]
    kept_RV &= scaled_RV > -jnp.inf
    top_R = shard.max(jnp.max(scaled_RV, axis=1))
    weight_RV = jnp.where(kept_RV, jnp.exp(scaled_RV - top_R[:, None]), 0)
    mass_R = rows.top_p_R * shard.sum(row_sum(weight_RV))
    by_mass_RV = order_RV >= _threshold(order_RV, weight_RV, mass_R, shard)[:, None]
    kept_RV &= by_mass_RV | (rows.top_p_R >= 1)[:, None]
    # the likeliest stay whatever min_p is: where XLA fuses the division by the temperature, their weight is not quite 1
    return kept_RV & ((weight_RV >= rows.min_p_R[:, None]) | (scaled_RV >= top_R[:, None]))


def _ordered_bits(x_RV: Float[Array, "R V"]) -> UInt[Array, "R V"]:
    """Unsigned integers in the same order as the floats."""
    x_RV = jnp.where(x_RV == 0, 0, x_RV)  # -0 becomes 0; XLA drops an addition of 0
    bits_RV = lax.bitcast_convert_type(x_RV.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits_RV >> 31 == 1, ~bits_RV, bits_RV | jnp.uint32(1 << 31))


def _threshold(
    order_RV: UInt[Array, "R V"], weight_RV: jax.Array, wanted_R: jax.Array, shard: VocabShard
) -> UInt[Array, "R"]:
    """The greatest t with sum(weight where order >= t) >= wanted, built bit by bit: 32 passes, no sort."""

    def try_bit(step, floor_R):
        candidate_R = floor_R | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        above_RV = jnp.where(order_RV >= candidate_R[:, None], weight_RV, 0)
        is_mass = jnp.issubdtype(above_RV.dtype, jnp.floating)
        total_R = row_sum(above_RV) if is_mass else jnp.sum(above_RV, axis=1, dtype=jnp.int32)
        return jnp.where(shard.sum(total_R) >= wanted_R, candidate_R, floor_R)

    return lax.fori_loop(0, 32, try_bit, jnp.zeros(order_RV.shape[0], jnp.uint32))


def _gumbel(rows: SampleRows, width: int, shard: VocabShard) -> Float[Array, "R V"]:
    """Noise of each (row, token): a hash of the row's key and the token's id, the same for any sharding.

    One hash gives two words, so tokens 2i and 2i + 1 share a call; a shard starts at an even token.
    """
    pairs = (width + 1) // 2
    pair_V = (shard.offset(width) // 2 + jnp.arange(pairs, dtype=jnp.int32)).astype(jnp.uint32)
    keys_R = row_keys(rows.seed_R2, rows.choice_R, rows.position_R)
    hash_pair = jax.vmap(lambda key, pair: jax.random.key_data(jax.random.fold_in(key, pair)), in_axes=(None, 0))
    hashed_RV = jax.vmap(hash_pair, in_axes=(0, None))(keys_R, pair_V).reshape(-1, 2 * pairs)[:, :width]
    uniform_RV = ((hashed_RV >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2**-23)  # in (0, 1), both ends out
    return -jnp.log(-jnp.log(uniform_RV))
