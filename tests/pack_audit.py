"""Derives a packed step's every index a second time, from the sequences themselves, and compares.

The packer's own check knows bounds; this one knows which index it has to be.

Shapes: T rows, R drawn tokens, N row blocks and Q rows per block of the adapters, J work items, S adapter sites.
"""

from jaxserve.engine.batch import FROM_DEVICE, LORA_ROWS
from jaxserve.engine.loop import EngineCore
from jaxserve.engine.pack import Packed, Packer
from jaxserve.scheduler.plan import Segment, StepPlan


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
    i, slots, chunk_start = packed.fields, packer.slots, packed.layout.bucket.grad_rows
    rows = _rows(packer, plan, packed)
    for row in range(packed.layout.bucket.rows):
        if row not in rows:
            if plan.finetune is None:  # else it may be a row of a finetune window
                assert (i["position_T"][row], i["slot_T"][row]) == (-1, slots.all_slots), f"padding row {row}"
            continue
        segment, position = rows[row]
        seq = segment.seq
        known = seq.tokens[position] if position < len(seq.tokens) else FROM_DEVICE
        assert (i["token_T"][row], i["position_T"][row], i["slot_T"][row]) == (known, position, seq.slot), f"row {row}"
        if row < packed.layout.bucket.block_rows and i["target_T"][row - chunk_start] != -1:
            assert i["target_T"][row - chunk_start] == seq.request.prompt_ids[position + 1], f"target of row {row}"
    for segment in (*plan.chunks, *plan.decodes):
        held = i["page_table_BM"][segment.seq.slot, : len(segment.seq.pages)].tolist()
        assert held == segment.seq.pages, f"page table of {segment.seq}"
    _audit_samples(plan, packed, rows, slots.num_slots)
    if "row_NQ" in i and plan.finetune is None:
        _audit_adapters(packer, packed, rows)
    for row, (segment, _) in rows.items() if packed.layout.scaled else ():
        lead = slots.lead_page_B[segment.seq.slot]
        assert i["lead_page_T"][row] == lead, f"scales of row {row}"


def _rows(packer: Packer, plan: StepPlan, packed: Packed) -> dict[int, tuple[Segment, int]]:
    """(segment, position) by row."""
    rows, first = {}, packed.layout.bucket.grad_rows
    for segment in plan.chunks:
        rows |= {first + k: (segment, segment.start + k) for k in range(segment.length)}
        first += -(-segment.length // packer.row_block) * packer.row_block
    return rows | {packed.layout.bucket.block_rows + k: (s, s.start) for k, s in enumerate(plan.decodes)}


def _audit_samples(plan: StepPlan, packed: Packed, rows: dict[int, tuple[Segment, int]], num_slots: int) -> None:
    i = packed.fields
    for k, sample in enumerate(plan.samples):
        segment, position = rows[int(i["sample_row_R"][k])]
        wanted = (plan.decodes if sample.kind == "decode" else plan.chunks)[sample.segment_index]
        assert segment is wanted, f"sample {k} reads a row of {segment.seq}"
        assert position == wanted.end - 1, f"sample {k} is not drawn from the segment's last row"
        assert i["sample_slot_R"][k] == sample.seq.slot, f"sample {k} goes to another slot"
        assert i["sample_position_R"][k] == wanted.end, f"position of sample {k}"
        assert i["choice_R"][k] == sample.seq.index, f"choice of sample {k}"
    assert (i["sample_slot_R"][len(plan.samples) :] == num_slots).all(), "padding samples"


def _audit_adapters(packer: Packer, packed: Packed, rows: dict[int, tuple[Segment, int]]) -> None:
    """Every row sits in exactly one block, of its own adapter; every block meets its adapter's pages once per site."""
    i, slots = packed.fields, packer.slots
    num_blocks, num_rows = i["row_NQ"].shape[0], packed.layout.bucket.rows
    lead_of_block: dict[int, int] = {}
    for row in range(num_rows):
        lead = int(slots.lead_page_B[i["slot_T"][row]])
        assert (lead != 0) == (row in rows and rows[row][0].seq.request.adapter is not None), f"adapter of row {row}"
        place = int(i["place_T"][row])
        if lead == 0:
            assert place == num_blocks * LORA_ROWS, f"row {row} has no adapter and is in block {place // LORA_ROWS}"
            continue
        block, at = divmod(place, LORA_ROWS)
        assert i["row_NQ"][block, at] == row, f"place of row {row}"
        assert lead_of_block.setdefault(block, lead) == lead, f"block {block} has rows of two adapters"
    filled = {(b, q) for b in range(num_blocks) for q in range(LORA_ROWS) if i["row_NQ"][b, q] < num_rows}
    assert len(filled) == sum(i["place_T"] < num_blocks * LORA_ROWS), "a block has a row that is not its own"
    assert (i["row_NQ"] <= num_rows).all(), "a row that does not exist"
    for site in range(i["items_S"].shape[0]):
        count = int(i["items_S"][site])
        items = list(zip(i["block_SJ"][site, :count].tolist(), i["page_SJ"][site, :count].tolist(), strict=True))
        adapters = {block: slots.adapters[lead] for block, lead in sorted(lead_of_block.items())}
        wanted = [(block, page) for block, a in adapters.items() if site in a.sites for page in a.pages]
        assert items == wanted, f"items of site {site}"
        assert not i["block_SJ"][site, count:].any(), "padding items"
        assert not i["page_SJ"][site, count:].any(), "padding items"
