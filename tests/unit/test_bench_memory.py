"""The memory of finetuning, method by method: the program without pruning is right, and what is told of all of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from training import random_params

from jaxserve.bench import memory
from jaxserve.bench.roofline import site_dims
from jaxserve.config import EngineConfig
from jaxserve.engine.activations import stash_bytes
from jaxserve.errors import ConfigError
from jaxserve.models import decoder
from jaxserve.models.config import ModelConfig
from pallas_kernels.cross_entropy import CROSS_ENTROPY, LossRows
from sharding import make_mesh

pytestmark = pytest.mark.quick_compiles

LENGTH = 24


@pytest.fixture(scope="module")
def model():
    return ModelConfig.from_dict(tiny_models.config_dict("gemma2", num_hidden_layers=2))


def test_gradients_for_every_weight_are_those_of_the_whole_loss(model):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = jax.device_get(random_params(model, "float64"))
        dims = site_dims(model).items()
        adapters = [
            {site: (0.1 * rng.normal(size=(4, i)), 0.1 * rng.normal(size=(sum(o), 4))) for site, (i, o) in dims}
            for _ in range(model.num_layers)
        ]
        token_S = jnp.asarray(rng.integers(2, model.vocab_size, LENGTH), jnp.int32)
        target_S = jnp.asarray(rng.integers(2, model.vocab_size, LENGTH), jnp.int32)
        weight_S, ones = jnp.asarray(rng.random(LENGTH)), jnp.ones(LENGTH)
        rows = LossRows(target_S, weight_S, jnp.full(LENGTH, CROSS_ENTROPY), ones, ones, ones, ones)
        program = jax.jit(partial(memory.whole_sequence, model=model))
        loss, gradients = program(params, adapters, token_S, rows)

        def whole(layers, adapters):
            hidden, _ = decoder.forward(
                {**params, "layers": [{**p, "number": i} for i, p in enumerate(layers)]},
                token_S,
                jnp.arange(LENGTH),
                config=model,
                lookup=decoder.plain_lookup,
                linear=partial(memory._adapted, adapters),
                attend=decoder.plain_attend(model),
                kv=[None] * model.num_layers,
            )
            logprob = jax.nn.log_softmax(decoder.logits(params, hidden, model)[:, : model.vocab_size])
            return -jnp.sum(weight_S * logprob[jnp.arange(LENGTH), target_S])

        expected, slopes = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(params["layers"], adapters)
        assert np.isclose(loss, expected, rtol=1e-9)
        for got, slope in zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True):
            assert np.allclose(got, slope, rtol=1e-6, atol=1e-9 * np.abs(slope).max())


def test_sizes_that_do_not_go_together_are_refused(model):
    for length, window in ((LENGTH, LENGTH + 1), (model.max_position_embeddings + 1, 8), (LENGTH, 0)):
        with pytest.raises(ConfigError, match="--window"):
            memory.ablation(model, EngineConfig(dtype="float32"), make_mesh(1), length, window)


def test_units_are_relative_to_the_first_method(monkeypatch, model):
    monkeypatch.setattr(memory, "_every_weight", lambda *args: 6300)
    monkeypatch.setattr(memory, "_step_bytes", lambda model, **sizes: 100 * sizes["rows"])
    result: dict[str, Any] = {"device": "none"} | memory.ablation(
        model, EngineConfig(dtype="float32"), make_mesh(1), 16, 4
    )
    units = {row["method"]: row["units"] for row in result["methods"]}
    assert units["every weight trainable, nothing run again"] == 63
    assert units["frozen weights pruned, remat full"] == 16
    between = 16 * model.num_layers * 2 * model.num_kv_heads * model.head_dim * (4 + 4)
    assert units["windows of 4, remat none"] == pytest.approx((400 + between) / 100)
    stashed = 16 * stash_bytes(model, 4)
    assert units["windows of 4, a stash"] == pytest.approx((400 + between + stashed) / 100)
    assert len(memory.lines(result)) == 3 + len(units)


def test_a_few_layers_stand_for_all(monkeypatch):
    model = ModelConfig.from_dict(tiny_models.config_dict("llama", num_hidden_layers=10))
    monkeypatch.setattr(memory, "_every_weight", lambda model, *args: 500 + 70 * model.num_layers)
    monkeypatch.setattr(memory, "_step_bytes", lambda model, **sizes: 500 + sizes["rows"] * model.num_layers)
    options, mesh = EngineConfig(dtype="float32"), make_mesh(1)
    few, many = (memory.ablation(model, options, mesh, 16, 4, layers)["methods"] for layers in (4, None))
    assert few == many
    with pytest.raises(ConfigError, match="--layers 1"):
        memory.ablation(model, options, mesh, 16, 4, 1)
