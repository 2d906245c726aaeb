"""PEFT directories in and out: what is read is what PEFT computes, and comes back as it was."""

import json
import math
import os
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from tiny_adapters import (
    CONFIG,
    TENSORS,
    TINY,
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
from jaxserve.models.config import member_dims

A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


# what PEFT writes, we read as PEFT means it

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


# values


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
