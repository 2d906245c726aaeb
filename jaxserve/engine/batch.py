"""One step's input: a frozen pytree on the device, one int32 and one float32 buffer on the way there.

Packing everything into two host arrays makes a step one cheap transfer instead of twenty.

The buffers hold the gradient rows, then the chunk rows, both in aligned blocks, then the decode rows. Where gradient
rows have a stash, they do not run forward: the TokenBatch's rows begin behind them.

Shapes: T rows, Tb of them in blocks, W gradient rows, B sequence slots (serving ones, then finetuning ones), M pages
per sequence, R drawn tokens, N row blocks, J work items of the adapters, S adapter sites.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import jax
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.engine.buckets import Bucket
from pallas_kernels.cross_entropy import LossRows
from pallas_kernels.token_sampling import SampleRows

NOWHERE = np.iinfo(np.int32).max  # an index out of every range: nothing is written
FROM_DEVICE = -1  # a token the host has not read yet: the device's own last token of that slot
LORA_ITEM_FIELDS = ("block_SJ", "page_SJ", "first_SJ", "stop_SJ")
LOSS_FLOATS = ("weight_W", "sampled_logprob_W", "advantage_W", "clip_low_W", "clip_high_W")
NUM_FLAGS = 9
RANDOM, FILTER, EDITS, PENALTIES, LOGPROBS, PROMPT_LOGPROBS, FUSED_INPUTS, DROPOUT, ALWAYS = range(NUM_FLAGS)
SLOT_FLAGS = slice(LOGPROBS + 1)  # those that depend on the slots which draw
SLOT_INTS = ("edited", "counted", "top_k", "choice")  # of a slot, for its draws; in this order in the buffers
SLOT_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")


@struct.dataclass
class LoraBatch:
    """Adapter work of a step; see ``pallas_kernels.lora_matmul.LoraPlan``. One item list per site."""

    block_SJ: Int[Array, "S J"]
    page_SJ: Int[Array, "S J"]
    first_SJ: Int[Array, "S J"]
    stop_SJ: Int[Array, "S J"]
    items_S: Int[Array, "S"]


@struct.dataclass
class Rows:
    """Whose rows some rows are."""

    position_T: Int[Array, "T"]  # place in the sequence; -1: padding
    slot_T: Int[Array, "T"]  # sequence slot; B (all of them): padding
    lead_page_T: Int[Array, "T"] | None  # first bank page of the row's adapter: where its scales are
    drop_key_T: Int[Array, "Tb"] | None  # of the example that a row in a block belongs to
    drop_rate_T: Float[Array, "Tb"] | None


@struct.dataclass
class GradBatch:
    """What the gradient rows are to learn, and where their gradients go."""

    rows: Rows
    stash_block_N: Int[Array, "N"] | None  # where their forward left its activations; out of range: padding
    loss: LossRows
    acc_table_BM: Int[Array, "B M"]  # accumulator page of each page of a sequence; out of range: none
    block_SJ: Int[Array, "S J"]  # adapter work items of the gradient rows, in blocks of the step's row block
    page_SJ: Int[Array, "S J"]
    lane_SJ: Int[Array, "S J"]  # the lane page an item's gradient is added to
    items_S: Int[Array, "S"]
    lane_N: Int[Array, "N"] | None  # lane whose scales a row block trains; out of range: none


@struct.dataclass
class DrawBatch:
    """What is drawn after a step's rows."""

    slot_R: Int[Array, "R"]  # B: padding
    edited_R: Int[Array, "R"]  # 1: the slot's logit edits apply
    counted_R: Int[Array, "R"]  # 1: the slot's token counts are kept
    rows: SampleRows
    flags: Int[Array, "9"]


@struct.dataclass
class TokenBatch:
    """One step's tokens, those that run forward: rows in aligned blocks, then decode rows; padded to the bucket."""

    token_T: Int[Array, "T"]  # FROM_DEVICE: the slot's last token
    rows: Rows
    page_table_BM: Int[Array, "B M"]
    sample_row_R: Int[Array, "R"]  # the row whose hidden state draws
    flags: Int[Array, "9"]  # what at least one row of the batch needs: RANDOM ... DROPOUT; ALWAYS is 1
    stash_block_N: Int[Array, "N"] | None  # where the row blocks leave their activations; out of range: nowhere
    lora: LoraBatch | None
    grad: GradBatch | None


@dataclass(frozen=True)
class DrawLayout:
    """Where each field of a draw lies: at the head of a step's two buffers, whatever the step's bucket."""

    num_samples: int
    num_slots: int  # that draw tokens

    @cached_property
    def int_fields(self) -> dict[str, tuple[int, ...]]:
        R = self.num_samples
        names = (*(name + "_R" for name in SLOT_INTS), "sample_slot_R", "sample_position_R")
        return {"flags": (NUM_FLAGS,), **dict.fromkeys(names, (R,)), "seed_R2": (R, 2)}

    @cached_property
    def float_fields(self) -> dict[str, tuple[int, ...]]:
        return {name + "_R": (self.num_samples,) for name in SLOT_FLOATS}

    @cached_property
    def num_ints(self) -> int:
        return sum(map(prod, self.int_fields.values()))

    @cached_property
    def num_floats(self) -> int:
        return sum(map(prod, self.float_fields.values()))

    def flags(self, ints: np.ndarray) -> np.ndarray:
        """The flags in a buffer."""
        return ints[:NUM_FLAGS]

    def slot_values(self, ints: np.ndarray, floats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The fields of SLOT_INTS, [fields, R], and of SLOT_FLOATS in the buffers."""
        R = self.num_samples
        of_ints = ints[NUM_FLAGS : NUM_FLAGS + len(SLOT_INTS) * R].reshape(-1, R)
        return of_ints, floats[: len(SLOT_FLOATS) * R].reshape(-1, R)

    def unpack(self, ints: jax.Array, floats: jax.Array) -> DrawBatch:
        """The heads of the buffers as a DrawBatch, inside jit."""
        i, f = _views(ints, self.int_fields), _views(floats, self.float_fields)
        rows = SampleRows(
            temperature_R=f["temperature_R"],
            top_k_R=i["top_k_R"],
            top_p_R=f["top_p_R"],
            min_p_R=f["min_p_R"],
            repetition_R=f["repetition_R"],
            presence_R=f["presence_R"],
            frequency_R=f["frequency_R"],
            seed_R2=lax.bitcast_convert_type(i["seed_R2"], np.uint32),
            choice_R=i["choice_R"],
            position_R=i["sample_position_R"],
        )
        return DrawBatch(i["sample_slot_R"], i["edited_R"], i["counted_R"], rows, i["flags"])


@dataclass(frozen=True)
class BatchLayout:
    """Where each field lies in the two buffers, for one bucket."""

    bucket: Bucket
    num_slots: int  # that draw tokens
    pages_per_seq: int
    lora_items: int = 0
    num_sites: int = 4
    train_slots: int = 0  # behind the others
    grad_items: int = 0
    row_block: int = 1
    scaled: bool = False  # rows have scales: (IA)3, DoRA
    dropout: bool = False  # of rows in blocks

    @property
    def all_slots(self) -> int:
        return self.num_slots + self.train_slots

    @cached_property
    def int_fields(self) -> dict[str, tuple[int, ...]]:
        T = self.bucket.rows
        fields = self.draw.int_fields | {
            "token_T": (T,),
            "position_T": (T,),
            "slot_T": (T,),
            "page_table_BM": (self.all_slots, self.pages_per_seq),
            "sample_row_R": (self.num_samples,),
            "target_T": (self.bucket.chunk_rows,),  # whose log-probability is wanted after each chunk row; -1: none
        }
        if self.lora_items:
            fields |= dict.fromkeys(LORA_ITEM_FIELDS, (self.num_sites, self.lora_items))
            fields["items_S"] = (self.num_sites,)
        if self.scaled:
            fields["lead_page_T"] = (T,)
        if self.dropout:
            fields["drop_key_T"] = (self.bucket.block_rows,)
        if self.bucket.stashed:
            fields["stash_block_N"] = (self.bucket.block_rows // self.row_block,)
        if W := self.bucket.grad_rows:
            fields |= {
                "loss_target_W": (W,),
                "loss_kind_W": (W,),
                "acc_table_BM": (self.all_slots, self.pages_per_seq),
                "grad_block_SJ": (self.num_sites, self.grad_items),
                "grad_page_SJ": (self.num_sites, self.grad_items),
                "grad_lane_SJ": (self.num_sites, self.grad_items),
                "grad_items_S": (self.num_sites,),
            }
            if self.scaled:
                fields["grad_lane_N"] = (W // self.row_block,)
        return fields

    @cached_property
    def float_fields(self) -> dict[str, tuple[int, ...]]:
        fields = dict(self.draw.float_fields)
        if W := self.bucket.grad_rows:
            fields |= dict.fromkeys(LOSS_FLOATS, (W,))
        if self.dropout:
            fields["drop_rate_T"] = (self.bucket.block_rows,)
        return fields

    @property
    def num_samples(self) -> int:
        """Tokens a step can draw: one per decode row; a chunk step may finish prompts in any slot."""
        return self.num_slots if self.bucket.chunk_rows else self.bucket.decode_rows

    @cached_property
    def draw(self) -> DrawLayout:
        return DrawLayout(self.num_samples, self.num_slots)

    def empty(self) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
        """New host buffers of a step with nothing to do, and views of their fields."""
        ints, floats = (buffer.copy() for buffer in self._nothing)
        return ints, _views(ints, self.int_fields), floats, _views(floats, self.float_fields)

    @cached_property
    def _nothing(self) -> tuple[np.ndarray, np.ndarray]:
        """The buffers of a step with nothing to do."""
        ints = np.zeros(sum(map(prod, self.int_fields.values())), np.int32)
        floats = np.zeros(sum(map(prod, self.float_fields.values())), np.float32)
        int_views, float_views = _views(ints, self.int_fields), _views(floats, self.float_fields)
        int_views["position_T"][:] = -1
        int_views["target_T"][:] = -1
        int_views["slot_T"][:] = self.all_slots
        int_views["sample_slot_R"][:] = self.num_slots
        int_views["flags"][ALWAYS] = 1
        float_views["repetition_R"][:] = 1
        float_views["top_p_R"][:] = 1
        if self.bucket.stashed:
            int_views["stash_block_N"][:] = NOWHERE
        if self.bucket.grad_rows:
            int_views["acc_table_BM"][:] = NOWHERE
            if self.scaled:
                int_views["grad_lane_N"][:] = NOWHERE
        return ints, floats

    def unpack(self, ints: jax.Array, floats: jax.Array) -> TokenBatch:
        """The buffers as a TokenBatch, inside jit."""
        i, f = _views(ints, self.int_fields), _views(floats, self.float_fields)
        lora = LoraBatch(**{name: i[name] for name in (*LORA_ITEM_FIELDS, "items_S")}) if self.lora_items else None
        stash_block_N, blocks = i.get("stash_block_N"), self.bucket.first_row // self.row_block

        def rows(part: slice) -> Rows:
            optional = (i.get("lead_page_T"), i.get("drop_key_T"), f.get("drop_rate_T"))
            return Rows(i["position_T"][part], i["slot_T"][part], *(x if x is None else x[part] for x in optional))

        grad = None
        if self.bucket.grad_rows:
            loss = LossRows(target_W=i["loss_target_W"], kind_W=i["loss_kind_W"], **{k: f[k] for k in LOSS_FLOATS})
            grad = GradBatch(
                rows=rows(slice(self.bucket.grad_rows)),
                stash_block_N=None if stash_block_N is None else stash_block_N[:blocks],
                loss=loss,
                acc_table_BM=i["acc_table_BM"],
                **{k: i["grad_" + k] for k in ("block_SJ", "page_SJ", "lane_SJ", "items_S")},
                lane_N=i.get("grad_lane_N"),
            )
        return TokenBatch(
            token_T=i["token_T"][self.bucket.first_row :],
            rows=rows(slice(self.bucket.first_row, None)),
            **{name: i[name] for name in ("page_table_BM", "sample_row_R", "flags")},
            stash_block_N=None if stash_block_N is None else stash_block_N[blocks:],
            lora=lora,
            grad=grad,
        )


def _views(buffer, fields: dict[str, tuple[int, ...]]):
    views, start = {}, 0
    for name, shape in fields.items():
        end = start + prod(shape)
        views[name] = buffer[start:end] if len(shape) == 1 else buffer[start:end].reshape(shape)
        start = end
    return views
