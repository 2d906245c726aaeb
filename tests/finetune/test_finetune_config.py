"""Every hyperparameter: what is refused and how, what the defaults are, what a resumed job must agree with."""

import math

import numpy as np
import pytest
import tiny_models

from jaxserve.adapters import fields, lora
from jaxserve.adapters.method import method_of
from jaxserve.errors import ConfigError
from jaxserve.finetune.config import FinetuneConfig
from jaxserve.models.config import ModelConfig

BAD = {
    "method": ["LORA", "", None, 1],
    "rank": [0, -1, 257, 4096, "16", 1.5, True, None],
    "alpha": [0, -1, math.nan, math.inf, 1e7, "32"],
    "target_modules": [[], "", ["q_proj", ""], ["q_proj", 3], "(", "(a+)+\\1", {"q_proj": 1}],
    "feedforward_modules": ["[", [None]],
    "dropout": [1.0, -0.1, math.nan, "0.1"],
    "optimizer": ["adamax", "AdamW", None],
    "learning_rate": [0, -1, math.nan, math.inf, 1e3, "1e-4", True],
    "beta1": [1.0, 1 - 1e-9, -0.1],
    "beta2": [1.0, math.nan],
    "eps": [0, 1e-40, -1e-8, 2],
    "momentum": [1.0, -0.5],
    "weight_decay": [-0.1, 1.5, math.inf],
    "max_grad_norm": [0, 1e-40, 1e39, -1.0, math.nan, math.inf],
    "schedule": ["step", None],
    "warmup_steps": [-1, 1.5],
    "warmup_ratio": [-0.1, 1.1],
    "batch_size": [0, -1, 10**9, "auto"],
    "epochs": [0, -1, 10**6, "auto", 1.5],
    "max_steps": [0, -1, 10**12],
    "window": [0, 2**21],
    "remat": ["some", True],
    "deterministic": ["yes", 1],
    "seed": [-1, 2**32, 0.5],
    "loss_on": ["user"],
    "max_length": [0, 1],
    "on_long": ["split"],
    "shuffle": ["no"],
    "packing": [1],
    "validation_fraction": [-0.1, 0.6, math.nan],
    "validation_data": [1, "", "a\0"],
    "eval_steps": [0],
    "output_dir": [b"x", "", "a\0"],
    "save_steps": [0, -1],
    "save_total_limit": [0],
    "start": ["", None, "a\0"],
}


@pytest.fixture
def model():
    return ModelConfig.from_dict(tiny_models.config_dict("llama"))


def test_numbers_of_numpy_are_pythons():
    config = FinetuneConfig(rank=np.int8(4), seed=np.int64(3), learning_rate=np.float32(0.5))
    assert repr(config) == repr(FinetuneConfig(rank=4, seed=3, learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"rank = 4\.5"):
        FinetuneConfig(rank=np.float32(4.5))


def test_every_field_has_its_bad_values_in_this_file():
    assert BAD.keys() == FinetuneConfig.model_fields.keys()


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_wrong_value_is_refused_by_field_and_value(field, value):
    others = {"method": "ia3"} if field == "feedforward_modules" else {}
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig(**others | {field: value})
    assert len(caught.value.errors) == 1
    line = caught.value.errors[0]
    assert line.startswith(f"{field} = ")
    assert "\n" not in line


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig(rank=0, learning_rate=-1, dropout=1.0, learning_rat=1)
    assert [line.split(" ")[0] for line in caught.value.errors] == ["rank", "dropout", "learning_rate", "learning_rat"]
    assert "1" in caught.value.errors[0]
    assert "did you mean learning_rate?" in caught.value.errors[3]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"epochs": 1, "max_steps": 1}, ["epochs", "max_steps"]),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, ["warmup_steps", "warmup_ratio"]),
        ({"validation_fraction": 0.1, "validation_data": "x"}, ["validation_fraction", "validation_data"]),
        ({"optimizer": "adam", "weight_decay": 0.1}, ["weight_decay 0.1", "adamw"]),
        ({"method": "ia3", "dropout": 0.1}, ["dropout 0.1", "ia3"]),
        ({"feedforward_modules": ["down_proj"]}, ["feedforward_modules", "lora"]),
        (
            {"method": "ia3", "target_modules": ["q_proj"], "feedforward_modules": ["up_proj"]},
            ["feedforward_modules", "up_proj", "q_proj"],
        ),
        ({"epochs": 1, "max_steps": 1, "optimizer": "adam", "weight_decay": 0.1}, ["max_steps", "adamw"]),
    ],
    ids=str,
)
def test_fields_that_contradict_each_other_are_refused(values, named):
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig(**values)
    assert all(name in str(caught.value) for name in named)


def test_lists_are_taken_where_a_file_has_them():
    config = FinetuneConfig(target_modules=["q_proj", "v_proj"])
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.adapter_config()["target_modules"] == ["q_proj", "v_proj"]


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError):
        FinetuneConfig().rank = 3  # type: ignore[misc]


def test_a_dumped_config_gives_the_same_config():
    config = FinetuneConfig(method="ia3", target_modules=["k_proj", "down_proj"], max_steps=5, warmup_ratio=0.1)
    assert FinetuneConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("fields", "examples", "steps"),
    [
        ({}, 16, 2),
        ({}, 17, 3),
        ({"epochs": 3}, 17, 9),
        ({"batch_size": 100, "epochs": 2}, 3, 2),
        ({"max_steps": 7}, 10_000, 7),
    ],
)
def test_steps_are_counted_over_epochs_with_a_last_smaller_batch(fields, examples, steps):
    assert FinetuneConfig(**fields).total_steps(examples) == steps


@pytest.mark.parametrize(("fields", "steps"), [({}, 0), ({"warmup_steps": 9}, 9), ({"warmup_ratio": 0.05}, 6)])
def test_the_warm_up_is_given_in_steps_or_as_a_share(fields, steps):
    assert FinetuneConfig(**fields).num_warmup_steps(101) == steps


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3"])
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "down_proj"], r".*\.mlp\.(up|down)_proj"], ids=str)
def test_the_adapter_config_is_one_that_adapters_accept(model, method, targets):
    config = FinetuneConfig(method=method, target_modules=targets, rank=4, alpha=8).adapter_config()
    chosen = method_of(config)
    fields.check(config, chosen.FIELDS)
    assert {"rslora": "lora"}.get(method, method) == chosen.NAME
    assert chosen.shapes(config, model)


def test_rank_and_alpha_give_the_scaling(model):
    for method, scaling in (("lora", 32 / 16), ("rslora", 32 / 4)):
        config = FinetuneConfig(method=method).adapter_config()
        assert {scale for _, scale in lora.plan(config, model).values()} == {scaling}


def test_peft_reads_the_adapter_config(tmp_path):
    peft = pytest.importorskip("peft")
    for method in ("lora", "rslora", "dora", "ia3"):
        config = FinetuneConfig(method=method, rank=4, target_modules=["q_proj", "down_proj"]).adapter_config()
        read = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config}[config.pop("peft_type")](**config)
        assert set(read.target_modules) == {"q_proj", "down_proj"}
        if method == "ia3":
            assert set(read.feedforward_modules) == {"down_proj"}


def test_the_digest_follows_what_training_depends_on_and_nothing_else():
    digest = FinetuneConfig().digest()
    housekeeping = {"output_dir": "x", "save_steps": 7, "save_total_limit": 9, "eval_steps": 3, "start": "x"}
    assert FinetuneConfig(**housekeeping).digest() == digest
    changed = [{"rank": 8}, {"learning_rate": 2e-4}, {"seed": 1}, {"batch_size": 4}, {"epochs": 2}, {"window": 64}]
    assert len({digest, *(FinetuneConfig(**fields).digest() for fields in changed)}) == 1 + len(changed)


def test_every_field_is_explained():
    assert all(field.description for field in FinetuneConfig.model_fields.values())
