"""Sampling over a vocabulary split over devices gives the tokens of the whole one.

Shapes: R rows, V vocabulary, N top tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.token_sampling import VocabShard, log_normaliser, pick, sample, top_tokens
from pallas_kernels.token_sampling.cases import CASES
from sharding import AXIS, make_mesh


def split(function, shards):
    """Jits function(logits of the shard, *replicated arguments, shard) over so many shards; results are replicated."""

    def run(logits_RV, *args):
        width = -(-logits_RV.shape[1] // (8 * shards)) * 8
        padding = ((0, 0), (0, width * shards - logits_RV.shape[1]))
        local = jax.shard_map(
            lambda logits, *rest: function(logits, *rest, VocabShard(AXIS, shards)),
            mesh=make_mesh(shards),
            in_specs=(PartitionSpec(None, AXIS), *(PartitionSpec() for _ in args)),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return local(jnp.pad(logits_RV, padding, constant_values=-jnp.inf), *args)

    return jax.jit(run)


def draw(logits_RV, rows, filters, shard):
    return sample(logits_RV, rows, True, filters, shard)


draw_whole = jax.jit(lambda logits_RV, rows, filters: draw(logits_RV, rows, filters, VocabShard()))
draw_split = split(draw, 8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_split_vocabulary_draws_the_same_tokens(case):
    logits_RV, rows = case.make()
    whole_R = draw_whole(logits_RV, rows, case.filters)
    np.testing.assert_array_equal(draw_split(logits_RV, rows, jnp.asarray(case.filters)), whole_R)


@pytest.mark.parametrize("shards", [2, 8])
def test_a_split_vocabulary_has_the_same_normaliser_tops_and_values(shards):
    logits_RV, _ = CASES[0].make()
    norm_R = split(log_normaliser, shards)(logits_RV)
    np.testing.assert_allclose(norm_R, log_normaliser(logits_RV, VocabShard()), rtol=1e-6)
    value_RN, token_RN = split(lambda x, shard: top_tokens(x, 5, shard), shards)(logits_RV)
    expected_RN, expected_token_RN = top_tokens(logits_RV, 5, VocabShard())
    np.testing.assert_array_equal(value_RN, expected_RN)
    np.testing.assert_array_equal(token_RN, expected_token_RN)
    token_R = jnp.asarray(np.arange(32) * 9, jnp.int32)
    np.testing.assert_array_equal(split(pick, shards)(logits_RV, token_R), logits_RV[jnp.arange(32), token_R])
