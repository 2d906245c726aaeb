"""How much of the forward is kept for the backward of gradient rows, by remat policy or in a stash; see
``engine.gradient`` and ``engine.stash``."""

from jaxserve.models.config import ModelConfig

STASH_SHARE = 4  # by default the stash takes at most one part in so many of the memory beside the weights
DEFAULT_REMAT = "elementwise"
REMAT = ("none", "elementwise", "attention", "full")
WIDE = 4  # bytes of a log-sum-exp


def stash_bytes(model: ModelConfig, itemsize: int = 2, tensor_parallel: int = 1) -> int:
    """Bytes on one device of a token in the stash."""
    D, heads = model.hidden_size, model.num_heads // tensor_parallel
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tensor_parallel
    products = qkv + D + 2 * model.intermediate_size // tensor_parallel + (D if model.post_norms else 0)
    each = (D + heads * model.head_dim + products) * itemsize + heads * max(itemsize, WIDE)
    return model.num_layers * each + D * itemsize


def stash_tokens(given: int | None, remat: str | None, longest: int, room: int, each: int) -> int:
    """Tokens of the stash.

    Args:
      given: by the user; None: none where a policy was asked for, else for two sequences of full length or as many
        tokens as there is room for, but none where one sequence has no room.
      remat: the policy that the user asked for, if any.
      longest: tokens of a sequence.
      room: bytes that it may take; each: of a token.
    """
    if given is not None:
        return given
    if remat is not None:
        return 0
    tokens = min(2 * longest, max(room, 0) // each)
    return tokens if tokens >= longest else 0


def window_remat(stash_tokens: int, given: str | None) -> str | None:
    """What the backward of a window computes again; None: there is a stash."""
    return None if stash_tokens else given or DEFAULT_REMAT


def activation_bytes(
    model: ModelConfig, rows: int, remat: str | None, itemsize: int = 2, tensor_parallel: int = 1
) -> int:
    """Bytes on one device that a backward of so many rows needs: what is kept of every layer, and one layer at work.

    Args:
      remat: a name of ``REMAT``; None: what is kept is in a stash, and not counted.
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
        None: 0,
    }[remat]
    sums = 0 if remat in ("full", None) else heads * WIDE
    return rows * (model.num_layers * (kept * itemsize + sums) + working * itemsize)
