"""adapter_model.safetensors: what is not exactly what the configuration asks for is refused by name (L03 to L06)."""

import contextlib
import json
import os
import pickle
import struct
import time

import numpy as np
import pytest
import safetensors.numpy
from tiny_adapters import (
    TENSORS,
    TINY,
    lora_config,
    random_tensors,
    refusal,
    write_adapter,
    write_files,
)

from jaxserve.adapters.peft_io import load_peft
from jaxserve.errors import AdapterError

A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


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
