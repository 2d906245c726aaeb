"""adapter_config.json: what is not understood, or does not fit, is refused by name (L02)."""

import time
from dataclasses import replace
from typing import Any

import pytest
from tiny_adapters import (
    CONFIG,
    TENSORS,
    TINY,
    TinyShape,
    ia3_config,
    lora_config,
    random_tensors,
    refusal,
    write_adapter,
    write_files,
)

from jaxserve.adapters.peft_io import load_peft, save_peft

BAD_VALUES: dict[str, list[Any]] = {
    "peft_type": ["LOHA", "lora", None, 3, ["LORA"], "ADALORA", "PREFIX_TUNING", ""],
    "r": [0, -8, "8", 2**31, 513, 1.0, True, None, [], 10**300],
    "lora_alpha": [0, "8", None, True, 1e30, -1000000000.0, [8]],
    "target_modules": [
        [],
        None,
        "",
        "(a+)+$",
        ["nope"],
        [3],
        {"q_proj": 1},
        7,
        "q_proj",
        "(?!x).*q_proj",
        "[",
        "(" * 600,
        ["lm_head"],
        ["q_proj", "embed_tokens"],
        ".*",
        ["q_proj"] * 5000,
        ["q_proj", "lm_head"],
        "(.*.*.*)*" * 50,
    ],
    "exclude_modules": [3, ["q_proj", "v_proj"], "(", ".*_proj", {"a": 1}],
    "rank_pattern": [
        {"q_proj": 0},
        {"q_proj": "4"},
        {"q_proj": 513},
        ["q_proj"],
        {"(": 4},
        {"(?=q)q_proj": 4},
        4,
        {"q_proj": None},
    ],
    "alpha_pattern": [{"q_proj": 0}, {"q_proj": True}, {"(a+)+$)": 4}, {"a" * 600 + "*": 4}, "x"],
    "use_dora": ["yes", 1, 0],
    "use_rslora": ["false", 0, 1],
    "layers_to_transform": [2, -1, [0, 5], "0", 1.0, True, [True], [[0]], {}],
    "layers_pattern": ["layers", ["layers"], 3, "(a+)+$"],
    "bias": ["all", "lora_only", True, 1],
    "init_lora_weights": ["pissa", "olora", "pissa_niter_4", "corda", "loftq", "lora_ga", "Eva", "normal", 1, [True]],
    "task_type": ["SEQ_CLS"],
    "fan_in_fan_out": [True],
    "modules_to_save": [["lm_head"]],
    "lora_bias": [True],
    "target_parameters": [["mlp.experts"]],
    "trainable_token_indices": [[1, 2]],
    "layer_replication": [[[0, 1]]],
    "alora_invocation_tokens": [[1]],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "kasa_config": [{"beta": 1}],
    "arrow_config": [{"top_k": 3}],
    "megatron_config": [{"a": 1}],
    "monteclora_config": [{"a": 1}],
    "velora_config": [{"a": 1}],
    "some_new_option": [True],
    "some_new_number": [0],
    "some_new_table": [{"a": 1}],
}


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, values in BAD_VALUES.items() for v in values], ids=lambda v: repr(v)[:40]
)
def test_a_key_that_is_not_honoured_is_refused_by_name(tmp_path, key, value):
    write_files(tmp_path, lora_config() | {key: value}, random_tensors(lora_config()))
    error = refusal(tmp_path)
    assert key in str(error)
    assert error.field == key


def test_options_that_exclude_each_other_are_refused_as_peft_refuses_them(tmp_path):
    tensors = random_tensors(lora_config())
    for options in (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        {"target_modules": "all-linear", "layers_to_transform": 0},
    ):
        assert refusal(write_files(tmp_path, lora_config(**options), tensors)).field == "layers_to_transform"
    odd = lora_config(layers_to_transform=[0], layers_pattern="(a|b)*")
    assert refusal(write_files(tmp_path, odd, tensors)).field == "layers_pattern"
    nowhere = lora_config(layers_to_transform=[0], layers_pattern="h")
    assert "left to adapt" in str(refusal(write_files(tmp_path, nowhere, tensors)))


def test_keys_that_do_not_change_the_maths_are_accepted_at_any_value(tmp_path):
    harmless = {
        "lora_dropout": 0.3,
        "revision": "main",
        "auto_mapping": {"base_model_class": "X"},
        "eva_config": {"rho": 2},
    }
    harmless |= {"unknown_null": None, "unknown_empty": {}, "unknown_off": False, "inference_mode": False}
    write_files(tmp_path, lora_config() | harmless, random_tensors(lora_config()))
    assert load_peft(tmp_path, TINY).rank == 4


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_key_without_a_safe_default_must_be_there(tmp_path, key):
    config = lora_config()
    del config[key]
    assert refusal(write_files(tmp_path, config, random_tensors(lora_config()))).field == key


def test_ia3_needs_to_know_its_feed_forward_modules(tmp_path):
    config = ia3_config()
    tensors = random_tensors(config)
    load_peft(write_files(tmp_path, config, tensors), TINY)
    for value in (None, 3, "(", {"a": 1}):
        assert (
            refusal(write_files(tmp_path, config | {"feedforward_modules": value}, tensors)).field
            == "feedforward_modules"
        )
    wrong = config | {"feedforward_modules": ["v_proj"]}
    assert "expected [1, 32]" in str(refusal(write_files(tmp_path, wrong, tensors)))
    assert refusal(write_files(tmp_path, config | {"use_dora": True}, tensors)).field == "peft_type"


NOT_JSON = {
    "empty": b"",
    "list": b"[]",
    "string": b'"LORA"',
    "number": b"7",
    "null": b"null",
    "text": b"r: 4",
    "nan": b'{"r": NaN}',
    "infinity": b'{"r": -Infinity}',
    "overflow": b'{"r": 1e999}',
    "duplicate key": b'{"r": 4, "r": 8}',
    "deep": b'{"a":' * 50 + b"1" + b"}" * 50,
    "very deep": b"[" * 500_000,
    "long number": b'{"r": ' + b"9" * 5000 + b"}",
    "utf-16": '{"r": 4}'.encode("utf-16"),
    "bom": b'\xef\xbb\xbf{"r": 4}',
    "not utf-8": b'{"r": "\xff"}',
    "lone surrogate": b'{"r": "\\ud800"}',
    "many items": b'{"a": [' + b"0," * 400_000 + b"0]}",
    "ten megabytes": b'{"a": "' + b"x" * 10_000_000 + b'"}',
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=NOT_JSON)
def test_a_configuration_that_is_not_strict_json_is_refused_quickly(tmp_path, raw):
    write_files(tmp_path, raw, random_tensors(lora_config()))
    start = time.process_time()
    assert CONFIG in str(refusal(tmp_path))
    assert time.process_time() - start < 0.25


def test_missing_files_are_named(tmp_path):
    write_adapter(tmp_path)
    (tmp_path / TENSORS).unlink()
    assert refusal(tmp_path).field == TENSORS
    (tmp_path / CONFIG).unlink()
    assert refusal(tmp_path).field == CONFIG


def test_an_adapter_of_another_base_is_refused(tmp_path):
    weights = replace(load_peft(write_adapter(tmp_path / "a"), TINY), base_digest=b"\xaa" * 32)
    save_peft(weights, tmp_path / "b")
    load_peft(tmp_path / "b", TINY, base_digest=b"\xaa" * 32)
    load_peft(tmp_path / "b", TINY)
    load_peft(tmp_path / "a", TINY, base_digest=b"\xbb" * 32)  # says nothing about its base
    error = refusal(tmp_path / "b", base_digest=b"\xbb" * 32)
    assert error.field == "base_digest"
    assert "aaaa" in str(error)
    assert "bbbb" in str(error)


def test_an_adapter_of_another_shape_is_refused_with_both_shapes(tmp_path):
    write_adapter(tmp_path, TinyShape(hidden_size=64, head_dim=16))
    error = refusal(tmp_path)
    assert "[4, 64]" in str(error)
    assert "[4, 32]" in str(error)
    write_adapter(tmp_path, TinyShape(num_layers=3))
    assert "layer 2, the model has layers 0 to 1" in str(refusal(tmp_path))
    write_adapter(tmp_path, TinyShape(num_layers=1))
    assert "missing" in str(refusal(tmp_path))


def test_a_rank_above_the_servers_limit_is_refused(tmp_path):
    write_adapter(tmp_path, r=4, rank_pattern={"v_proj": 16})
    assert load_peft(tmp_path, TINY, max_rank=16).rank == 16
    error = refusal(tmp_path, max_rank=8)
    assert error.field == "r"
    assert "16" in str(error)
    assert "8" in str(error)
