"""Where arrays live: the mesh, the table from logical axes to mesh axes, and what follows for adapters."""

from sharding.mesh import AXIS, make_mesh
from sharding.parallelize import ArraySpec, lora_specs, matmul_state, place_adapter
from sharding.rules import RULES, full, named_sharding, partition_spec, tree_shardings, tree_specs, zeros

__all__ = [
    "AXIS",
    "RULES",
    "ArraySpec",
    "full",
    "lora_specs",
    "make_mesh",
    "matmul_state",
    "named_sharding",
    "partition_spec",
    "place_adapter",
    "tree_shardings",
    "tree_specs",
    "zeros",
]
