"""Weights: placement over shards, casts, names, and what is refused before anything is allocated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

from jaxserve.errors import ModelError
from jaxserve.models import loader
from jaxserve.models.loader import (
    check_tokenizer,
    dummy_params,
    load_config,
    load_params,
    stored_dtype,
    weights_fingerprint,
)
from jaxserve.models.params import padded_vocab
from jaxserve.tokenizer import load_tokenizer
from sharding import make_mesh

Q, K, V = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}


def load(directory, tp=1, dtype="float32"):
    return load_params(directory, load_config(directory), make_mesh(tp), dtype)


def shards(array):
    """What each device of the mesh holds, in mesh order."""
    order = {device: i for i, device in enumerate(array.sharding.mesh.devices.flat)}
    return [np.asarray(shard.data) for shard in sorted(array.addressable_shards, key=lambda s: order[s.device])]


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_shard_holds_its_rows_of_each_projection(tmp_path, tp):
    directory = tiny_models.build(tmp_path, "qwen2", tokenizer=False, **WIDE)
    stored = load_file(tmp_path / "model.safetensors")
    layer = load(directory, tp)["layers"][1]
    heads, C = 8 // tp, 8
    for shard in range(tp):
        first_kv, kv_heads = shard * 2 // tp, max(2 // tp, 1)  # with more shards than heads, neighbours share one
        q, kv = slice(shard * heads * C, (shard + 1) * heads * C), slice(first_kv * C, (first_kv + kv_heads) * C)
        expected = np.concatenate([stored[Q][q], stored[K][kv], stored[V][kv]])
        np.testing.assert_array_equal(shards(layer["qkv_proj"])[shard], expected)
        bias = [stored[name.replace("weight", "bias")][rows] for name, rows in ((Q, q), (K, kv), (V, kv))]
        np.testing.assert_array_equal(shards(layer["qkv_bias"])[shard], np.concatenate(bias))
        np.testing.assert_array_equal(
            shards(layer["o_proj"])[shard], stored["model.layers.1.self_attn.o_proj.weight"][:, q]
        )
        ffn = slice(shard * 96 // tp, (shard + 1) * 96 // tp)
        gate, up = (stored[f"model.layers.1.mlp.{name}_proj.weight"][ffn] for name in ("gate", "up"))
        np.testing.assert_array_equal(shards(layer["gate_up_proj"])[shard], np.concatenate([gate, up]))
        np.testing.assert_array_equal(
            shards(layer["down_proj"])[shard], stored["model.layers.1.mlp.down_proj.weight"][:, ffn]
        )
        np.testing.assert_array_equal(
            shards(layer["input_norm"])[shard], stored["model.layers.1.input_layernorm.weight"]
        )


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("vocab_size", [300, 257, 8])
def test_the_vocabulary_is_padded_with_zero_rows(tmp_path, tp, vocab_size):
    directory = tiny_models.build(tmp_path, tokenizer=False, vocab_size=vocab_size, **WIDE)
    stored = load_file(tmp_path / "model.safetensors")
    params = load(directory, tp)
    for ours, theirs in ((params["embed"], "model.embed_tokens.weight"), (params["lm_head"], "lm_head.weight")):
        assert ours.shape == (padded_vocab(vocab_size, tp), 64)
        assert ours.shape[0] % (8 * tp) == 0
        np.testing.assert_array_equal(ours[:vocab_size], stored[theirs])
        assert not np.any(ours[vocab_size:])


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_checkpoint_in_several_files_is_the_same_model(tmp_path, family):
    one = tiny_models.build(tmp_path / "one", family, tokenizer=False)
    many = tiny_models.build(tmp_path / "many", family, tokenizer=False, num_shards=3)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 3
    assert_trees_equal(load(one), load(many))


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
def test_names_may_carry_any_of_the_prefixes_that_transformers_writes(tmp_path, prefix):
    rename = lambda name: name.replace("model.", prefix, 1)  # noqa: E731
    standard = tiny_models.build(tmp_path / "a", tokenizer=False)
    assert_trees_equal(load(standard), load(tiny_models.build(tmp_path / "b", tokenizer=False, rename=rename)))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_weights_of_any_float_dtype_are_cast_to_the_chosen_one(tmp_path, stored, wanted):
    directory = tiny_models.build(tmp_path, tokenizer=False, dtype=stored)
    theirs = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    ours = load(directory, dtype=wanted)
    assert theirs.dtype == stored
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours)} == {wanted}
    np.testing.assert_array_equal(np.asarray(ours["embed"][:300]), theirs.astype(wanted))


@pytest.mark.parametrize(
    ("named", "stored"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"text_config": {"torch_dtype": "float16"}}, "float16"),
        ({"dtype": "float64"}, "float32"),
        ({"text_config": None}, "bfloat16"),
    ],
    ids=str,
)
def test_the_own_dtype_is_that_of_the_config_or_else_of_the_weights(tmp_path, named, stored):
    tiny_models.build(tmp_path, tokenizer=False, dtype="bfloat16", num_shards=2)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config | named))
    assert stored_dtype(tmp_path) == stored


def test_without_weights_and_a_named_dtype_it_is_float32(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert stored_dtype(tmp_path) == "float32"


def test_a_tied_model_has_no_head_and_may_store_an_equal_one(tmp_path):
    def copy_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    directory = tiny_models.build(tmp_path, tokenizer=False, tie_word_embeddings=True, edit=copy_head)
    assert "lm_head" not in load(directory)


def test_a_tied_model_may_store_its_embedding_as_the_head(tmp_path):
    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    usual = tiny_models.build(tmp_path / "a", tokenizer=False, tie_word_embeddings=True)
    other = tiny_models.build(tmp_path / "b", tokenizer=False, tie_word_embeddings=True, edit=rename)
    np.testing.assert_array_equal(load(other)["embed"], load(usual)["embed"])
    assert weights_fingerprint(other, load_config(other)) == weights_fingerprint(usual, load_config(usual))


def test_tensors_that_hold_no_weights_of_ours_are_ignored(tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    load(tiny_models.build(tmp_path / "a", tokenizer=False, edit=add))
    load(tiny_models.build(tmp_path / "b", "gemma3_multimodal", tokenizer=False))


def test_links_to_weights_are_followed(tmp_path):
    directory = tiny_models.build(tmp_path, tokenizer=False)
    os.rename(tmp_path / "model.safetensors", tmp_path / "blob")
    os.symlink("blob", tmp_path / "model.safetensors")
    load(directory)


def set_tensor(name, value):
    def edit(tensors):
        tensors[name] = value(tensors.get(name)) if callable(value) else value

    return edit


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def poison(value):
    def change(tensor):
        tensor = tensor.copy()
        tensor[3, 5] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (drop(K), f"{K} is missing"),
        (drop(K, V, "model.norm.weight"), "(and 2 others)"),
        (drop("lm_head.weight"), "lm_head.weight is missing"),
        (set_tensor("model.layers.2.mlp.up_proj.weight", np.ones((96, 64))), "is not part of this architecture"),
        (set_tensor("model.layers.1.self_attn.q_proj.bias", np.ones(64)), "q_proj.bias is not part of"),
        (set_tensor(Q, lambda q: q[:-1]), f"{Q} has shape [63, 64], expected [64, 64]"),
        (set_tensor(Q, lambda q: q[None]), f"{Q} has shape [1, 64, 64]"),
        (set_tensor("model.embed_tokens.weight", lambda e: e[:0]), "has shape [0, 64], expected [300, 64]"),
    ],
)
def test_wrong_tensors_are_refused_before_any_array_is_made(tmp_path, monkeypatch, edit, said):
    directory = tiny_models.build(tmp_path, tokenizer=False, edit=edit)
    monkeypatch.setattr(loader, "_load_one", lambda *_: pytest.fail("an array was made"))
    with pytest.raises(ModelError) as caught:
        load(directory)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    directory = tiny_models.build(tmp_path, tokenizer=False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[Q] = tensors[Q].astype(np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="has dtype I8; supported: F64, F32, F16, BF16"):
        load(directory)


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, "float32"), (np.inf, "float32"), (-np.inf, "bfloat16"), (1e38, "float16")]
)
@pytest.mark.parametrize("name", [V, "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"])
def test_weights_that_are_not_finite_in_the_chosen_dtype_are_refused(tmp_path, name, value, dtype):
    directory = tiny_models.build(tmp_path, tokenizer=False, edit=set_tensor(name, poison(value)))
    with pytest.raises(ModelError, match=f"is not finite in {dtype}"):
        load(directory, dtype=dtype)


def test_a_head_that_differs_from_a_tied_embedding_is_refused(tmp_path):
    head = set_tensor("lm_head.weight", np.zeros((300, 64)))
    directory = tiny_models.build(tmp_path, tokenizer=False, tie_word_embeddings=True, edit=head)
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(directory)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": np.zeros((300, 64), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight has dtype I8; supported"):
        load(directory)


def test_a_directory_without_safetensors_is_refused(tmp_path):
    directory = tiny_models.build(tmp_path, tokenizer=False)
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(directory)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
        load(directory)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "x.bin",
        "sub/../m.safetensors",
        None,
        "m\0.safetensors",
        "m\ud800.safetensors",
    ],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, name):
    directory = tiny_models.build(tmp_path, tokenizer=False, num_shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="is not the name of a safetensors file in this directory"):
        load(directory)


def test_an_index_without_a_map_or_with_a_missing_file_is_refused(tmp_path):
    directory = tiny_models.build(tmp_path, tokenizer=False, num_shards=2)
    os.remove(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: No such file"):
        load(directory)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="weight_map is missing"):
        load(directory)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
def test_a_file_that_is_none_is_refused_without_blocking(tmp_path, make):
    directory = tiny_models.build(tmp_path, tokenizer=False)
    os.remove(tmp_path / "model.safetensors")
    make(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: not a regular file"):
        load(directory)


def damaged(good, kind):
    """Bytes of a safetensors file with one thing wrong."""
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def with_header(text):
        data = text.encode()
        return len(data).to_bytes(8, "little") + data + good[8 + length :]

    if kind == "overlap":
        header[Q]["data_offsets"] = header[K]["data_offsets"]
    if kind == "negative":
        header[Q]["shape"] = [-64, -64]
    if kind == "overflow":
        header[Q]["shape"] = [2**40, 2**40]
    if kind == "dtype":
        header[Q]["dtype"] = "F33"
    return {
        "empty": b"",
        "huge header": (2**63).to_bytes(8, "little") + good[8:],
        "header past the end": (len(good) * 2).to_bytes(8, "little") + good[8:],
        "truncated": good[:-100],
        "trailing bytes": good + b"x",
        "pickle": b"\x80\x04K\x01." + b"\0" * 100,
        "deep json": with_header("[" * 100_000),
        "duplicate name": with_header(json.dumps(header)[:-1] + f', "{K}": {json.dumps(header[K])}}}'),
    }.get(kind, with_header(json.dumps(header)))


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "huge header",
        "header past the end",
        "truncated",
        "trailing bytes",
        "pickle",
        "deep json",
        "overlap",
        "negative",
        "overflow",
        "dtype",
        "duplicate name",
    ],
)
def test_a_damaged_safetensors_file_is_refused_in_one_line(tmp_path, kind):
    directory = tiny_models.build(tmp_path, tokenizer=False)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(ModelError) as caught:
        load(directory)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_one_tensor_under_two_names_is_refused(tmp_path):
    directory = tiny_models.build(tmp_path, tokenizer=False, edit=set_tensor("norm.weight", np.ones(64, np.float32)))
    with pytest.raises(ModelError, match="is stored twice"):
        load(directory)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    directory = tiny_models.build(tmp_path, vocab_size=tiny_models.TOKENIZER_SIZE)
    check_tokenizer(load_config(directory), load_tokenizer(directory))
    small = tiny_models.build(tmp_path, vocab_size=tiny_models.TOKENIZER_SIZE - 1)
    said = f"larger than the embedding: token '<|im_end|>' has id {tiny_models.IM_END}, vocab_size is 283"
    with pytest.raises(ModelError) as caught:
        check_tokenizer(load_config(small), load_tokenizer(small))
    assert said in str(caught.value)


def test_gemma3_may_know_an_image_token_without_a_row(tmp_path):
    directory = tiny_models.build(tmp_path, "gemma3", vocab_size=tiny_models.TOKENIZER_SIZE)
    tiny_models.build_tokenizer(directory, extra_tokens=("<image_soft_token>",))
    check_tokenizer(load_config(directory), load_tokenizer(directory))


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_dummy_weights_are_the_same_model_for_any_number_of_shards(tmp_path, family):
    config = load_config(tiny_models.build(tmp_path, family, tokenizer=False, **WIDE))
    whole, split = (dummy_params(config, make_mesh(tp), "float32", seed=3) for tp in (1, 4))
    other = dummy_params(config, make_mesh(1), "float32", seed=4)
    q = np.concatenate([shard[:16] for shard in shards(split["layers"][1]["qkv_proj"])])
    np.testing.assert_array_equal(q, whole["layers"][1]["qkv_proj"][:64])
    k = [shard[16:24] for shard in shards(split["layers"][1]["qkv_proj"])]
    np.testing.assert_array_equal(k[0], k[1])  # two shards share a head
    np.testing.assert_array_equal(np.concatenate([k[0], k[2]]), whole["layers"][1]["qkv_proj"][64:80])
    np.testing.assert_array_equal(split["layers"][0]["down_proj"], whole["layers"][0]["down_proj"])
    np.testing.assert_array_equal(split["embed"][:300], whole["embed"][:300])
    assert not np.any(split["embed"][300:])
    assert not np.array_equal(other["embed"], whole["embed"])
    assert np.std(whole["embed"][:300]) == pytest.approx(0.02, rel=0.05)


def test_dummy_weights_have_the_shapes_and_shardings_of_loaded_ones(tmp_path):
    directory = tiny_models.build(tmp_path, "qwen3", tokenizer=False, **WIDE)
    config, mesh = load_config(directory), make_mesh(2)
    loaded, dummy = load_params(directory, config, mesh, "bfloat16"), dummy_params(config, mesh, "bfloat16")
    describe = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
    assert jax.tree.map(describe, loaded) == jax.tree.map(describe, dummy)
    assert loaded["embed"].dtype == ml_dtypes.bfloat16


MEASURE = """
import resource, sys
import jax
from jaxserve.models.loader import load_config, load_params
from sharding import make_mesh

directory, dtype = sys.argv[1:]
config, mesh = load_config(directory), make_mesh(2)
jax.block_until_ready(jax.device_put(1.0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
params = load_params(directory, config, mesh, dtype)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_loading_holds_little_more_than_the_arrays(tmp_path, stored, wanted):
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 16_000, "num_hidden_layers": 2}
    directory = tiny_models.build(tmp_path, tokenizer=False, dtype=stored, num_shards=2, **sizes)
    largest = max(np.prod(shape) for shape in tiny_models.tensor_shapes(tiny_models.config_dict(**sizes)).values()) * 4
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, directory, wanted],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    peak, arrays = map(int, done.stdout.split())
    assert arrays > 250e6
    assert peak < arrays + largest + 150e6


def test_the_fingerprint_is_the_weights_own(tmp_path):
    path = tiny_models.build(tmp_path / "m", "llama", tokenizer=False)
    config = load_config(path)
    before = weights_fingerprint(path, config)
    assert weights_fingerprint(tiny_models.build(tmp_path / "same", "llama", tokenizer=False), config) == before
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert weights_fingerprint(path, config) != before
