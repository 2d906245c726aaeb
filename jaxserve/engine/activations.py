"""How much of the forward is kept for the backward of gradient rows, by remat policy; see ``engine.gradient``."""

from jaxserve.models.config import ModelConfig

REMAT = ("none", "elementwise", "attention", "full")
WIDE = 4  # bytes of a log-sum-exp


def activation_bytes(model: ModelConfig, rows: int, remat: str, itemsize: int = 2, tensor_parallel: int = 1) -> int:
    """Bytes on one device that a backward of so many rows needs: what is kept of every layer, and one layer at work.

    Args:
      remat: a name of ``REMAT``.
      itemsize: of an activation.
    """
    D, heads = model.hidden_size, model.num_heads // tensor_parallel
    ffn = model.intermediate_size // tensor_parallel
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tensor_parallel
    out = heads * model.head_dim
    working = 12 * D + 2 * qkv + 4 * ffn  # of one layer, whatever the policy
    kept = {
        "none": working,
        "elementwise": D + qkv + out + D + 2 * ffn + (D if model.post_norms else 0),
        "attention": D + out,
        "full": D,
    }[remat]
    sums = 0 if remat == "full" else heads * WIDE
    return rows * (model.num_layers * (kept * itemsize + sums) + working * itemsize)
