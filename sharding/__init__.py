"""Where arrays live: the mesh, the table from logical axes to mesh axes, and what follows for adapters."""

from sharding.mesh import AXIS, make_mesh
from sharding.rules import RULES, named_sharding, partition_spec, tree_shardings, tree_specs

__all__ = ["AXIS", "RULES", "make_mesh", "named_sharding", "partition_spec", "tree_shardings", "tree_specs"]
