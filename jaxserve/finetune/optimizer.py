"""Optimizers of adapters: optax rules whose numbers are arguments, so that all jobs share one compiled update.

Masters, gradients and moments are pytrees of one floating dtype (float32 in training), at the adapter's true rank.
Every leaf has the model's layers as its first axis; no rule mixes layers.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.schedule import learning_rate

Number = float | jax.Array
Hyper = Mapping[str, Number]

_BETA2 = {"lion": 0.99}
_EPS = {"adafactor": 1e-30}
_RULES: dict[str, Callable[[Hyper], list[optax.GradientTransformation]]] = {
    "adamw": lambda h: [optax.scale_by_adam(h["beta1"], h["beta2"], h["eps"])],
    "adam": lambda h: [optax.scale_by_adam(h["beta1"], h["beta2"], h["eps"])],
    "sgd": lambda h: [optax.trace(h["momentum"])],
    "lion": lambda h: [optax.scale_by_lion(h["beta1"], h["beta2"])],
    "adafactor": lambda h: [
        _by_layer(
            # every matrix is factored, however small: so does transformers' Adafactor; in a chain of one, since its
            # moments have the chain's names in checkpoints
            optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1, epsilon=h["eps"]))
        ),
        _clip_by_layer_rms(h.get("shares")),
    ],
}


def hyperparameters(config: FinetuneConfig, total_steps: int, step: int) -> dict[str, float]:
    """The numbers of the update after ``step`` updates, for ``apply_gradients``."""
    return _constants(config) | {"learning_rate": float(learning_rate(config, total_steps, step))}


def transform(optimizer: str, hyper: Mapping[str, Any]) -> optax.GradientTransformation:
    """Clip, update rule, decoupled weight decay, learning rate; the state holds counts and moments alone.

    Args:
      hyper: what ``hyperparameters`` names, and maybe "shares": a tree like the masters, of [layers]: the share of a
        leaf that is no padding. Values may be traced.
    """
    chain = optax.chain(
        optax.clip_by_global_norm(hyper["max_grad_norm"]),
        *_RULES[optimizer](hyper),
        optax.add_decayed_weights(hyper["weight_decay"]),
        optax.scale_by_learning_rate(hyper["learning_rate"]),
    )
    return optax.GradientTransformation(chain.init, _mixing_dtypes(chain.update))


def make_optimizer(config: FinetuneConfig, total_steps: int) -> optax.GradientTransformation:
    """The whole optimizer of a job with its schedule inside, for a loop of one's own."""
    rate = partial(learning_rate, config, total_steps, xp=jnp)
    return optax.chain(
        transform(config.optimizer, _constants(config) | {"learning_rate": 1.0}), optax.scale_by_schedule(rate)
    )


def init_state(optimizer: str, masters: Any) -> Any:
    """The state before the first update: zeros."""
    nothing = dict.fromkeys([*_constants(FinetuneConfig()), "learning_rate"], 0.0)
    return transform(optimizer, nothing).init(masters)


@partial(jax.jit, static_argnames="optimizer")
def apply_gradients(
    optimizer: str, masters: Any, state: Any, gradients: Any, hyper: Hyper, shares: Any = None
) -> tuple[Any, Any, jax.Array]:
    """One update: (masters, state, norm of the gradient before clipping).

    A gradient that is not finite changes nothing, and its norm says so. One compilation serves every job whose
    adapter has the same shapes. Nothing is donated: what was there before the update is gone back to when the device
    fails, and saved, and served for as long as a request holds that version.
    """
    norm = optax.tree.norm(gradients)
    updates, new_state = transform(optimizer, {**hyper, "shares": shares}).update(gradients, state, masters)
    new_masters = jax.tree.map(lambda master, update: master + update.astype(master.dtype), masters, updates)
    finite = jnp.isfinite(norm)
    keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    return keep(new_masters, masters), keep(new_state, state), norm


def _by_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """``rule`` for each index of the first axis by itself: it looks at the shapes of single matrices."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # of params the rule looks at shapes alone
        return jax.vmap(lambda updates, state: rule.update(updates, state, updates))(updates, state)

    return optax.GradientTransformation(jax.vmap(rule.init), update)


def _clip_by_layer_rms(shares: Any) -> optax.GradientTransformation:
    """Scales each layer's update down to a root mean square of 1; padding, which is zero, does not count."""

    def clip(update: jax.Array, share: Any) -> jax.Array:
        mean = jnp.mean(jnp.square(update), axis=tuple(range(1, update.ndim))) / share
        return update / jnp.maximum(1.0, jnp.sqrt(mean)).reshape(-1, *(1,) * (update.ndim - 1))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        of_leaves = jax.tree.map(lambda _: 1.0, updates) if shares is None else shares
        return jax.tree.map(clip, updates, of_leaves), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _mixing_dtypes(update: Callable) -> Callable:
    """``update`` with JAX's usual promotion: optax mixes its integer counts with floats."""

    def mixing(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return update(updates, state, params)

    return mixing


def _constants(config: FinetuneConfig) -> dict[str, float]:
    return {
        "beta1": config.beta1,
        "beta2": config.beta2 if config.beta2 is not None else _BETA2.get(config.optimizer, 0.999),
        "eps": config.eps if config.eps is not None else _EPS.get(config.optimizer, 1e-8),
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm if config.max_grad_norm is not None else float("inf"),
    }
