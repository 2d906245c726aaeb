"""Derives a packed step's every index a second time, from the sequences themselves, and compares.

The packer's own check knows bounds; this one knows which index it has to be.

Shapes: T rows, R drawn tokens, J work items of the adapters, S adapter sites.
"""

from jaxserve.engine.batch import FROM_DEVICE, NOWHERE, PROMPT_LOGPROBS
from jaxserve.engine.loop import EngineCore
from jaxserve.engine.pack import Packed, Packer
from jaxserve.finetune.windows import FinetunePlan, TrainSequence
from jaxserve.scheduler.plan import Segment, StepPlan
from pallas_kernels.lora_matmul import SINGLE_ROWS


def watch(core: EngineCore) -> None:
    """Audits every step that this engine packs."""
    pack = core.packer.pack

    def audited(plan, *program):
        packed = pack(plan, *program)
        audit(core.packer, plan, packed)
        return packed

    core.packer.pack = audited


def audit(packer: Packer, plan: StepPlan, packed: Packed) -> None:
    """Raises AssertionError unless each index is the one the plan asks for."""
    i, slots, bucket = packed.fields, packer.slots, packed.layout.bucket
    rows, trained = _rows(packer, plan, packed), _window_rows(packer, plan, packed)
    targets = [-1] * bucket.chunk_rows
    for row in range(bucket.rows):
        found = i["token_T"][row], i["position_T"][row], i["slot_T"][row]
        if row in trained:
            seq, position = trained[row]
            assert found == (seq.token_ids[position], position, slots.num_slots + seq.slot), f"row {row}"
            if row >= bucket.grad_rows and seq.forward_only:
                targets[row - bucket.grad_rows] = seq.token_ids[position + 1]
            continue
        if row not in rows:
            assert found[1:] == (-1, slots.all_slots), f"padding row {row}"
            continue
        segment, position = rows[row]
        seq = segment.seq
        known = seq.tokens[position] if position < len(seq.tokens) else FROM_DEVICE
        assert found == (known, position, seq.slot), f"row {row}"
        request = seq.request
        wanted = row < bucket.block_rows and request.params.prompt_logprobs is not None
        if wanted and position + 1 < len(request.prompt_ids):
            targets[row - bucket.grad_rows] = request.prompt_ids[position + 1]
    assert i["target_T"].tolist() == targets, "tokens whose log-probability is wanted"
    assert i["flags"][PROMPT_LOGPROBS] == any(target >= 0 for target in targets), "whether any is"
    for segment in (*plan.chunks, *plan.decodes):
        held = i["page_table_BM"][segment.seq.slot, : len(segment.seq.pages)].tolist()
        assert held == segment.seq.pages, f"page table of {segment.seq}"
    _audit_samples(plan, packed, rows, slots.num_slots)
    if packed.layout.lora_items and plan.finetune is None:
        _audit_adapters(packer, packed, rows)
    if plan.finetune is not None:
        _audit_windows(packer, plan, packed, trained)
    if bucket.stashed:
        _audit_stash(packer, plan, packed)
    for row, (segment, _) in rows.items() if packed.layout.scaled else ():
        lead = slots.lead_page_B[segment.seq.slot]
        assert i["lead_page_T"][row] == lead, f"scales of row {row}"


def _window_rows(packer: Packer, plan: StepPlan, packed: Packed) -> dict[int, tuple[TrainSequence, int]]:
    """(sequence, position) of the finetune windows' rows."""
    rows, (grads, forwards) = {}, plan.finetune or FinetunePlan()
    for windows, first in ((grads, 0), (forwards, packed.layout.bucket.grad_rows + plan.chunk_rows)):
        for window in windows:
            rows |= {first + k: (window.seq, window.start + k) for k in range(window.length)}
            first += -(-window.length // packer.row_block) * packer.row_block
    return rows


def _audit_windows(
    packer: Packer, plan: StepPlan, packed: Packed, trained: dict[int, tuple[TrainSequence, int]]
) -> None:
    """Windows find their pages, and their gradient rows what they predict and each page of the lane they train."""
    i, size, bucket = packed.fields, packer.row_block, packed.layout.bucket
    for window in (*plan.finetune.grads, *plan.finetune.forwards):
        held = i["page_table_BM"][packer.slots.num_slots + window.seq.slot, : len(window.seq.pages)].tolist()
        assert held == window.seq.pages, "page table of a window"
    for window in plan.finetune.grads:
        held = i["acc_table_BM"][packer.slots.num_slots + window.seq.slot, : len(window.seq.acc_pages)].tolist()
        assert held == window.seq.acc_pages, "accumulators of a window"
    rows = {row: each for row, each in trained.items() if row < bucket.grad_rows}
    for row, (seq, position) in rows.items():
        found = i["loss_target_W"][row], i["loss_kind_W"][row]
        assert found == (seq.token_ids[position + 1], seq.targets.kind), f"what row {row} learns"
    for site in range(packed.layout.num_sites) if bucket.grad_rows else ():
        names, count = ("grad_block_SJ", "grad_page_SJ", "grad_lane_SJ"), i["grad_items_S"][site]
        lanes = {row // size: seq.lane for row, (seq, _) in rows.items() if site in seq.lane.sites}
        wanted = [(k, *pages) for k, at in lanes.items() for pages in zip(at.adapter_pages, at.lane_pages, strict=True)]
        found = zip(*(i[name][site, :count].tolist() for name in names), strict=True)
        assert sorted(found) == sorted(wanted), f"gradient items of site {site}"


def _rows(packer: Packer, plan: StepPlan, packed: Packed) -> dict[int, tuple[Segment, int]]:
    """(segment, position) by row."""
    rows, first = {}, packed.layout.bucket.grad_rows
    for segment in plan.chunks:
        rows |= {first + k: (segment, segment.start + k) for k in range(segment.length)}
        first += -(-segment.length // packer.row_block) * packer.row_block
    decodes = sorted(plan.decodes, key=lambda segment: packer.slots.lead_page_B[segment.seq.slot])
    return rows | {packed.layout.bucket.block_rows + k: (s, s.start) for k, s in enumerate(decodes)}


def _audit_stash(packer: Packer, plan: StepPlan, packed: Packed) -> None:
    """Each row block of a window meets the block of the stash that has its rows, and no other block meets any."""
    size, wanted = packer.row_block, {}
    grads, forwards = plan.finetune or ((), ())
    for windows, row in ((grads, 0), (forwards, packed.layout.bucket.grad_rows + plan.chunk_rows)):
        for window in windows:
            blocks = range(-(-window.length // size))
            if window.seq.stash_blocks:
                assert window.start % size == 0, f"a window from row {window.start}"
                own = window.seq.stash_blocks
                wanted |= {row // size + k: own[window.start // size + k] for k in blocks}
            row += len(blocks) * size
    found = packed.fields["stash_block_N"].tolist()
    assert {k: block for k, block in enumerate(found) if block != NOWHERE} == wanted, "blocks of the stash"


def _audit_samples(plan: StepPlan, packed: Packed, rows: dict[int, tuple[Segment, int]], num_slots: int) -> None:
    i = packed.fields
    for k, sample in enumerate(plan.samples):
        segment, position = rows[packed.layout.bucket.first_row + int(i["sample_row_R"][k])]
        wanted = (plan.decodes if sample.kind == "decode" else plan.chunks)[sample.segment_index]
        assert segment is wanted, f"sample {k} reads a row of {segment.seq}"
        assert position == wanted.end - 1, f"sample {k} is not drawn from the segment's last row"
        assert i["sample_slot_R"][k] == sample.seq.slot, f"sample {k} goes to another slot"
        assert i["sample_position_R"][k] == wanted.end, f"position of sample {k}"
        assert i["choice_R"][k] == sample.seq.index, f"choice of sample {k}"
    assert (i["sample_slot_R"][len(plan.samples) :] == num_slots).all(), "padding samples"


def _audit_adapters(packer: Packer, packed: Packed, rows: dict[int, tuple[Segment, int]]) -> None:
    """Every row with an adapter meets each page of its adapter once per site that has it; other rows meet none."""
    i, slots, bucket = packed.fields, packer.slots, packed.layout.bucket
    first_row, chunk_blocks = bucket.first_row, bucket.forward_block_rows // packer.row_block
    for site in range(packed.layout.num_sites):
        wanted, found = [], []
        for row in range(bucket.rows):
            lead = int(slots.lead_page_B[i["slot_T"][row]])
            assert (lead != 0) == (row in rows and rows[row][0].seq.request.adapter is not None), (
                f"adapter of row {row}"
            )
            if lead and site in slots.adapters[lead].sites:
                wanted += [(row, page) for page in slots.adapters[lead].pages]
        count = int(i["items_S"][site])
        items = [i[name][site, :count].tolist() for name in ("block_SJ", "page_SJ", "first_SJ", "stop_SJ")]
        for block, page, first, stop in zip(*items, strict=True):
            single = block >= chunk_blocks
            size = SINGLE_ROWS if single else packer.row_block
            start = bucket.block_rows + (block - chunk_blocks) * SINGLE_ROWS
            start = start if single else first_row + block * packer.row_block
            assert 0 <= first < stop <= size, f"an item of rows {first}..{stop} in a block of {size}"
            found += [(row, page) for row in range(start + first, start + stop)]
        assert sorted(found) == sorted(wanted), f"items of site {site}"
        assert items[0] == sorted(items[0]), f"blocks out of order at site {site}"
        for name in ("block_SJ", "page_SJ", "first_SJ", "stop_SJ"):
            assert not i[name][site, count:].any(), "padding items"
