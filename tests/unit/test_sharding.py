"""The mesh, the table of axes, and where adapters follow from where their base matrix is."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.engine.compiles import CompileCounter
from sharding import (
    RULES,
    ArraySpec,
    lora_specs,
    make_mesh,
    matmul_state,
    named_sharding,
    partition_spec,
    place_adapter,
    tree_shardings,
    tree_specs,
    zeros,
)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_mesh_takes_the_first_devices(size):
    mesh = make_mesh(size)
    assert mesh.axis_names == ("tensor",)
    assert list(mesh.devices.flat) == jax.devices()[:size]


@pytest.mark.parametrize(
    ("flags", "first", "expected"), [("", 3, 3), ("--xla_force_host_platform_device_count=4", 3, 4), ("", 1, 1)]
)
def test_a_cpu_is_split_into_the_devices_asked_for_unless_the_flag_says_how_many(flags, first, expected):
    code = f"from sharding import make_mesh; import jax; make_mesh({first}); print(len(jax.devices()))"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == [str(expected)]


@pytest.mark.parametrize("size", [0, -1, 9])
def test_a_mesh_of_other_sizes_is_refused(size):
    with pytest.raises(ValueError, match=f"tensor_parallel {size} must be between 1 and the 8 devices present"):
        make_mesh(size)


def test_a_cpu_that_is_in_use_is_not_split_and_the_error_says_why():
    with pytest.raises(ValueError, match="the 1 devices present; a CPU is split only at JAX's first use in a process"):
        make_mesh(2, jax.devices()[:1])


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ((), PartitionSpec()),
        (("heads", "embed"), PartitionSpec("tensor", None)),
        (("embed", "ffn"), PartitionSpec(None, "tensor")),
        ((None, "vocab"), PartitionSpec(None, "tensor")),
    ],
)
def test_logical_axes_become_mesh_axes(axes, expected):
    assert partition_spec(axes) == expected


def test_an_axis_outside_the_table_is_refused_by_name():
    with pytest.raises(ValueError, match="logical axis 'experts' is not in"):
        partition_spec(("experts", None))


def test_one_mesh_axis_is_not_used_twice():
    with pytest.raises(ValueError, match="map one mesh axis twice"):
        partition_spec(("heads", "ffn"))


def test_trees_of_specs_map_leaf_by_leaf():
    tree = {"a": ArraySpec((8, 4), ("heads", "embed")), "b": [ArraySpec((4,), (None,))]}
    assert tree_specs(tree) == {"a": PartitionSpec("tensor", None), "b": [PartitionSpec(None)]}
    mesh = make_mesh(4)
    shardings = tree_shardings(mesh, tree)
    assert shardings["a"] == named_sharding(mesh, ("heads", "embed"))
    array = jax.device_put(np.zeros((8, 4), np.float32), shardings["a"])
    assert [shard.data.shape for shard in array.addressable_shards] == [(2, 4)] * 4


def compute(x_state, w_state, shards=4):
    """What the devices hold after x W^T, and what they ought to hold together."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 8)), rng.standard_normal((12, 8))
    if x_state == "partial":
        terms = rng.standard_normal((shards, 3, 8))
        xs = list(terms - terms.mean(0) + x / shards)
    else:
        xs = np.split(x, shards, axis=1) if x_state == "split" else [x] * shards
    axis = {"split_out": 0, "split_in": 1}.get(w_state)
    ws = [w] * shards if axis is None else np.split(w, shards, axis=axis)
    return [a @ b.T for a, b in zip(xs, ws, strict=True)], x @ w.T


@pytest.mark.parametrize(
    ("x_state", "w_state", "state"),
    [
        ("replicated", "replicated", "replicated"),
        ("replicated", "split_out", "split"),
        ("split", "split_in", "partial"),
        ("partial", "replicated", "partial"),
    ],
)
def test_the_algebra_of_states_is_that_of_matrices(x_state, w_state, state):
    assert matmul_state(x_state, w_state) == state
    held, whole = compute(x_state, w_state)
    together = {
        "replicated": lambda: held[0],
        "split": lambda: np.concatenate(held, axis=1),
        "partial": lambda: sum(held),
    }[state]()
    np.testing.assert_allclose(together, whole)


@pytest.mark.parametrize(
    ("x_state", "w_state"), [("split", "replicated"), ("split", "split_out"), ("partial", "split_in")]
)
def test_what_would_need_a_collective_first_has_no_state(x_state, w_state):
    assert matmul_state(x_state, w_state) is None


def test_adapters_of_column_parallel_layers_split_b_and_of_row_parallel_layers_a():
    assert place_adapter("replicated", "split") == ("replicated", "split_out")
    assert place_adapter("split", "partial") == ("split_in", "replicated")
    assert lora_specs("qkv_proj") == ((None, None, None), (None, "heads", None))
    assert lora_specs("gate_up_proj") == ((None, None, None), (None, "ffn", None))
    assert lora_specs("o_proj") == ((None, None, "heads"), (None, None, None))
    assert lora_specs("down_proj") == ((None, None, "ffn"), (None, None, None))


def test_every_rule_names_a_mesh_axis_or_none():
    assert {axis for axis in RULES.values() if axis is not None} == set(make_mesh(1).axis_names)


def test_zeros_are_made_where_they_live_and_compiled_once():
    counter = CompileCounter()
    mesh = make_mesh(4)
    for turn in range(3):
        array = zeros(mesh, (8, 5), ("heads", None), "bfloat16")
        assert array.sharding == named_sharding(mesh, ("heads", None))
        assert (array.shape, array.dtype.name) == ((8, 5), "bfloat16")
        assert not np.asarray(array, np.float32).any()
        if turn == 0:
            counter.mark_ready()
    assert counter.after_ready == 0
