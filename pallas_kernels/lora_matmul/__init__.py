"""Multi-adapter LoRA: each row through its own adapter's A and B, beside a base matrix or alone."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, choose, mosaic_pair, num_cores
from pallas_kernels.lora_matmul import reference, xla
from pallas_kernels.lora_matmul.plan import PAGE_RANK, SINGLE_ROWS, LoraPlan, num_blocks
from pallas_kernels.numerics import matmul

__all__ = [
    "BACKWARD_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "LINEAR_IMPLEMENTATIONS",
    "PAGE_RANK",
    "SINGLE_ROWS",
    "LoraPlan",
    "facts_of",
    "lora_linear",
    "lora_matmul",
    "lora_matmul_backward",
    "num_blocks",
    "refuse",
    "refuse_linear",
]

KERNEL_COLUMNS = 64  # the columns of a kernel's tile
KERNEL_ROWS = 64  # its rows: those of wgmma
KERNEL_MEMBERS = 4  # their ranks fill a tile
LINEAR_ROWS = 128  # most of a base product's kernel: with more, what is read is not the weights alone
LINEAR_WAVES = 2  # from so many tiles for each core on, XLA's product keeps all of them busy


def refuse(*, dtype: Any, dims: Sequence[int], num_rows: int, plan: LoraPlan, **_: Any) -> str | None:
    """Why the kernels cannot take these facts, if they cannot."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel multiplies 16-bit numbers, x is {dtype}"
    odd = [dim for dim in dims if dim % KERNEL_COLUMNS]
    if odd:
        return f"the kernel takes dimensions that are multiples of {KERNEL_COLUMNS}, one is {odd[0]}"
    if plan.chunk_rows and plan.row_block != KERNEL_ROWS:
        return f"the kernel takes row blocks of {KERNEL_ROWS} rows, these have {plan.row_block}"
    if len(dims) - 1 > KERNEL_MEMBERS:
        return f"the kernel takes at most {KERNEL_MEMBERS} members, there are {len(dims) - 1}"
    if num_rows % SINGLE_ROWS:
        return f"the kernel takes a multiple of {SINGLE_ROWS} rows, there are {num_rows}"
    return None


def refuse_linear(*, num_rows: int, plan: LoraPlan, **facts: Any) -> str | None:
    """Why the kernels with the base product cannot take these facts, if they cannot."""
    if plan.chunk_rows:
        return f"the kernel takes single rows, {plan.chunk_rows} are in row blocks"
    if num_rows > LINEAR_ROWS:
        return f"the kernel takes at most {LINEAR_ROWS} rows, there are {num_rows}"
    return refuse(num_rows=num_rows, plan=plan, **facts)


def _refuse_linear(*, dims: Sequence[int], **facts: Any) -> str | None:
    if sum(dims[1:]) >= LINEAR_WAVES * num_cores() * KERNEL_COLUMNS:
        return f"XLA's product of {sum(dims[1:])} outputs reads at full speed"
    return refuse_linear(dims=dims, **facts)


def _refuse_backward(*, lanes: Any, **facts: Any) -> str | None:
    if lanes[0].dtype != jnp.float32:
        return f"the kernel sums gradients in float32, the lanes are {lanes[0].dtype}"
    return refuse(**facts)


def _base_then_adapters(x: jax.Array, w: jax.Array, *adapters: Any, of: str | None) -> jax.Array:
    """Args: of: the adapters' implementation; None: the best."""
    return lora_matmul(x, *adapters, add_to=matmul(x, w), implementation=of)


IMPLEMENTATIONS = (
    *mosaic_pair("pallas_kernels.lora_matmul.mosaic", refuse),
    Implementation("xla", xla.lora_matmul),
    Implementation("reference", reference.lora_matmul),
)
LINEAR_IMPLEMENTATIONS = (
    *mosaic_pair("pallas_kernels.lora_matmul.mosaic_linear", _refuse_linear),
    Implementation("separate", partial(_base_then_adapters, of=None)),
    Implementation("xla", partial(_base_then_adapters, of="xla")),
    Implementation("reference", reference.lora_linear),
)
BACKWARD_IMPLEMENTATIONS = (
    *mosaic_pair("pallas_kernels.lora_matmul.mosaic_backward", _refuse_backward),
    Implementation("xla", xla.lora_matmul_backward),
    Implementation("reference", reference.lora_matmul_backward),
)


def lora_matmul(
    x_TD: Float[Array, "T D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    *,
    add_to: Float[Array, "T E"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T E"]:
    """Returns, for each row, sum over its adapter's pages of (x A^T) B^T; zeros for rows without an adapter.

    Several linear layers that share an input (q, k, v; gate, up) go together: A holds their ranks one after another
    (R = len(members) * 16) and ``members`` holds one B each; the outputs are concatenated, E = sum of the members'.

    Args:
      x_TD: rows.
      a_PRD: the bank's A pages, PEFT's layout [rank, in].
      members: the bank's B pages, PEFT's layout [out, rank], scaling alpha / r folded in.
      plan: which rows, which pages.
      add_to: of x's dtype, what the result is added to; a kernel does it in place, and rounds but once.
      implementation: a name of IMPLEMENTATIONS, or None for the best that runs here.
    """
    chosen = choose("lora_matmul", IMPLEMENTATIONS, implementation, **facts_of(x_TD, members, plan))
    return chosen.function(x_TD, a_PRD, members, plan, add_to)


def lora_linear(
    x_TD: Float[Array, "T D"],
    w_ED: Float[Array, "E D"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    *,
    implementation: str | None = None,
) -> Float[Array, "T E"]:
    """Returns x W^T and the adapters: ``lora_matmul`` added to the base product, which a kernel rounds but once.

    Args:
      w_ED: the members' base weights one after another, [out, in]; the others as in ``lora_matmul``.
      implementation: a name of LINEAR_IMPLEMENTATIONS, or None for the best that runs here.
    """
    chosen = choose("lora_linear", LINEAR_IMPLEMENTATIONS, implementation, **facts_of(x_TD, members, plan))
    return chosen.function(x_TD, w_ED, a_PRD, members, plan)


def lora_matmul_backward(
    x_WD: Float[Array, "W D"],
    d_y_WE: Float[Array, "W E"],
    a_PRD: Float[Array, "P R D"],
    members: tuple[Float[Array, "P E R"], ...],
    plan: LoraPlan,
    lane_J: Int[Array, "J"],
    lanes: tuple[Float[Array, "Y R D"], tuple[Float[Array, "Y E R"], ...]],
    *,
    first_page: Int[Array, ""] | int = 0,
    num_pages: int | None = None,
    add_to: Float[Array, "W D"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "W D"], tuple[Float[Array, "Y R D"], tuple[Float[Array, "Y E R"], ...]]]:
    """Backward for gradient rows. Returns dx, and the lanes with dA and each member's dB (of the bank's factor, scaling
    included) added.

    Items are added one after another to what the lanes hold, so a lane's bits depend on the order of its items and
    not on how they were dealt to steps.

    Args:
      plan: of rows that all stand in row blocks; those that are in no item are finite.
      lane_J: the lane page each work item's gradient belongs to, counted from first_page, the same for all items of a
        page; num_pages or more is dropped.
      lanes: sums so far, in float32 or wider.
      first_page, num_pages: of the lanes, those that may be added to, by default all: a layer's own in an array of all
        layers, so that nobody cuts them out of it or puts them back.
      add_to: of x's dtype, what dx is added to; a kernel does it in place, and rounds but once.
      implementation: a name of BACKWARD_IMPLEMENTATIONS, or None for the best that runs here.
    """
    assert plan.chunk_rows == x_WD.shape[0], f"{plan.chunk_rows=} {x_WD.shape=}"
    facts = {**facts_of(x_WD, members, plan), "lanes": lanes}
    num_pages = lanes[0].shape[0] if num_pages is None else num_pages
    chosen = choose("lora_matmul_backward", BACKWARD_IMPLEMENTATIONS, implementation, **facts)
    return chosen.function(x_WD, d_y_WE, a_PRD, members, plan, lane_J, lanes, add_to, first_page, num_pages)


def facts_of(x: jax.Array, members: tuple[jax.Array, ...], plan: LoraPlan) -> dict[str, Any]:
    """What a kernel is chosen by."""
    dims = (x.shape[1], *(b.shape[1] for b in members))
    return {"dtype": x.dtype, "dims": dims, "num_rows": x.shape[0], "plan": plan}
