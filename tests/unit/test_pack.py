"""Packed steps carry the index the plan asks for, everywhere; a wrong one is noticed.

Plans come from the real scheduler over a fake device: whatever it draws, the packer must follow.
"""

import dataclasses

import numpy as np
import pack_audit
import pytest

from jaxserve.engine.batch import FROM_DEVICE, SLOT_FLOATS, BatchLayout
from jaxserve.engine.buckets import Buckets
from jaxserve.engine.gradient import TrainShape
from jaxserve.engine.pack import AdapterRows, Packer, Slots, check_edits, slot_edits
from jaxserve.engine.state import MAX_EDITS
from jaxserve.errors import EngineError, InvalidRequest
from jaxserve.finetune.windows import FinetunePlan, Lane, Targets, TrainSequence, WindowRows, total_rows
from jaxserve.kvcache.pages import PagePool
from jaxserve.sampling import SamplingParams
from jaxserve.scheduler.plan import StepResult
from jaxserve.scheduler.request import Request
from jaxserve.scheduler.scheduler import Scheduler, SchedulerConfig

NUM_SLOTS, PAGE, ROW_BLOCK, NUM_PAGES, MAX_LEN, VOCAB = 8, 4, 4, 60, 48, 50
BANK_PAGES = 15


class Adapter:
    """An adapter of one or more bank pages; resident for ever."""

    def __init__(self, name, pages, sites):
        self.name, self.rows = name, AdapterRows(pages, sites)


ADAPTERS = (
    None,
    Adapter("a", (1,), (0, 1, 2, 3)),
    Adapter("b", (4, 2, 5), (0, 3)),
    Adapter("c", (3, 6), (1,)),
)


class Resident:
    def try_acquire(self, adapter):
        return True

    def release(self, adapter):
        pass


class Driver:
    """Scheduler and packer in a loop; ``steps`` yields every (plan, packed)."""

    def __init__(self, seed=0, train=None, **limits):
        self.rng = np.random.default_rng(seed)
        config = SchedulerConfig(
            max_num_seqs=NUM_SLOTS, max_num_batched_tokens=24, max_model_len=MAX_LEN, row_block=ROW_BLOCK, **limits
        )
        self.scheduler = Scheduler(config, PagePool(NUM_PAGES, PAGE), Resident())
        sizes = (config.max_chunk_rows, train is not None and train.stash_blocks > 0) if train else (0, False)
        self.buckets = Buckets.make(config.max_chunk_rows, NUM_SLOTS, ROW_BLOCK, *sizes)
        train_slots = train.num_slots if train else 0
        slots = Slots(NUM_SLOTS, MAX_LEN // PAGE, train_slots)
        shape = NUM_SLOTS, MAX_LEN // PAGE, 40, 4, train_slots, 40, ROW_BLOCK
        layouts = {(b, False): BatchLayout(b, *shape) for b in self.buckets}
        self.packer = Packer(slots, layouts, ROW_BLOCK, NUM_PAGES, PAGE, VOCAB, BANK_PAGES, train)

    def add(self, i):
        rng = self.rng
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 16)),
            seed=i,
            n=int(rng.choice([1, 1, 3])),
            temperature=float(rng.choice([0.0, 0.8])),
            top_k=int(rng.choice([0, 7])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            logprobs=int(rng.integers(3)) if rng.random() < 0.5 else None,
            prompt_logprobs=1 if rng.random() < 0.5 else None,
            logit_bias={1: 2.0} if rng.random() < 0.3 else None,
        )
        prompt = tuple(rng.integers(0, VOCAB, rng.integers(1, 32)).tolist())
        adapter = ADAPTERS[rng.integers(len(ADAPTERS))]
        digest = adapter.name.encode() if adapter else b""
        self.scheduler.add(
            Request(id=str(i), prompt_ids=prompt, params=params, adapter=adapter, adapter_digest=digest, arrival=i)
        )

    def pack(self, plan):
        for seq in plan.started:
            adapter = seq.request.adapter
            self.packer.slots.admit(seq, adapter and adapter.rows, edited=bool(seq.request.params.logit_bias))
        grads, forwards = plan.finetune or FinetunePlan()
        chunk_rows = plan.chunk_rows + total_rows(forwards, ROW_BLOCK)
        bucket = self.buckets.fit(chunk_rows, len(plan.decodes), total_rows(grads, ROW_BLOCK))
        return self.packer.pack(plan, bucket)

    def windows(self, plan):
        """Windows of any four sequences: two in the gradient rows, two in what chunks leave of the others."""
        rng, train, kinds, left = self.rng, self.packer.train, ([], []), [24, 24 - plan.chunk_rows]
        for slot in range(4):
            length = int(rng.integers(8, MAX_LEN + 1))
            lane = Lane(slot, (7 + 2 * slot, 8 + 2 * slot), (slot, 3), (2 * slot, 2 * slot + 1))
            targets = Targets(weights=np.ones(length, np.float32), kind=int(rng.integers(3)))
            seq = TrainSequence(
                rng.integers(0, VOCAB, length), targets, lane, slot=slot, forward_only=slot > 1 and rng.random() < 0.5,
                row_block=ROW_BLOCK, pages=rng.permutation(NUM_PAGES)[: -(-length // PAGE)].tolist(),
            )  # fmt: skip
            seq.acc_pages = rng.permutation(train.acc_pages)[: len(seq.pages)].tolist()
            if train.stash_blocks and not seq.forward_only:
                seq.stash_blocks = rng.permutation(train.stash_blocks)[: -(-length // ROW_BLOCK)].tolist()
            start = int(rng.integers(seq.num_rows) // ROW_BLOCK * ROW_BLOCK)
            if left[slot > 1]:
                most = min(left[slot > 1], 12, seq.num_rows - start)
                kinds[slot > 1].append(WindowRows(seq, start, int(rng.integers(1, most + 1))))
                left[slot > 1] -= total_rows(kinds[slot > 1][-1:], ROW_BLOCK)
        return FinetunePlan(*map(tuple, kinds))

    def steps(self, num_requests=30):
        """Runs a step ahead, as the engine does."""
        for i in range(num_requests):
            self.add(i)
        flying = []
        while self.scheduler.has_work():
            plan = self.scheduler.plan(0.0)
            if plan is not None:
                plan = plan.beside(self.windows(plan)) if self.packer.train else plan
                yield plan, self.pack(plan)
                flying.append(plan)
            if flying and (plan is None or len(flying) > 1):
                done = flying.pop(0)
                tokens = self.rng.integers(0, VOCAB, len(done.samples)).tolist()
                self.scheduler.commit(done, StepResult(tokens=tokens, finite=[True] * len(tokens)))


@pytest.mark.parametrize("seed", range(3))
def test_every_index_is_the_one_the_plan_asks_for(seed):
    driver, seen = Driver(seed), set()
    for plan, packed in driver.steps():
        pack_audit.audit(driver.packer, plan, packed)
        seen |= {"chunks"} if plan.chunks else set()
        seen |= {"from device"} if (packed.fields["token_T"] == FROM_DEVICE).any() else set()
        seen |= {"adapters"} if packed.fields["items_S"].any() else set()
        seen |= {"targets"} if (packed.fields["target_T"] >= 0).any() else set()
    assert seen == {"chunks", "from device", "adapters", "targets"}


@pytest.mark.parametrize("stash_blocks", [0, 20])
def test_finetune_windows_beside_requests_have_every_index_that_they_ask_for(stash_blocks):
    train = TrainShape(num_slots=4, acc_pages=20, lane_pages=8, num_lanes=4, stash_blocks=stash_blocks)
    driver, seen = Driver(3, train), set()
    for plan, packed in driver.steps(60):
        pack_audit.audit(driver.packer, plan, packed)
        seen |= {tuple(window.seq.forward_only for window in plan.finetune.forwards)} if plan.chunks else set()
    assert seen == {(), (False,), (True,), (False, False), (False, True), (True, False), (True, True)}


INDEX_FIELDS = (
    "token_T",
    "position_T",
    "slot_T",
    "page_table_BM",
    "target_T",
    "sample_row_R",
    "sample_slot_R",
    "sample_position_R",
    "choice_R",
    "block_SJ",
    "page_SJ",
    "first_SJ",
    "stop_SJ",
)
OTHER_FIELDS = {"flags", "seed_R2", "top_k_R", "items_S", "edited_R", "counted_R"}


def test_every_field_is_an_index_or_known_not_to_be_one():
    bucket = next(iter(Buckets.make(16, 8, 4)))
    fields = set(BatchLayout(bucket, 8, 4, 2).int_fields)
    assert fields <= set(INDEX_FIELDS) | OTHER_FIELDS, "a new index array needs its bounds, and its place here"


def in_use(name, plan, packed, packer):
    """Places of an index array whose entries the device makes use of."""
    i, values = packed.fields, packed.fields[name]
    if name in ("token_T", "position_T", "slot_T"):
        return np.argwhere(i["position_T"] >= 0)
    if name == "page_table_BM":
        segments = (*plan.chunks, *plan.decodes)
        return np.array([(s.seq.slot, k) for s in segments for k in range(len(s.seq.pages))])
    if name == "target_T":
        return np.argwhere(values >= 0)
    if name.endswith("_R"):
        return np.arange(len(plan.samples))[:, None]
    return np.array([(site, k) for site in range(4) for k in range(i["items_S"][site])])


@pytest.mark.parametrize("name", INDEX_FIELDS)
def test_one_more_in_any_index_is_noticed(name):
    """100 % of single off-by-ones, by the bounds or by the audit that every test engine runs under."""
    driver, tried = Driver(1), 0
    for plan, packed in driver.steps(20):
        values = packed.fields[name]
        places = in_use(name, plan, packed, driver.packer)
        for place in driver.rng.permutation(places)[:3]:
            values[tuple(place)] += 1
            with pytest.raises((EngineError, AssertionError, KeyError)):
                check_and_audit(driver.packer, plan, packed)
            values[tuple(place)] -= 1
            tried += 1
        pack_audit.audit(driver.packer, plan, packed)
    assert tried > 20


def check_and_audit(packer, plan, packed):
    packer._check(packed.fields, packed.layout)
    pack_audit.audit(packer, plan, packed)


BOUNDED = {
    "token_T": (FROM_DEVICE, VOCAB),
    "position_T": (-1, MAX_LEN),
    "slot_T": (0, NUM_SLOTS + 1),
    "page_table_BM": (0, NUM_PAGES),
    "target_T": (-1, VOCAB),
    "sample_slot_R": (0, NUM_SLOTS + 1),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_an_index_out_of_bounds_never_reaches_the_device(name):
    driver = Driver(2)
    _, packed = next(iter(driver.steps(3)))
    for value in (BOUNDED[name][0] - 1, BOUNDED[name][1]):
        broken = {key: array.copy() for key, array in packed.fields.items()}
        broken[name].reshape(-1)[0] = value
        with pytest.raises(EngineError, match=name):
            driver.packer._check(broken, packed.layout)


def test_whatever_is_packed_is_checked():
    driver = Driver(2)
    driver.packer.vocab_size = 1
    with pytest.raises(EngineError, match="token_T"):
        next(iter(driver.steps(3)))


@pytest.mark.parametrize("name", ["sample_row_R", "block_SJ", "page_SJ", "first_SJ", "stop_SJ"])
def test_an_index_past_its_arrays_end_never_reaches_the_device(name):
    driver = Driver(2)
    plan, packed = next((p, q) for p, q in driver.steps(8) if p.samples and q.fields["items_S"].any())
    broken = {key: array.copy() for key, array in packed.fields.items()}
    place = tuple(in_use(name, plan, packed, driver.packer)[0])
    for value in (-1, 10**6):
        broken[name][place] = value
        with pytest.raises(EngineError, match=name):
            driver.packer._check(broken, packed.layout)


# what a slot keeps of its sequence


def sequence(**params):
    scheduler = Driver().scheduler
    params = SamplingParams(**{"seed": 1, "max_tokens": 9} | params)
    (seq, *_) = scheduler.add(Request(id="x", prompt_ids=(1, 2, 3), params=params))
    seq.slot = 5
    return seq


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, -(2**63), 2**32])
def test_all_64_bits_of_a_seed_reach_the_device(seed):
    slots = Slots(NUM_SLOTS, 4)
    slots.admit(sequence(seed=seed), None, edited=False)
    assert int(slots.seed_B2[5].view(np.uint64)[0]) == seed % 2**64


@pytest.mark.parametrize(("temperature", "kept"), [(0.0, 0.0), (1e-30, 0.0), (9e-6, 0.0), (1e-5, 1e-5), (2.0, 2.0)])
def test_temperatures_too_small_to_divide_by_are_greedy(temperature, kept):
    slots = Slots(NUM_SLOTS, 4)
    slots.admit(sequence(temperature=temperature), None, edited=False)
    assert slots.float_FB[SLOT_FLOATS.index("temperature"), 5] == np.float32(kept)


def test_logit_edits_are_the_bias_for_ever_and_the_stop_tokens_until_min_tokens():
    seq = sequence(logit_bias={4: 1.5, 9: -2.0}, min_tokens=3, stop_token_ids=[7, 6])
    token_Z, value_Z, until_Z = slot_edits(seq)
    forever = np.iinfo(np.int32).max
    edits = list(zip(token_Z.tolist(), value_Z.tolist(), until_Z.tolist(), strict=True))
    assert edits[:4] == [(4, 1.5, forever), (9, -2.0, forever), (6, -np.inf, 6), (7, -np.inf, 6)]
    assert set(edits[4:]) == {(0, 0.0, 0)}


def test_more_edits_than_a_slot_holds_are_refused_before_they_are_queued():
    params = SamplingParams(min_tokens=1, stop_token_ids=list(range(MAX_EDITS - 2)), logit_bias={1: 1.0})
    check_edits(params, eos_token_ids=(MAX_EDITS,))
    with pytest.raises(InvalidRequest, match=f"make {MAX_EDITS}.*at most {MAX_EDITS - 1}"):
        check_edits(params, eos_token_ids=(MAX_EDITS, MAX_EDITS + 1))
    check_edits(dataclasses.replace(params, ignore_eos=True), eos_token_ids=range(1000, 2000))
    check_edits(dataclasses.replace(params, min_tokens=0), eos_token_ids=range(1000, 2000))
