"""PEFT directories in and out: what is read is what PEFT computes, what is not understood is refused by name."""

import contextlib
import json
import math
import os
import pickle
import socket
import struct
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny_adapters import (
    TINY,
    TinyShape,
    hf_llama,
    ia3_config,
    lora_config,
    peft_modules,
    random_tensors,
    refusal,
    write_adapter,
    write_files,
    write_with_peft,
)

from jaxserve.adapters import dora, ia3, lora
from jaxserve.adapters.peft_io import load_peft, save_peft
from jaxserve.adapters.weights import MEMBERS, LoraPair
from jaxserve.config.schema import LoraOptions
from jaxserve.engine.lanes import weights_of
from jaxserve.errors import AdapterError
from jaxserve.models.config import member_dims

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


# ---- what PEFT writes, we read as PEFT means it

CASES = {
    "list": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "suffix of two names": {"target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]},
    "full names": {"target_modules": ["model.layers.1.self_attn.k_proj", "o_proj"]},
    "regex": {"target_modules": r"model\.layers\.\d+\.(self_attn\.[qv]|mlp\.gate)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude list": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "exclude regex": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*k_proj"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "no layers pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ""},
    "a full name passes the layer filter": {
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
    },
    "rslora": {"r": 9, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "rank_pattern": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7}},
    "first pattern wins": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 5},
    },
    "anchored pattern": {"target_modules": ["q_proj"], "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 3}},
    "alpha_pattern": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3, "0.self_attn.q_proj": 1}},
    "rslora with patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"v": 3, "v_proj": 16},
        "alpha_pattern": {"v_proj": 2.5},
    },
    "float alpha, gaussian": {"r": 1, "lora_alpha": 0.5, "target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
    "Gaussian": {"target_modules": ["o_proj"], "init_lora_weights": "Gaussian"},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.1},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "bfloat16": {"target_modules": ["q_proj", "v_proj"], "dtype": "bfloat16"},
    "float16": {"target_modules": ["q_proj", "v_proj"], "dtype": "float16"},
}
LORA_OPTIONS = {name: {"r": 4, "lora_alpha": 8} | options for name, options in CASES.items()}


@pytest.mark.parametrize("options", LORA_OPTIONS.values(), ids=LORA_OPTIONS)
def test_what_peft_saved_is_read_as_the_update_that_peft_computes(tmp_path, options):
    pytest.importorskip("peft")
    model = write_with_peft(tmp_path, hf_llama(), **options)
    weights = load_peft(tmp_path, TINY)
    modules = peft_modules(model)
    assert weights.pairs.keys() == modules.keys()
    assert weights.rank == max(module.r["default"] for module in modules.values())
    for key, module in modules.items():
        assert weights.scaling[key] == module.scaling["default"]
        assert np.array_equal(weights.pairs[key].a, module.lora_A["default"].weight.detach().float().numpy())
        assert np.array_equal(weights.pairs[key].b, module.lora_B["default"].weight.detach().float().numpy())
        delta = weights.scaling[key] * (weights.pairs[key].b @ weights.pairs[key].a)
        expected = module.float().get_delta_weight("default")
        np.testing.assert_allclose(delta, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", LORA_OPTIONS.values(), ids=LORA_OPTIONS)
def test_peft_to_us_and_back_gives_the_same_files(tmp_path, options):
    pytest.importorskip("peft")
    write_with_peft(tmp_path / "theirs", hf_llama(), **options)
    save_peft(load_peft(tmp_path / "theirs", TINY), tmp_path / "ours")
    assert (tmp_path / "ours" / TENSORS).read_bytes() == (tmp_path / "theirs" / TENSORS).read_bytes()
    theirs, ours = (json.loads((tmp_path / side / CONFIG).read_text()) for side in ("theirs", "ours"))
    assert ours == theirs


IA3_OPTIONS = {
    "list": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "regex": {"target_modules": r".*\.(v|up|down)_proj", "feedforward_modules": r".*\.(up|down)_proj"},
    "none feed-forward": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    "all-linear": {"target_modules": "all-linear", "feedforward_modules": ["0.mlp.down_proj", "up_proj"]},
}


@pytest.mark.parametrize("options", IA3_OPTIONS.values(), ids=IA3_OPTIONS)
def test_ia3_vectors_are_read_and_written_as_peft_does(tmp_path, options):
    pytest.importorskip("peft")
    model = write_with_peft(tmp_path / "theirs", hf_llama(), peft_type="IA3", **options)
    weights = load_peft(tmp_path / "theirs", TINY)
    modules = peft_modules(model)
    assert weights.method == "ia3"
    assert weights.vectors.keys() == modules.keys()
    for key, module in modules.items():
        assert weights.vectors[key].kind == ("input_scale" if module.is_feedforward else "output_scale")
        assert np.array_equal(weights.vectors[key].value, module.ia3_l["default"].detach().flatten().numpy())
    save_peft(weights, tmp_path / "ours")
    assert (tmp_path / "ours" / TENSORS).read_bytes() == (tmp_path / "theirs" / TENSORS).read_bytes()


def test_dora_magnitudes_come_with_their_pairs(tmp_path):
    pytest.importorskip("peft")
    options = LORA_OPTIONS["dora"]
    model = write_with_peft(tmp_path, hf_llama(), **options)
    weights = load_peft(tmp_path, TINY)
    assert weights.method == "dora"
    for key, module in peft_modules(model).items():
        expected = module.lora_magnitude_vector["default"].weight.detach().numpy()
        assert weights.vectors[key].kind == "magnitude"
        assert np.array_equal(weights.vectors[key].value, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.up_proj": 3}},
        {"target_modules": ["q_proj"], "use_rslora": True, "layers_to_transform": [1]},
        {"target_modules": r".*\.(up|o)_proj", "use_dora": True},
    ],
    ids=["patterns", "rslora", "dora"],
)
def test_peft_reads_our_directories_and_computes_the_same_logits(tmp_path, options):
    peft = pytest.importorskip("peft")
    import torch

    theirs = write_with_peft(tmp_path / "theirs", hf_llama(), r=4, lora_alpha=8, **options)
    weights = load_peft(tmp_path / "theirs", TINY)
    save_peft(weights, tmp_path / "ours")
    ours = peft.PeftModel.from_pretrained(hf_llama(), str(tmp_path / "ours")).eval()
    tokens = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        base, expected, found = (model(tokens).logits for model in (hf_llama(), theirs, ours))
    assert torch.equal(found, expected)
    assert (base - expected).abs().max() > 1e-2


def test_an_adapter_made_here_is_read_by_peft_with_the_same_update(tmp_path):
    peft = pytest.importorskip("peft")
    config = lora.new_config(rank=4, alpha=6, target_modules="all-linear", use_rslora=True)
    weights = lora.initial(config, TINY, np.random.default_rng(3))
    rng = np.random.default_rng(4)
    pairs = {k: LoraPair(p.a, rng.standard_normal(p.b.shape)) for k, p in weights.pairs.items()}
    weights = replace(weights, pairs=pairs)
    save_peft(weights, tmp_path)
    modules = peft_modules(peft.PeftModel.from_pretrained(hf_llama(), str(tmp_path)))
    assert modules.keys() == weights.pairs.keys()
    for key, (a, b, scaling) in weights.factors().items():
        expected = modules[key].get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(scaling * b @ a, expected, rtol=1e-5, atol=1e-6)


# ---- values


def test_a_new_adapter_starts_as_peft_starts_it_and_changes_nothing():
    config = lora.new_config(rank=3, alpha=6, target_modules=["q_proj", "down_proj"])
    weights = lora.initial(config, TINY, np.random.default_rng(0))
    assert weights.pairs.keys() == {(layer, member) for layer in (0, 1) for member in ("q_proj", "down_proj")}
    for (_, member), pair in weights.pairs.items():
        bound = 1 / math.sqrt(member_dims(TINY)[member][0])
        assert not pair.b.any()
        assert bound / 2 < np.abs(pair.a).max() <= bound


def test_new_ia3_and_dora_adapters_change_nothing_when_peft_reads_them(tmp_path):
    peft = pytest.importorskip("peft")
    import torch

    model = hf_llama()
    norms = {
        (layer, "q_proj"): torch.linalg.norm(block.self_attn.q_proj.weight, dim=1).detach().numpy()
        for layer, block in enumerate(model.model.layers)
    }
    dora_config = lora.new_config(rank=4, alpha=8, target_modules=["q_proj"], use_dora=True)
    save_peft(ia3.initial(ia3_config(), TINY), tmp_path / "ia3")
    save_peft(dora.initial(dora_config, TINY, np.random.default_rng(0), norms), tmp_path / "dora")
    tokens = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        base = model(tokens).logits
        for name in ("ia3", "dora"):
            adapted = peft.PeftModel.from_pretrained(hf_llama(), str(tmp_path / name)).eval()
            assert len(peft_modules(adapted)) > 0
            torch.testing.assert_close(adapted(tokens).logits, base, rtol=1e-5, atol=1e-5)
            assert load_peft(tmp_path / name, TINY).method == name


def test_round_trip_keeps_content_digest_stored_dtype_and_base(tmp_path):
    for number, dtype in enumerate([np.float32, np.float16, ml_dtypes.bfloat16]):
        write_adapter(tmp_path / f"in{number}", dtype=dtype, seed=number)
        weights = replace(load_peft(tmp_path / f"in{number}", TINY), base_digest=b"\x01\x02")
        save_peft(weights, tmp_path / f"out{number}")
        again = load_peft(tmp_path / f"out{number}", TINY, base_digest=b"\x01\x02")
        assert again.digest == weights.digest
        assert again.stored == np.dtype(dtype).name
        assert again.base_digest == b"\x01\x02"
        assert again.nbytes == weights.nbytes == 2 * 4 * 4 * (32 + 32 + 32 + 16)


def test_what_is_trained_from_half_precision_is_saved_in_full(tmp_path):
    start = load_peft(write_adapter(tmp_path / "start", dtype=ml_dtypes.bfloat16), TINY)
    members = ("q_proj", "v_proj")
    masters = {
        m: {"a": np.stack([start.pairs[layer, m].a for layer in range(2)]), "b": np.full((2, size, 4), 1 / 3)}
        for m, size in zip(members, (32, 16), strict=True)
    }
    trained = weights_of(masters, start)
    save_peft(trained, tmp_path / "trained")
    assert load_peft(tmp_path / "trained", TINY).digest == trained.digest


def test_digest_changes_with_whatever_changes_the_maths_and_with_nothing_else(tmp_path):
    tensors = random_tensors(lora_config())

    def digest(name, tensors=tensors, **options):
        return load_peft(write_files(tmp_path / name, lora_config(**options), tensors), TINY).digest

    same = digest("same")
    assert digest("where it came from", base_model_name_or_path="x", lora_dropout=0.5, revision="y") == same
    assert digest("another way to say it", target_modules=r".*\.[qv]_proj", lora_alpha=8.0) == same
    other = {**tensors, A0: tensors[A0] + np.float32(1e-6)}
    different = [same, digest("alpha", lora_alpha=9), digest("rslora", use_rslora=True), digest("tensor", other)]
    assert len(set(different)) == 4


def test_weights_cannot_be_written_through(tmp_path):
    weights = load_peft(write_adapter(tmp_path), TINY)
    with pytest.raises(ValueError, match="read-only"):
        weights.pairs[0, "q_proj"].a[0, 0] = 1.0


def test_mixed_dtypes_are_kept_exactly_as_float32(tmp_path):
    tensors = random_tensors(lora_config())
    tensors[B0] = tensors[B0].astype(np.float16)
    weights = load_peft(write_files(tmp_path, lora_config(), tensors), TINY)
    assert weights.stored == "float32"
    assert np.array_equal(weights.pairs[0, "q_proj"].b, tensors[B0].astype(np.float32))


def test_the_largest_rank_that_an_engine_takes_can_be_read(tmp_path):
    largest = next(part.le for part in LoraOptions.model_fields["max_lora_rank"].metadata if hasattr(part, "le"))
    path = write_adapter(tmp_path / "wide", r=largest)
    assert load_peft(path, TINY, max_rank=largest).rank == largest
    assert refusal(write_adapter(tmp_path / "wider", r=largest + 1)).field == "r"


def test_members_are_the_models_linear_layers():
    assert set(MEMBERS) == set(member_dims(TINY))


def test_a_save_cut_short_leaves_a_directory_that_is_refused_not_a_mixture(tmp_path, monkeypatch):
    save_peft(load_peft(write_adapter(tmp_path / "one", seed=1), TINY), tmp_path / "out")
    other = load_peft(write_adapter(tmp_path / "two", seed=2, lora_alpha=3), TINY)
    real, calls = os.replace, []

    def fail_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(OSError, match="disk full"):
        save_peft(other, tmp_path / "out")
    assert refusal(tmp_path / "out").field == CONFIG
    monkeypatch.undo()
    save_peft(other, tmp_path / "out")
    assert load_peft(tmp_path / "out", TINY).digest == other.digest


# ---- the directory (L01)


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket must be short
        try:
            sock.bind(path.name)
        finally:
            os.chdir(here)


SPECIAL = {
    "fifo": make_fifo,
    "socket": make_socket,
    "directory": lambda path: path.mkdir(),
    "device": lambda path: os.symlink("/dev/zero", path),
    "loop": lambda path: os.symlink(path.name, path),
    "dangling link": lambda path: os.symlink("nowhere", path),
}


def in_time(work, seconds=5.0):
    """Runs ``work`` in a thread and fails if it blocks."""
    result = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "blocked"
    return result[0]


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_files_that_are_no_regular_files_are_refused_without_blocking(tmp_path, make, name):
    write_adapter(tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    error = in_time(lambda: refusal(tmp_path))
    assert error.field == name
    assert "not a regular file" in str(error)


@pytest.mark.parametrize("make", [make_fifo, SPECIAL["device"]], ids=["fifo", "device"])
def test_a_file_swapped_after_the_check_is_neither_followed_nor_waited_for(tmp_path, monkeypatch, make):
    write_adapter(tmp_path)
    regular, real = os.stat(tmp_path / CONFIG), os.stat
    (tmp_path / TENSORS).unlink()
    make(tmp_path / TENSORS)
    monkeypatch.setattr(os, "stat", lambda path, **options: regular if path == TENSORS else real(path, **options))
    assert in_time(lambda: refusal(tmp_path)).field == TENSORS


@pytest.mark.parametrize("make", [make for kind, make in SPECIAL.items() if kind != "directory"])
def test_paths_that_are_no_directories_are_refused_without_blocking(tmp_path, make):
    make(tmp_path / "adapter")
    assert in_time(lambda: refusal(tmp_path / "adapter")).field == "path"


def test_a_missing_directory_a_file_and_a_linked_directory_are_refused_by_name(tmp_path):
    assert "does not exist" in str(refusal(tmp_path / "no"))
    write_adapter(tmp_path / "real")
    assert "not a directory" in str(refusal(tmp_path / "real" / CONFIG))
    os.symlink(tmp_path / "real", tmp_path / "link")
    assert "symbolic link" in str(refusal(tmp_path / "link"))
    assert "symbolic link" in str(refusal(str(tmp_path / "link") + "/"))
    for odd in ("a\0b", "x" * 5000, "\udcff"):
        assert refusal(tmp_path / odd).field == "path"


def test_a_linked_file_is_refused_even_when_its_target_is_good(tmp_path):
    write_adapter(tmp_path / "real")
    write_adapter(tmp_path / "other")
    (tmp_path / "other" / TENSORS).unlink()
    os.symlink(tmp_path / "real" / TENSORS, tmp_path / "other" / TENSORS)
    assert "symbolic link" in str(refusal(tmp_path / "other"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", [CONFIG, TENSORS, "."])
def test_what_may_not_be_read_is_refused_by_name(tmp_path, name):
    write_adapter(tmp_path / "a")
    os.chmod(tmp_path / "a" / name, 0)
    try:
        assert "denied" in str(refusal(tmp_path / "a"))
    finally:
        os.chmod(tmp_path / "a" / name, 0o700)


def test_a_device_node_is_refused(tmp_path):
    write_adapter(tmp_path)
    (tmp_path / TENSORS).unlink()
    try:
        os.mknod(tmp_path / TENSORS, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except OSError:
        pytest.skip("device nodes need privileges")
    assert "a device" in str(in_time(lambda: refusal(tmp_path)))


def test_only_the_two_files_are_ever_opened_among_many(tmp_path):
    write_adapter(tmp_path)
    for index in range(500):
        (tmp_path / f"file{index}").touch()
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin", "README.md", "auto_map.py"):
        (tmp_path / name).write_bytes(pickle.dumps({"no": "thing"}))
    opened, watching = [], [True]

    def hook(event, args):
        if watching[0] and event in (
            "open",
            "exec",
            "subprocess.Popen",
            "pickle.find_class",
            "socket.connect",
            "os.listdir",
            "os.scandir",
        ):
            opened.append((event, str(args[0])))

    sys.addaudithook(hook)
    try:
        load_peft(tmp_path, TINY)
    finally:
        watching[0] = False
    assert {name for event, name in opened if event == "open" and not name.isdigit()} == {
        str(tmp_path),
        CONFIG,
        TENSORS,
    }
    assert {event for event, _ in opened} == {"open"}


# ---- adapter_config.json (L02)

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


# ---- adapter_model.safetensors (L03, L04, L05, L06)


def container(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def header_of(raw):
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def good_bytes():
    return safetensors.numpy.save(random_tensors(lora_config()), {"format": "pt"})


def edited(edit):
    """The good file with its header changed by ``edit(header)``, which may return the new one."""
    header, data = header_of(good_bytes())
    return container(edit(header) or header, data)


def entry(header, name=A0, **changes):
    header[name].update(changes)


def duplicated():
    header, data = header_of(good_bytes())
    again = json.dumps({A0: header[A0]})[1:]
    return container((json.dumps(header)[:-1] + ", " + again).encode(), data)


def shifted(header):
    """Two tensors of equal size in the same place: an overlap and a hole."""
    first = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    header[first]["data_offsets"] = list(header[A0]["data_offsets"])


def renamed(header, old, new):
    header[new] = header.pop(old)


def empty_tensors(count):
    return container({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)})


BAD_CONTAINERS = {
    "0 bytes": lambda: b"",
    "7 bytes": lambda: bytes(7),
    "header of 2**63": lambda: struct.pack("<Q", 2**63) + b"{}",
    "header of 2**64-1": lambda: b"\xff" * 8 + b"{}",
    "header past the end": lambda: struct.pack("<Q", 1000) + b"{}",
    "header of 20 MB": lambda: container(b"{" + b" " * 20_000_000 + b"}"),
    "truncated": lambda: good_bytes()[:-1],
    "half": lambda: good_bytes()[:2000],
    "trailing byte": lambda: good_bytes() + b"\0",
    "overlap and hole": lambda: edited(shifted),
    "offsets past the end": lambda: edited(lambda h: entry(h, data_offsets=[10**9, 10**9 + 512])),
    "offsets swapped": lambda: edited(lambda h: entry(h, data_offsets=h[A0]["data_offsets"][::-1])),
    "negative offset": lambda: edited(lambda h: entry(h, data_offsets=[-512, 0])),
    "three offsets": lambda: edited(lambda h: entry(h, data_offsets=[0, 1, 2])),
    "overflowing shape": lambda: edited(lambda h: entry(h, shape=[2**62, 2**62])),
    "negative shape": lambda: edited(lambda h: entry(h, shape=[-1, 32])),
    "float shape": lambda: edited(lambda h: entry(h, shape=[4.0, 32])),
    "true in a shape": lambda: edited(lambda h: entry(h, shape=[True, 32])),
    "text shape": lambda: edited(lambda h: entry(h, shape="4x32")),
    "unknown dtype": lambda: edited(lambda h: entry(h, dtype="F33")),
    "list dtype": lambda: edited(lambda h: entry(h, dtype=["F32"])),
    "no dtype": lambda: edited(lambda h: h[A0].pop("dtype") and None),
    "extra key": lambda: edited(lambda h: entry(h, offset=1)),
    "entry is a list": lambda: edited(lambda h: h | {A0: []}),
    "metadata is text": lambda: edited(lambda h: h | {"__metadata__": "pt"}),
    "base digest is no hex": lambda: edited(lambda h: h | {"__metadata__": {"jaxserve.base_digest": "zz"}}),
    "header is a list": lambda: container(b"[]"),
    "header is deep": lambda: container(b'{"a":' * 2000 + b"}" * 2000),
    "header is not JSON": lambda: container(b"nonsense"),
    "header is not UTF-8": lambda: container(b'{"\xff": 1}'),
    "nothing inside": lambda: container({}),
    "duplicate names": duplicated,
    "300k tensors": lambda: empty_tensors(300_000),
    "5k tensors": lambda: empty_tensors(5_000),
    "200k empty objects": lambda: container(b'{"":' + b",".join([b"{}"] * 200_000) + b"}"),
    "pickle": lambda: pickle.dumps(random_tensors(lora_config())),
    "zip as torch writes": lambda: b"PK\x03\x04" + bytes(500),
    "numpy": lambda: b"\x93NUMPY" + bytes(500),
}


@pytest.mark.parametrize("make", BAD_CONTAINERS.values(), ids=BAD_CONTAINERS)
def test_a_damaged_or_hostile_tensor_file_is_refused_quickly(tmp_path, make):
    write_files(tmp_path, lora_config(), make())
    start = time.process_time()
    assert TENSORS in str(refusal(tmp_path))
    assert time.process_time() - start < 0.25


def test_every_truncation_of_a_file_is_refused(tmp_path):
    raw = good_bytes()
    for size in range(0, len(raw), 97):
        assert TENSORS in str(refusal(write_files(tmp_path, lora_config(), raw[:size])))


def with_tensor(name, change):
    tensors = random_tensors(lora_config())
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    return tensors


def set_one(value):
    def change(x):
        x = x.copy()
        x.flat[3] = value
        return x

    return change


def without(*names):
    return {name: tensor for name, tensor in random_tensors(lora_config()).items() if name not in names}


def plus(name, shape=(4, 32)):
    return random_tensors(lora_config()) | {name: np.zeros(shape, np.float32)}


PREFIX = "base_model.model.model.layers"
BAD_TENSORS = {
    "nan": (with_tensor(A0, set_one(np.nan)), A0, "NaN or infinity"),
    "infinity": (with_tensor(B0, set_one(-np.inf)), B0, "NaN or infinity"),
    "1e38": (with_tensor(A0, set_one(1e38)), A0, "1e+38"),
    "-20000": (with_tensor(A0, set_one(-20000)), A0, "at most 1e+04"),
    "half-precision infinity": (
        with_tensor(A0, lambda x: set_one(np.inf)(x.astype(np.float16))),
        A0,
        "NaN or infinity",
    ),
    "float64": (with_tensor(A0, lambda x: x.astype(np.float64)), A0, "F64"),
    "int32": (with_tensor(A0, lambda x: x.astype(np.int32)), A0, "I32"),
    "uint8": (with_tensor(A0, lambda x: x.astype(np.uint8)), A0, "U8"),
    "bool": (with_tensor(A0, lambda x: x > 0), A0, "BOOL"),
    "zero rows": (with_tensor(A0, lambda x: x[:0]), A0, "holds nothing"),
    "transposed": (with_tensor(A0, lambda x: x.T), A0, "transposed"),
    "one rank less": (with_tensor(A0, lambda x: x[:3]), A0, "[3, 32], expected [4, 32]"),
    "flat": (with_tensor(A0, lambda x: x.reshape(-1)), A0, "[128], expected [4, 32]"),
    "three dimensions": (with_tensor(A0, lambda x: x[None]), A0, "[1, 4, 32], expected [4, 32]"),
    "A without B": (without(B0), B0, "missing"),
    "B without A": (without(A0), A0, "missing"),
    "nothing": ({"x": np.zeros(1, np.float32)}, "x", "not expected"),
    "layer of its own": (
        plus(f"{PREFIX}.2.self_attn.q_proj.lora_A.weight"),
        None,
        "layer 2, the model has layers 0 to 1",
    ),
    "layer -1": (plus(f"{PREFIX}.-1.self_attn.q_proj.lora_A.weight"), None, "not expected"),
    "layer 01": (plus(f"{PREFIX}.01.self_attn.q_proj.lora_A.weight"), None, "not among"),
    "module not targeted": (plus(f"{PREFIX}.0.self_attn.k_proj.lora_A.weight"), None, "not among what target_modules"),
    "adapter name in the key": (plus(f"{PREFIX}.0.self_attn.q_proj.lora_A.default.weight"), None, "not among"),
    "bias": (plus(f"{PREFIX}.0.self_attn.q_proj.lora_B.bias", (32,)), None, "not among"),
    "magnitude without use_dora": (
        plus(f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector", (32,)),
        None,
        "not among",
    ),
    "lm_head": (plus("base_model.model.lm_head.lora_A.weight"), None, "lm_head and embed_tokens are not supported"),
    "embedding": (plus("base_model.model.model.embed_tokens.lora_embedding_A"), None, "not supported"),
    "path": (plus("../../x"), "../../x", "not expected"),
    "absolute path": (plus("/etc/passwd"), None, "not expected"),
    "very long name": (plus("x" * 100_000), None, "not expected"),
    "another architecture": (plus("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"), None, "not expected"),
}


@pytest.mark.parametrize("case", BAD_TENSORS, ids=str)
def test_tensors_that_are_not_what_the_configuration_asks_for_are_refused_by_name(tmp_path, case):
    tensors, field, says = BAD_TENSORS[case]
    error = refusal(write_files(tmp_path, lora_config(), tensors))
    assert says in str(error)
    assert field is None or error.field == field


def test_swapped_a_and_b_are_refused(tmp_path):
    tensors = random_tensors(lora_config())
    tensors[A0], tensors[B0] = tensors[B0], tensors[A0]
    error = refusal(write_files(tmp_path, lora_config(), tensors))
    assert "expected [4, 32]" in str(error)


def test_swapped_a_and_b_show_unless_both_are_square(tmp_path):
    config = lora_config(r=32, target_modules=["v_proj"])
    tensors = random_tensors(config)
    a = f"{PREFIX}.0.self_attn.v_proj.lora_A.weight"
    b = f"{PREFIX}.0.self_attn.v_proj.lora_B.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]
    assert "expected [32, 32]" in str(refusal(write_files(tmp_path, config, tensors)))


def test_targets_without_tensors_are_refused_rather_than_ignored(tmp_path):
    write_files(tmp_path, lora_config(target_modules=["q_proj", "v_proj", "up_proj"]), random_tensors(lora_config()))
    error = refusal(tmp_path)
    assert "up_proj" in str(error)
    assert "missing" in str(error)
    assert "and 3 more" in str(error)


def test_a_pickle_beside_nothing_is_refused_unopened(tmp_path):
    write_adapter(tmp_path)
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    error = refusal(tmp_path)
    assert error.field == "adapter_model.bin"
    assert "pickle" in str(error)
    os.chmod(tmp_path / "adapter_model.bin", 0)
    assert refusal(tmp_path).field == "adapter_model.bin"


def test_random_damage_never_gets_past_as_another_error(tmp_path):
    raw = good_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    good = load_peft(write_files(tmp_path, lora_config(), raw), TINY).digest
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(raw)
        damaged[int(rng.integers(0, size + 8))] = int(rng.integers(0, 256))
        write_files(tmp_path, lora_config(), bytes(damaged))
        with contextlib.suppress(AdapterError):
            assert load_peft(tmp_path, TINY).digest == good  # only white space or metadata changed
