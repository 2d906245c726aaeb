"""Token losses over a frozen head: the loss and its gradient in one pass, a few rows of logits at a time.

The head is frozen, so all a backward needs is dX = dlogits W; it is computed beside the loss and nothing of size
[rows, vocabulary] outlives its chunk. Every loss here depends on a row's logits through the log-probability of its
target alone, so dlogits = coefficient * (softmax - onehot), coefficient = -dloss / dlogprob.

Shapes: W rows, Q rows per chunk, D hidden, V vocabulary of this shard.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels.numerics import map_rows
from pallas_kernels.token_sampling import VocabShard, log_normaliser, pick

CHUNK_ROWS = 256  # each chunk reads the head twice: with fewer rows a GPU waits for memory, a CPU's products are slow
CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO = range(3)


@struct.dataclass
class LossRows:
    """What each gradient row is to learn. Weight 0: nothing."""

    target_W: Int[Array, "W"]
    weight_W: Float[Array, "W"]
    kind_W: Int[Array, "W"]  # CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO
    sampled_logprob_W: Float[Array, "W"]  # under the policy that drew the target
    advantage_W: Float[Array, "W"]
    clip_low_W: Float[Array, "W"]  # PPO: the ratio is clipped to [clip_low, clip_high]
    clip_high_W: Float[Array, "W"]


def token_loss(logprob_W: Float[Array, "W"], rows: LossRows) -> tuple[Float[Array, "W"], Float[Array, "W"]]:
    """Each row's loss and coefficient -dloss / dlogprob.

    cross entropy:        -weight * logprob
    importance sampling:  -weight * ratio * advantage, ratio = exp(logprob - sampled logprob)
    PPO (Schulman et al. 2017, eq. 7): -weight * min(ratio * advantage, clip(ratio) * advantage)
    """
    rows = jax.tree.map(lambda x: x.astype(logprob_W.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, rows)
    ratio_W = jnp.exp(jnp.where(rows.kind_W == CROSS_ENTROPY, 0, logprob_W - rows.sampled_logprob_W))
    gain_W = ratio_W * rows.advantage_W
    clipped_W = jnp.clip(ratio_W, rows.clip_low_W, rows.clip_high_W) * rows.advantage_W
    is_clipped_W = (rows.kind_W == PPO) & (clipped_W < gain_W)
    policy_W = jnp.where(is_clipped_W, clipped_W, gain_W)
    policy_slope_W = jnp.where(is_clipped_W, 0, gain_W)
    plain_W = rows.kind_W == CROSS_ENTROPY
    loss_W = -rows.weight_W * jnp.where(plain_W, logprob_W, policy_W)
    return loss_W, rows.weight_W * jnp.where(plain_W, jnp.ones_like(gain_W), policy_slope_W)


def loss_and_gradient(
    hidden_WD: Float[Array, "W D"],
    rows: LossRows,
    head: Callable[[jax.Array], tuple[jax.Array, Callable[[jax.Array], jax.Array]]],
    shard: VocabShard,
) -> tuple[Float[Array, "W"], Float[Array, "W"], Float[Array, "W D"]]:
    """Returns (loss, target's log-probability, dloss/dhidden) per row.

    Args:
      head: [Q, D] -> this shard's logits [Q, V] in float32 or wider, padding of the vocabulary at -inf, and their
        vector-Jacobian product [Q, V] -> [Q, D] (this shard's part; the parts are summed here).
    """

    def chunk(args):
        hidden_QD, rows = args
        logits_QV, pull = head(hidden_QD)
        norm_Q = log_normaliser(logits_QV, shard)
        logprob_Q = pick(logits_QV, rows.target_W, shard) - norm_Q
        loss_Q, coefficient_Q = token_loss(logprob_Q, rows)
        is_target_QV = shard.tokens(logits_QV.shape[1])[None] == rows.target_W[:, None]
        residual_QV = jnp.exp(logits_QV - norm_Q[:, None]) - is_target_QV.astype(logits_QV.dtype)
        d_logits_QV = residual_QV * coefficient_Q[:, None]
        # a row without weight contributes exactly nothing, whatever its numbers are
        learns_Q = rows.weight_W != 0
        d_hidden_QD = shard.sum(pull(jnp.where(learns_Q[:, None], d_logits_QV, 0)))
        return jnp.where(learns_Q, loss_Q, 0), logprob_Q, jnp.where(learns_Q[:, None], d_hidden_QD, 0)

    loss_W, logprob_W, d_hidden_WD = map_rows(chunk, CHUNK_ROWS, (hidden_WD, rows))
    return loss_W, logprob_W, d_hidden_WD.astype(hidden_WD.dtype)
