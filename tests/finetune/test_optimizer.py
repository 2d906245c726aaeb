"""Every optimizer and schedule against torch's or transformers' own, and what one compiled update promises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.optimizer import apply_gradients, hyperparameters, init_state, make_optimizer
from jaxserve.finetune.schedule import learning_rate

pytestmark = pytest.mark.quick_compiles

STEPS = 50
LAYERS = 6  # more than a rank: a rule that took the stack for a matrix would show
SHAPES = {"a": (LAYERS, 4, 12), "b": (LAYERS, 12, 4), "row": (LAYERS, 1, 9), "scale": (LAYERS, 7)}
OPTIMIZERS = ["adamw", "adam", "sgd", "lion", "adafactor"]
BASE = {"learning_rate": 1e-2, "max_grad_norm": None, "schedule": "constant", "max_steps": STEPS}


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(step):
    rng = np.random.default_rng(100 + step)
    return {name: rng.normal(scale=0.1, size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def ours(config, tree, steps=STEPS):
    masters, state = jax.tree.map(jnp.array, tree), init_state(config.optimizer, jax.tree.map(jnp.array, tree))
    for step in range(steps):
        hyper = hyperparameters(config, steps, step)
        masters, state, _ = apply_gradients(config.optimizer, masters, state, gradients(step), hyper)
    return jax.device_get(masters)


def torchs(make, tree, max_norm=None, schedule=None):
    torch = pytest.importorskip("torch")
    parameters = {name: [torch.nn.Parameter(torch.tensor(layer)) for layer in value] for name, value in tree.items()}
    every = [parameter for layers in parameters.values() for parameter in layers]
    optimizer = make(torch, every)
    scheduler = schedule(optimizer) if schedule else None
    for step in range(STEPS):
        for name, value in gradients(step).items():
            for parameter, layer in zip(parameters[name], value, strict=True):
                parameter.grad = torch.tensor(layer)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(every, max_norm)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return {name: np.stack([layer.detach().numpy() for layer in layers]) for name, layers in parameters.items()}


def assert_close(got, wanted, tolerance=2e-5):
    for name in SHAPES:
        np.testing.assert_allclose(got[name], wanted[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize(
    ("fields", "make"),
    [
        ({"optimizer": "adamw", "weight_decay": 0.1}, lambda t, p: t.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
        (
            {"optimizer": "adamw", "beta1": 0.8, "beta2": 0.95, "eps": 1e-6},
            lambda t, p: t.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0),
        ),
        ({"optimizer": "adam"}, lambda t, p: t.optim.Adam(p, lr=1e-2)),
        ({"optimizer": "sgd", "momentum": 0.7}, lambda t, p: t.optim.SGD(p, lr=1e-2, momentum=0.7)),
        ({"optimizer": "sgd", "momentum": 0.0}, lambda t, p: t.optim.SGD(p, lr=1e-2)),
    ],
    ids=["adamw", "adamw-betas", "adam", "sgd-momentum", "sgd"],
)
def test_fifty_steps_equal_those_of_torch(tree, fields, make, max_norm):
    config = FinetuneConfig(**BASE | fields | {"max_grad_norm": max_norm})
    assert_close(ours(config, tree), torchs(make, tree, max_norm))


def test_adafactor_equals_that_of_transformers(tree):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")

    def make(torch, parameters):
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return transformers.Adafactor(parameters, lr=1e-2, weight_decay=0.05, **fixed)

    config = FinetuneConfig(**BASE | {"optimizer": "adafactor", "weight_decay": 0.05})
    assert_close(ours(config, tree), torchs(make, tree))


def test_adafactor_does_not_see_ranks_that_a_module_lacks():
    """Matrices of rank 2, held in 8 rows since another module has rank 8, change as those that are held in 2."""
    rng, config = np.random.default_rng(0), FinetuneConfig(**BASE | {"optimizer": "adafactor"})
    gradient_SLRD = rng.normal(size=(STEPS, LAYERS, 2, 24)) * 10 ** rng.normal(size=(STEPS, LAYERS, 2, 24))

    def trained(rows):
        padding = ((0, 0), (0, rows - 2), (0, 0))
        masters = {"a": jnp.zeros((LAYERS, rows, 24), jnp.float32)}
        state, shares = init_state("adafactor", masters), {"a": np.full(LAYERS, 2 / rows, np.float32)}
        for step in range(STEPS):
            gradient = {"a": np.pad(gradient_SLRD[step], padding).astype(np.float32)}
            hyper = hyperparameters(config, STEPS, step)
            masters, state, _ = apply_gradients("adafactor", masters, state, gradient, hyper, shares)
        return np.asarray(masters["a"])

    padded = trained(8)
    np.testing.assert_allclose(padded[:, :2], trained(2), rtol=1e-5, atol=1e-6)
    assert not padded[:, 2:].any()


def test_lion_is_the_paper_s_four_lines(tree):
    config = FinetuneConfig(**BASE | {"optimizer": "lion", "weight_decay": 0.1})
    wanted, moment = dict(tree), {name: np.zeros_like(value) for name, value in tree.items()}
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            direction = np.sign(np.float32(0.9) * moment[name] + np.float32(0.1) * gradient)
            wanted[name] = wanted[name] - np.float32(1e-2) * (direction + np.float32(0.1) * wanted[name])
            moment[name] = np.float32(0.99) * moment[name] + np.float32(0.01) * gradient
    assert_close(ours(config, tree), wanted)


def test_weight_decay_of_sgd_is_decoupled_from_the_momentum(tree):
    config = FinetuneConfig(**BASE | {"optimizer": "sgd", "weight_decay": 0.1, "momentum": 0.5})
    wanted, trace = dict(tree), {name: np.zeros_like(value) for name, value in tree.items()}
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            trace[name] = gradient + np.float32(0.5) * trace[name]
            wanted[name] = wanted[name] - np.float32(1e-2) * (trace[name] + np.float32(0.1) * wanted[name])
    assert_close(ours(config, tree), wanted)


@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 7}, {"warmup_ratio": 0.1}, {"warmup_steps": STEPS}], ids=str)
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_equal_those_of_transformers(schedule, warmup):
    optimization = pytest.importorskip("transformers.optimization")
    torch = pytest.importorskip("torch")
    config = FinetuneConfig(**BASE | {"schedule": schedule} | warmup)
    kind = schedule if schedule != "constant" else "constant_with_warmup"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = optimization.get_scheduler(kind, optimizer, config.num_warmup_steps(STEPS), STEPS)
    for step in range(STEPS):
        wanted = scheduler.get_last_lr()[0]
        assert learning_rate(config, STEPS, step) == pytest.approx(wanted, rel=1e-12, abs=1e-15)
        assert float(learning_rate(config, STEPS, jnp.int32(step), jnp)) == pytest.approx(wanted, rel=1e-5, abs=1e-8)
        optimizer.step()
        scheduler.step()


def test_a_schedule_drives_the_steps_as_it_does_in_torch(tree):
    optimization = pytest.importorskip("transformers.optimization")
    config = FinetuneConfig(**BASE | {"schedule": "cosine", "warmup_steps": 5})
    wanted = torchs(
        lambda t, p: t.optim.AdamW(p, lr=1e-2, weight_decay=0),
        tree,
        schedule=lambda optimizer: optimization.get_cosine_schedule_with_warmup(optimizer, 5, STEPS),
    )
    assert_close(ours(config, tree), wanted)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optax_optimizer_takes_the_same_steps(tree, optimizer):
    config = FinetuneConfig(**BASE | {"optimizer": optimizer, "schedule": "linear", "max_grad_norm": 0.3})
    optax_optimizer = make_optimizer(config, STEPS)
    masters = jax.tree.map(jnp.array, tree)
    state = optax_optimizer.init(masters)
    for step in range(10):
        updates, state = optax_optimizer.update(gradients(step), state, masters)
        masters = optax.apply_updates(masters, updates)
    again = jax.tree.map(jnp.array, tree)
    state = init_state(optimizer, again)
    for step in range(10):
        hyper = hyperparameters(config, STEPS, step)
        again, state, _ = apply_gradients(optimizer, again, state, gradients(step), hyper)
    assert_close(again, masters)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_jobs_with_other_numbers_share_one_compilation(tree, optimizer):
    apply_gradients.clear_cache()
    for seed in range(3):
        fields = {"learning_rate": 1e-3 * (seed + 1), "beta1": 0.5 + seed / 10, "max_grad_norm": [None, 1.0, 2.0][seed]}
        ours(FinetuneConfig(**BASE | {"optimizer": optimizer} | fields), tree, steps=2)
    assert apply_gradients._cache_size() == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_changes_nothing(tree, optimizer, bad):
    config = FinetuneConfig(**BASE | {"optimizer": optimizer})
    step = partial(apply_gradients, optimizer)
    masters = jax.tree.map(jnp.array, tree)
    masters, state, _ = step(masters, init_state(optimizer, masters), gradients(0), hyperparameters(config, 9, 0))
    before = jax.device_get((masters, state))
    poisoned = gradients(1)
    poisoned["b"][1, 3, 2] = bad
    masters, state, norm = step(masters, state, poisoned, hyperparameters(config, 9, 1))
    assert not np.isfinite(norm)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((masters, state)), before)


def test_the_norm_that_is_reported_is_that_of_the_whole_unclipped_gradient(tree):
    config = FinetuneConfig(max_grad_norm=1e-3)
    masters = jax.tree.map(jnp.array, tree)
    *_, norm = apply_gradients(
        "adamw", masters, init_state("adamw", masters), gradients(0), hyperparameters(config, 9, 0)
    )
    wanted = np.sqrt(sum(np.square(value.astype(np.float64)).sum() for value in gradients(0).values()))
    assert float(norm) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masters_and_moments_keep_their_dtype(tree, optimizer):
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            masters = jax.tree.map(lambda value, dtype=dtype: jnp.array(value, dtype), tree)
            grads = jax.tree.map(jnp.ones_like, masters)
            state = init_state(optimizer, masters)
            wanted = jax.tree.map(lambda leaf: leaf.dtype, state)
            hyper = hyperparameters(FinetuneConfig(optimizer=optimizer), 9, 0)
            masters, state, _ = apply_gradients(optimizer, masters, state, grads, hyper)
            assert {leaf.dtype for leaf in jax.tree.leaves(masters)} == {jnp.dtype(dtype)}
            assert jax.tree.map(lambda leaf: leaf.dtype, state) == wanted
