"""StepPlan to the two host buffers of a TokenBatch; a few numpy operations, whatever the batch holds.

What a sequence brings once (sampling parameters, adapter) is kept in arrays indexed by slot and gathered per step;
page tables grow in place. Every index that reaches the device is checked here: JAX itself never complains.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from jaxserve.adapters.bank import sites_touched
from jaxserve.adapters.scales import fused_inputs, is_scaled
from jaxserve.adapters.weights import Weights
from jaxserve.engine import batch as flags
from jaxserve.engine.batch import (
    FROM_DEVICE,
    LORA_ITEM_FIELDS,
    NOWHERE,
    SLOT_FLAGS,
    SLOT_FLOATS,
    SLOT_INTS,
    BatchLayout,
)
from jaxserve.engine.buckets import Bucket
from jaxserve.engine.gradient import TrainShape
from jaxserve.engine.state import MAX_EDITS
from jaxserve.errors import EngineError, InvalidRequest
from jaxserve.finetune.windows import Lane, WindowRows
from jaxserve.sampling import SamplingParams
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.request import Sequence
from pallas_kernels.lora_matmul import SINGLE_ROWS, num_blocks
from pallas_kernels.token_sampling import GREEDY_BELOW

MAY_BE_NOWHERE = ("acc_table_BM", "grad_lane_N", "stash_block_N")
Edits = tuple[np.ndarray, np.ndarray, np.ndarray]  # see slot_edits


@dataclass
class Packed:
    """One step ready to go up."""

    layout: BatchLayout
    ints: np.ndarray
    floats: np.ndarray
    fields: dict[str, np.ndarray]  # views of ``ints``


@dataclass
class AdapterRows:
    """Which bank pages an adapter owns and which sites it changes."""

    pages: tuple[int, ...]
    sites: tuple[int, ...]
    scaled: bool = False
    fused_inputs: bool = False


def adapter_rows(weights: Weights, pages: tuple[int, ...]) -> AdapterRows:
    """What packing must know of an adapter in these bank pages."""
    sites = sites_touched(sorted({member for _, member in weights.scaling}))
    return AdapterRows(pages, sites, is_scaled(weights), fused_inputs(weights))


@dataclass
class Slots:
    """Per-slot values of the running sequences, in tables: a step gathers all columns of its slots at once."""

    num_slots: int
    pages_per_seq: int
    train_slots: int = 0  # behind the others: sequences that are finetuned on
    page_table_BM: np.ndarray = field(init=False)
    num_pages: list[int] = field(init=False)  # of a slot's row in the page table that are known
    lead_page_B: np.ndarray = field(init=False)  # first bank page of the slot's adapter; 0: base
    seed_B2: np.ndarray = field(init=False)
    int_FB: np.ndarray = field(init=False)  # rows: SLOT_INTS
    float_FB: np.ndarray = field(init=False)  # rows: SLOT_FLOATS
    needs_FB: np.ndarray = field(init=False)  # rows: SLOT_FLAGS
    adapters: dict[int, AdapterRows] = field(default_factory=dict)  # by lead page

    def __post_init__(self):
        B = self.all_slots
        self.page_table_BM = np.zeros((B, self.pages_per_seq), np.int32)
        self.num_pages = [0] * B
        self.lead_page_B = np.zeros(B + 1, np.int32)  # the last entry stands for padding rows
        self.seed_B2 = np.zeros((B, 2), np.int32)
        self.int_FB = np.zeros((len(SLOT_INTS), B), np.int32)
        self.float_FB = np.zeros((len(SLOT_FLOATS), B), np.float32)
        self.needs_FB = np.zeros((SLOT_FLAGS.stop, B), bool)

    @property
    def all_slots(self) -> int:
        return self.num_slots + self.train_slots

    def admit(self, seq: Sequence, adapter: AdapterRows | None, edited: bool) -> None:
        """Takes over a slot for a sequence that starts (or starts again). Its params carry a seed."""
        slot, p = seq.slot, seq.request.params
        assert slot is not None, f"{seq} has no slot"
        greedy = p.temperature < GREEDY_BELOW
        temperature, top_k = 0.0 if greedy else p.temperature, max(p.top_k, 0)
        penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        self.int_FB[:, slot] = edited, p.uses_penalties, top_k, seq.index
        self.float_FB[:, slot] = temperature, p.top_p, p.min_p, *penalties
        filtered = not greedy and bool(top_k or p.top_p < 1 or p.min_p > 0)
        self.needs_FB[:, slot] = not greedy, filtered, edited, p.uses_penalties, bool(p.logprobs)
        assert p.seed is not None, f"{seq} has no seed"
        self.seed_B2[slot] = np.array([p.seed & (2**64 - 1)], np.uint64).view(np.int32)
        self.num_pages[slot] = 0
        self.lead_page_B[slot] = adapter.pages[0] if adapter else 0
        if adapter:
            self.adapters[adapter.pages[0]] = adapter

    def grow(self, seq: Sequence) -> None:
        """Copies the pages a sequence got since the last step into its page-table row."""
        slot, pages = seq.slot, seq.pages
        assert slot is not None, f"{seq} has no slot"
        known = self.num_pages[slot]
        if len(pages) != known:
            self.page_table_BM[slot, known : len(pages)] = pages[known:]
            self.num_pages[slot] = len(pages)


class Packer:
    """Turns plans into buffers for one engine."""

    def __init__(
        self,
        slots: Slots,
        layouts: dict[tuple[Bucket, bool], BatchLayout],
        row_block: int,
        num_pages: int,
        page_size: int,
        vocab_size: int,
        bank_pages: int = 0,
        train: TrainShape | None = None,
    ):
        self.slots = slots
        self.layouts = layouts
        self.row_block = row_block
        self.num_pages = num_pages
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.bank_pages = bank_pages
        self.train = train

    def pack(self, plan: StepPlan, bucket: Bucket, extended: bool = False) -> Packed:
        """Fills the buffers of ``bucket`` with the plan's rows; ``extended``: for the program that knows extras."""
        layout = self.layouts[bucket, extended]
        ints, i, floats, f = layout.empty()
        chunk_ends, row = self._chunks(plan, i, bucket)
        if plan.finetune is not None:
            self._windows(plan.finetune.forwards, i, f, row)
            self._validation_targets(plan.finetune.forwards, i, row - bucket.grad_rows)
            self._gradients(plan.finetune.grads, i, f, layout)
        decode_rows = self._decodes(plan, i, bucket)
        i["page_table_BM"][:] = self.slots.page_table_BM
        if plan.num_samples:
            self._samples(plan, i, chunk_ends, decode_rows, bucket.first_row)
            self._sampling(i, layout.draw.slot_values(ints, floats), plan.num_samples)
        if layout.lora_items:
            self._adapters(i, layout)
        self._check(i, layout)
        return Packed(layout, ints, floats, i)

    def _chunks(self, plan: StepPlan, i: dict[str, np.ndarray], bucket: Bucket) -> tuple[list[int], int]:
        """Lays chunk segments into aligned blocks; returns each segment's last row, and the next free row."""
        ends, row = [], bucket.grad_rows
        for segment in plan.chunks:
            seq, start, length = segment.seq, segment.start, segment.length
            self.slots.grow(seq)
            rows = slice(row, row + length)
            i["token_T"][rows] = seq.tokens[start : start + length]
            i["position_T"][rows] = np.arange(start, start + length)
            i["slot_T"][rows] = seq.slot
            if seq.request.params.prompt_logprobs is not None and start < len(seq.request.prompt_ids) - 1:
                targets = seq.request.prompt_ids[start + 1 : start + 1 + length]
                at = row - bucket.grad_rows
                i["target_T"][at : at + len(targets)] = targets
                i["flags"][flags.PROMPT_LOGPROBS] = 1
            ends.append(row + length - 1)
            row += -(-length // self.row_block) * self.row_block
        return ends, row

    def _windows(self, windows: Iterable[WindowRows], i, f, row: int) -> None:
        """Lays windows of finetune sequences into aligned blocks."""
        for window in windows:
            seq, slot = window.seq, self.slots.num_slots + window.seq.slot
            rows = slice(row, row + window.length)
            i["token_T"][rows] = seq.token_ids[window.start : window.end]
            i["position_T"][rows] = np.arange(window.start, window.end)
            i["slot_T"][rows] = slot
            self.slots.page_table_BM[slot, : len(seq.pages)] = seq.pages
            lane = seq.lane
            self.slots.lead_page_B[slot] = lane.adapter_pages[0]
            self.slots.adapters[lane.adapter_pages[0]] = AdapterRows(
                lane.adapter_pages, lane.sites, lane.scaled, lane.fused_inputs
            )
            if seq.dropout:
                i["drop_key_T"][rows], f["drop_rate_T"][rows] = seq.drop_key, seq.dropout
                i["flags"][flags.DROPOUT] = 1
            if seq.stash_blocks:
                stashed = seq.stash_blocks[window.start // self.row_block : -(-window.end // self.row_block)]
                block = row // self.row_block
                i["stash_block_N"][block : block + len(stashed)] = stashed
            row += -(-window.length // self.row_block) * self.row_block

    def _validation_targets(self, windows: Iterable[WindowRows], i: dict[str, np.ndarray], row: int) -> None:
        """What forward rows predict, where that is all that is wanted of them; ``row`` counts chunk rows."""
        for window in windows:
            if window.seq.forward_only:
                i["target_T"][row : row + window.length] = window.seq.token_ids[window.start + 1 : window.end + 1]
                i["flags"][flags.PROMPT_LOGPROBS] = 1
            row += -(-window.length // self.row_block) * self.row_block

    def _gradients(self, windows: Iterable[WindowRows], i, f, layout: BatchLayout) -> None:
        """The gradient rows: their tokens, what they learn, and the adapter work of their backward."""
        self._windows(windows, i, f, 0)
        row = 0
        for window in windows:
            seq, targets, rows = window.seq, window.seq.targets, slice(row, row + window.length)
            following = slice(window.start + 1, window.end + 1)  # row t predicts token t + 1
            i["loss_target_W"][rows] = seq.token_ids[following]
            i["loss_kind_W"][rows] = targets.kind
            f["weight_W"][rows] = targets.weights[following]
            if targets.sampled_logprobs is not None:
                f["sampled_logprob_W"][rows] = targets.sampled_logprobs[following]
            if targets.advantages is not None:
                f["advantage_W"][rows] = targets.advantages[following]
            f["clip_low_W"][rows], f["clip_high_W"][rows] = targets.clip
            i["acc_table_BM"][self.slots.num_slots + seq.slot, : len(seq.acc_pages)] = seq.acc_pages
            blocks = -(-window.length // self.row_block)
            self._gradient_items(i, seq.lane, row // self.row_block, blocks)
            if layout.scaled and seq.lane.scaled:
                first = row // self.row_block
                i["grad_lane_N"][first : first + blocks] = seq.lane.index
            row += blocks * self.row_block

    def _gradient_items(self, i: dict[str, np.ndarray], lane: Lane, block: int, blocks: int) -> None:
        pages = len(lane.adapter_pages)
        for site in lane.sites:
            items = slice(i["grad_items_S"][site], i["grad_items_S"][site] + blocks * pages)
            i["grad_block_SJ"][site, items] = np.repeat(np.arange(block, block + blocks), pages)
            i["grad_page_SJ"][site, items] = np.tile(lane.adapter_pages, blocks)
            i["grad_lane_SJ"][site, items] = np.tile(lane.lane_pages, blocks)
            i["grad_items_S"][site] = items.stop

    def _decodes(self, plan: StepPlan, i: dict[str, np.ndarray], bucket: Bucket) -> np.ndarray:
        """Lays decode rows side by side by adapter; returns the row of each."""
        slots, tokens = [], []
        for seq, position in zip(plan.decoding, plan.positions, strict=True):
            self.slots.grow(seq)
            slots.append(seq.slot)
            tokens.append(seq.tokens[position] if position < len(seq.tokens) else FROM_DEVICE)
        slot_K = np.array(slots, np.int32)
        row_K = np.empty(len(slots), np.int32)
        order = np.argsort(self.slots.lead_page_B[slot_K], kind="stable")
        row_K[order] = np.arange(bucket.block_rows, bucket.block_rows + len(slots), dtype=np.int32)
        for name, values in (("token_T", tokens), ("position_T", plan.positions), ("slot_T", slot_K)):
            i[name][row_K] = values
        return row_K

    def _samples(self, plan: StepPlan, i, chunk_ends: Seq[int], row_K: np.ndarray, first_row: int) -> None:
        """Where tokens are drawn, and for which slots: decode rows, then what is drawn behind chunks."""
        slots, rows = [seq.slot for seq in plan.decoding], row_K
        if plan.chunk_samples:
            slots += [seq.slot for seq, _, _ in plan.chunk_samples]
            rows = np.append(rows, [chunk_ends[chunk] for _, chunk, _ in plan.chunk_samples])
        i["sample_slot_R"][: len(slots)] = slots
        i["sample_row_R"][: len(slots)] = rows - first_row
        i["sample_position_R"][: len(slots)] = i["position_T"][rows] + 1

    def _sampling(self, i: dict[str, np.ndarray], values: tuple[np.ndarray, np.ndarray], count: int) -> None:
        """How they are drawn: what the slots keep, and what that needs of the draw."""
        slots, slot_R, (int_FR, float_FR) = self.slots, i["sample_slot_R"][:count], values
        int_FR[:, :count] = slots.int_FB.take(slot_R, axis=1)
        float_FR[:, :count] = slots.float_FB.take(slot_R, axis=1)
        i["seed_R2"][:count] = slots.seed_B2.take(slot_R, axis=0)
        i["flags"][SLOT_FLAGS] = slots.needs_FB.take(slot_R, axis=1).any(axis=1)

    def _adapters(self, i: dict[str, np.ndarray], layout: BatchLayout) -> None:
        """Lists the work items of each site: a run of neighbours of one adapter in a block, and a page of it."""
        lead_T, bucket = self.slots.lead_page_B[i["slot_T"]], layout.bucket
        if layout.scaled:
            i["lead_page_T"][:] = lead_T
            leads = set(lead_T.tolist()) - {0}
            i["flags"][flags.FUSED_INPUTS] = any(self.slots.adapters[lead].fused_inputs for lead in leads)
        lead_T, block_rows = lead_T[bucket.first_row :], bucket.forward_block_rows
        if not lead_T.any():
            return
        start_N = np.array([*range(0, block_rows, self.row_block), *range(block_rows, len(lead_T), SINGLE_ROWS)])
        changes = np.flatnonzero(np.diff(lead_T)) + 1
        first_K = np.union1d(start_N, changes)
        stop_K = np.append(first_K[1:], len(lead_T))
        has_adapter_K = lead_T[first_K] != 0
        first_K, stop_K = first_K[has_adapter_K], stop_K[has_adapter_K]
        block_K = np.searchsorted(start_N, first_K, side="right") - 1
        adapters = [self.slots.adapters[lead] for lead in lead_T[first_K].tolist()]
        counts = [len(adapter.pages) for adapter in adapters]
        columns = np.stack([block_K, first_K - start_N[block_K], stop_K - start_N[block_K]])
        block_I, first_I, stop_I = np.repeat(columns, counts, axis=1)
        items = (block_I, np.concatenate([adapter.pages for adapter in adapters]), first_I, stop_I)
        for site in range(layout.num_sites):
            mine_I = np.repeat([site in adapter.sites for adapter in adapters], counts)
            i["items_S"][site] = count = mine_I.sum()
            for name, values in zip(LORA_ITEM_FIELDS, items, strict=True):
                i[name][site, :count] = values[mine_I]

    def _check(self, i: dict[str, np.ndarray], layout: BatchLayout) -> None:
        """Refuses an index the device would silently bend into range."""
        bucket, rows = layout.bucket, layout.bucket.rows - layout.bucket.first_row
        bounds = {
            "token_T": (FROM_DEVICE, self.vocab_size),
            "position_T": (-1, self.slots.pages_per_seq * self.page_size),
            "slot_T": (0, self.slots.all_slots + 1),
            "page_table_BM": (0, self.num_pages),
            "sample_row_R": (0, rows),
            "sample_slot_R": (0, self.slots.num_slots + 1),
            "target_T": (-1, self.vocab_size),
        }
        if layout.lora_items:
            block_rows = max(self.row_block, SINGLE_ROWS)
            bounds |= {
                "block_SJ": (0, num_blocks(rows, bucket.forward_block_rows, self.row_block)),
                "page_SJ": (0, self.bank_pages),
                "first_SJ": (0, block_rows),
                "stop_SJ": (0, block_rows + 1),
            }
        if layout.scaled:
            bounds["lead_page_T"] = (0, self.bank_pages)
        if bucket.stashed:
            assert self.train is not None, "a stash without room for training"
            bounds["stash_block_N"] = (0, self.train.stash_blocks)
        if bucket.grad_rows:
            assert self.train is not None, "gradient rows without room for training"
            bounds |= {
                "loss_target_W": (0, self.vocab_size),
                "acc_table_BM": (0, self.train.acc_pages),
                "grad_block_SJ": (0, bucket.grad_rows // self.row_block),
                "grad_page_SJ": (0, self.bank_pages),
                "grad_lane_SJ": (0, self.train.lane_pages),
            }
            if layout.scaled:
                bounds["grad_lane_N"] = (0, self.train.num_lanes)
        for name, (low, high) in bounds.items():
            values = i[name]
            if name in MAY_BE_NOWHERE:
                values = values[values != NOWHERE]
            # one pass: as unsigned numbers, those below are past the end
            if values.size and (values - low if low else values).view(np.uint32).max() >= high - low:
                raise EngineError(f"{name} spans {values.min()}..{values.max()}, outside [{low}, {high})")


def check_edits(params: SamplingParams, eos_token_ids: Iterable[int]) -> None:
    """Raises InvalidRequest for more logit edits than a slot has room for."""
    stops = set(params.stop_token_ids or ()) | set(() if params.ignore_eos else eos_token_ids)
    room = MAX_EDITS - len(params.logit_bias or ())
    if params.min_tokens and len(stops) > room:
        raise InvalidRequest(
            f"stop_token_ids and the model's own make {len(stops)}; with min_tokens and this logit_bias they must be "
            f"at most {room}",
            "stop_token_ids",
        )


def slot_tokens(tokens: Seq[int], prompt_len: int, max_model_len: int) -> tuple[np.ndarray, np.ndarray]:
    """A sequence's tokens so far and their kinds (2 prompt, 1 output, 0 padding), [S] int32 each."""
    token_S, kind_S = np.zeros(max_model_len, np.int32), np.zeros(max_model_len, np.int32)
    token_S[: len(tokens)] = tokens
    kind_S[: len(tokens)] = 1
    kind_S[:prompt_len] = 2
    return token_S, kind_S


def slot_edits(seq: Sequence | None) -> Edits:
    """A sequence's logit edits: logit_bias for ever, its stop tokens held back until min_tokens. None: no edits.

    Returns: token [Z], value [Z], until [Z]; an entry applies to tokens drawn at a position below ``until``.
    """
    token_Z, value_Z, until_Z = (np.zeros(MAX_EDITS, dtype) for dtype in (np.int32, np.float32, np.int32))
    if seq is None:
        return token_Z, value_Z, until_Z
    p = seq.request.params
    edits = [(token, value, np.iinfo(np.int32).max) for token, value in (p.logit_bias or {}).items()]
    if p.min_tokens:
        until = len(seq.request.prompt_ids) + p.min_tokens
        edits += [(token, -np.inf, until) for token in sorted(seq.stop_ids)]
    assert len(edits) <= MAX_EDITS, f"{len(edits)=} {MAX_EDITS=}"
    for z, (token, value, until) in enumerate(edits):
        token_Z[z], value_Z[z], until_Z[z] = token, value, until
    return token_Z, value_Z, until_Z
