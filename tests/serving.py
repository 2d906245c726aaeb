"""Tiny engines for tests, all of the same sizes: engines of one model share their compiled programs.

``serving.limit(engine, pages=12, budget=32)`` then makes one preempt, and cut prompts into chunks, without compiling.
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pack_audit
import pytest
import tiny_adapters
import tiny_models

import jaxserve
from jaxserve.adapters.weights import AdapterWeights
from jaxserve.config import EngineConfig
from jaxserve.engine.loop import EngineCore
from jaxserve.engine.sizes import core_config
from jaxserve.kvcache.pages import PagePool
from jaxserve.models.config import ModelConfig
from jaxserve.models.loader import load_config, load_params
from jaxserve.outputs import RequestOutput
from jaxserve.sampling import SamplingParams
from jaxserve.tokenizer import load_tokenizer
from sharding import make_mesh

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 16,
    "max_model_len": 160,
    "num_kv_pages": 64,
    "max_loras": 4,
    "max_lora_rank": 64,
    "max_logprobs": 5,
}
LARGE: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "max_loras": 16}
_FOLDER = tempfile.TemporaryDirectory(prefix="tiny")


def count_compilations(monkeypatch: pytest.MonkeyPatch, core: EngineCore, *names: str) -> dict[str, int]:
    """How many programs these methods compile, by name, from here on."""
    counted = {}

    def watch(name: str) -> None:
        original = getattr(core, name)

        def call(*args):
            before = core.compiles.before_ready + core.compiles.after_ready
            result = original(*args)
            counted[name] = core.compiles.before_ready + core.compiles.after_ready - before
            return result

        monkeypatch.setattr(core, name, call)

    for name in names:
        watch(name)
    return counted


def model_dir(family: str = "llama", **options: Any) -> str:
    """A model directory of ``tiny_models.build``, made once per process."""
    return _model_dir(family, json.dumps(options, sort_keys=True))


@cache
def _model_dir(family: str, options: str) -> str:
    return tiny_models.build(tempfile.mkdtemp(dir=_FOLDER.name), family, **json.loads(options))


@cache
def adapter_dir(path: str, seed: int = 0, rank: int = 4, scale: float = 0.2, alpha: float | None = None) -> Path:
    """A PEFT directory with random weights in every linear layer of the model at ``path``."""
    place = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    options = {"r": rank, "lora_alpha": alpha or 2 * rank, "target_modules": "all-linear"}
    return tiny_adapters.write_adapter(place / "adapter", model_config(path), seed=seed, scale=scale, **options)


@cache
def model_config(path: str) -> ModelConfig:
    return load_config(path)


@lru_cache(maxsize=16)
def parameters(path: str, dtype: str = "float32", tensor_parallel: int = 1) -> Any:
    return load_params(path, model_config(path), make_mesh(tensor_parallel), dtype)


def engine(path: str, *, eos: Sequence[int] | None = None, **options: Any) -> jaxserve.Engine:
    """A new engine, as ``Engine.from_pretrained`` makes it, whose every packed step is audited.

    Args:
      eos: token ids that end a request; the model's own by default.
      options: fields of EngineConfig that differ from SIZES.
    """
    config = EngineConfig(**SIZES | options)
    mesh = make_mesh(config.tensor_parallel)
    params = parameters(path, str(config.dtype), config.tensor_parallel)
    generation = {} if eos is None else {"eos_token_id": list(eos)}
    has_tokenizer = (Path(path) / "tokenizer.json").exists()
    tokenizer = load_tokenizer(path) if has_tokenizer else None
    made = jaxserve.Engine(model_config(path), params, mesh, config, tokenizer, generation, name="tiny")
    pack_audit.watch(made.core)
    return made


def core(path: str, **options: Any) -> EngineCore:
    """The inside of ``engine(path, **options)``, nothing compiled."""
    config = EngineConfig(**SIZES | options)
    model, mesh = model_config(path), make_mesh(config.tensor_parallel)
    params = parameters(path, str(config.dtype), config.tensor_parallel)
    return EngineCore(model, params, mesh, core_config(config, model, params, mesh), (), b"")


def limit(engine: jaxserve.Engine, *, pages: int | None = None, budget: int | None = None) -> jaxserve.Engine:
    """Leaves an idle engine fewer KV pages, or smaller chunks, than its programs are made for."""
    core, scheduler = engine.core, engine.core.scheduler
    assert not core.has_work()
    if pages is not None:
        core.pool = scheduler.pool = PagePool(pages, core.config.page_size, core.config.enable_prefix_caching)
    if budget is not None:
        scheduler.config = dataclasses.replace(scheduler.config, max_num_batched_tokens=budget)
    return engine


def prompt(length: int, seed: int = 0, vocab_size: int = tiny_models.VOCAB_SIZE) -> list[int]:
    """Random token ids."""
    return np.random.default_rng([seed, length]).integers(0, vocab_size, length).tolist()


def greedy(max_tokens: int = 32, **options: Any) -> SamplingParams:
    """Greedy to the last token, with log-probabilities."""
    return SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, "logprobs": 3} | options)


def bits(output: RequestOutput) -> tuple:
    """Everything numeric about a result: equal means equal in every bit."""
    choices = [(c.token_ids, [list(x.items()) for x in c.logprobs or ()], c.finish_reason) for c in output.outputs]
    return choices, output.prompt_logprobs


def drain(engine: jaxserve.Engine, max_steps: int = 10_000) -> list[jaxserve.Event]:
    """Steps until nothing is left to do."""
    events = []
    for _ in range(max_steps):
        if not engine.has_work():
            return events
        events += engine.step()
    raise AssertionError(f"still at work after {max_steps} steps: {engine.stats()}")


def check_idle(engine: jaxserve.Engine) -> None:
    """Nothing runs, and everything was given back."""
    core = engine.core
    assert not drain(engine), "a request was still alive"  # at most a step without news
    assert not engine._live
    core.scheduler.check()
    core.pool.check([])
    core.residency.check()
    assert core.pool.num_free + core.pool.num_cached == core.pool.num_pages
    assert core.residency.counts().num_refs == 0
    assert engine.adapters.num_pins == 0


def poison(weights: AdapterWeights, value: float = np.nan, layer: int = 0):
    """The same weights with one number that is not finite in B of a layer's v_proj."""
    pairs = dict(weights.pairs)
    pair = pairs[layer, "v_proj"]
    b = pair.b.copy()
    b[0, 0] = value
    pairs[layer, "v_proj"] = dataclasses.replace(pair, b=b)
    return dataclasses.replace(weights, pairs=pairs)


def leaves_nbytes(tree: Any) -> int:
    """Bytes of a pytree on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
