"""The paged K/V pool on the device: two arrays per layer, head-major, so one page of one head is one contiguous box.

Shapes: P pages, K kv heads (repeated where there are more devices than heads), G tokens per page, C head dim, T rows.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxserve.models.config import ModelConfig
from sharding import ArraySpec, zeros

KV_AXES = (None, "heads", None, None)
LayerKV = tuple[Float[Array, "P K G C"], Float[Array, "P K G C"]]


def kv_spec(config: ModelConfig, num_pages: int, page_size: int, tensor_parallel: int) -> ArraySpec:
    """Shape and axes of one layer's K (or V) pool."""
    heads = max(config.num_kv_heads, tensor_parallel)
    return ArraySpec((num_pages, heads, page_size, config.head_dim), KV_AXES)


def page_bytes(config: ModelConfig, page_size: int, tensor_parallel: int, dtype: str) -> int:
    """Bytes of one page over all layers, K and V, on all devices."""
    spec = kv_spec(config, 1, page_size, tensor_parallel)
    return 2 * config.num_layers * spec.shape[1] * page_size * config.head_dim * jnp.dtype(dtype).itemsize


def empty_pool(config: ModelConfig, num_pages: int, page_size: int, mesh: Mesh, dtype: str) -> list[LayerKV]:
    """A pool of zeros: a page that was never written must not hold NaN."""
    spec = kv_spec(config, num_pages, page_size, mesh.size)

    def pool() -> jax.Array:
        return zeros(mesh, spec.shape, spec.axes, dtype)

    return [(pool(), pool()) for _ in range(config.num_layers)]
