"""Sequences of jobs on their way through a queue: pages, slots, accumulators and examples are never lost."""

import random
from functools import partial

import pytest

from jaxserve.bench.simulator import endless_job
from jaxserve.finetune.queue import FinetuneQueue, Running
from jaxserve.finetune.windows import Lane
from jaxserve.kvcache.pages import PagePool

PAGE, BLOCK, SLOTS, ACC = 4, 4, 4, 40
STASHES = pytest.mark.parametrize("stash_blocks", [0, 30])


class Bench:
    """A queue with two jobs; the device is left out."""

    def __init__(self, stash_blocks=0, num_pages=60, lengths=(5, 30, 17, 9), **config):
        self.stash_blocks, self.cleared = stash_blocks, []
        self.summed = {}  # by lane: tokens of the sequences of its batch whose gradient is complete, in order
        self.pool = PagePool(num_pages, PAGE, enable_prefix_cache=False)
        sizes = SLOTS, ACC, BLOCK, 16
        clear = self.cleared.extend
        self.queue = FinetuneQueue(self.pool, *sizes, stash_blocks=stash_blocks, clear=clear)
        self.jobs = [endless_job(f"job-{i}", lengths, batch_size=3, **config) for i in range(2)]
        self.queue.running = [Running(job, Lane(i, (), (), ())) for i, job in enumerate(self.jobs)]

    def step(self, grad_rows=16, chunk_rows=16):
        """Plans a step and takes its windows for run; returns the batches that end in it."""
        plan = self.queue.draft(grad_rows, chunk_rows, usual=16, plain=False)
        alone = [window.seq.lane.index for window in plan.grads if window.seq.alone]
        assert len(set(alone)) == len(alone)
        self.queue.begin(plan)
        for window in plan.grads:
            if window.start == 0:
                self.summed.setdefault(window.seq.lane.index, []).append(window.seq.token_ids)
        batches = self.queue.retire()
        for job, batch in batches:
            assert sorted(seq.token_ids.size for seq in batch.sequences) == sizes_of(batch.examples)
            summed = self.summed.pop(self.jobs.index(job))
            if job.config.deterministic:
                assert all(a is b.token_ids for a, b in zip(summed, batch.examples, strict=True))
            self.queue.take_back_all(job)
            job.batch = None
        return plan, batches

    def of(self, job):
        return [seq for seq in self.queue.active if self.queue.owner[seq][0] is job]

    def check(self):
        queue = self.queue
        queue.check(SLOTS, ACC, self.stash_blocks)
        self.pool.check([seq.pages for seq in queue.active])
        for seq in queue.active:
            held = [len(seq.pages), len(seq.acc_pages), len(seq.stash_blocks)]
            assert held == [-(-seq.remaining // PAGE)] * 2 + [self.stash_blocks and -(-seq.remaining // BLOCK)]
        for job in self.jobs:
            if job.batch is not None:
                under_way = [seq.token_ids.size for seq in job.batch.sequences]
                assert sorted(under_way + sizes_of(job.batch.waiting)) == sizes_of(job.batch.examples)
            assert queue.is_idle(job) == (not self.of(job))


def sizes_of(examples):
    return sorted(example.num_tokens for example in examples)


@STASHES
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"packing": False},
        {"packing": False, "deterministic": True, "window": 8},
        {"packing": False, "deterministic": True, "lengths": (18, 34, 5, 9)},
    ],
    ids=str,
)
def test_whatever_happens_every_batch_gets_each_of_its_examples_once(stash_blocks, config):
    rng, bench, done = random.Random(1), Bench(stash_blocks, **config), set()
    for _ in range(400):
        job = rng.choice(bench.jobs)
        if rng.random() < 0.2:
            begun = {seq for seq in bench.queue.active if seq.backward_begun}
            rng.choice([partial(bench.queue.hold, job), partial(bench.queue.go_on, job), bench.queue.give_way])()
            assert begun <= set(bench.queue.active)
            bench.check()
        bench.queue.admit(reserve=rng.randrange(3))
        bench.check()
        plan, batches = bench.step(rng.choice([0, 4, 16]), rng.choice([0, 4, 16]))
        assert sum(-(-w.length // BLOCK) * BLOCK for w in plan.grads) <= 16
        assert sum(-(-w.length // BLOCK) * BLOCK for w in plan.forwards) <= 16
        done |= {job.adapter for job, _ in batches}
        bench.check()
    assert done == {"job-0", "job-1"}


@STASHES
def test_a_dropped_job_gives_everything_back_and_the_others_keep_theirs(stash_blocks):
    bench = Bench(stash_blocks)
    one, other = bench.jobs
    bench.queue.admit()
    accumulators = [page for seq in bench.of(one) for page in seq.acc_pages]
    kept = bench.of(other)
    assert accumulators
    assert kept
    bench.queue.drop(one)
    assert sorted(bench.cleared) == sorted(accumulators)
    assert (bench.queue.active, [running.job for running in bench.queue.running]) == (kept, [other])
    assert {job for job, _ in bench.queue.owner.values()} == {other}
    bench.queue.check(SLOTS, ACC, stash_blocks)
    bench.pool.check([seq.pages for seq in kept])


@STASHES
def test_a_held_job_keeps_what_is_in_a_backward_alone_and_begins_nothing(stash_blocks):
    bench = Bench(stash_blocks, lengths=[17] * 3)
    one, other = bench.jobs
    bench.queue.admit()
    if stash_blocks:
        bench.step(grad_rows=0, chunk_rows=64)
    bench.step(grad_rows=8, chunk_rows=16)
    begun, others = [seq for seq in bench.of(one) if seq.backward_begun], bench.of(other)
    assert 0 < len(begun) < len(bench.of(one))
    bench.queue.hold(one)
    assert (bench.of(one), bench.of(other)) == (begun, others)
    for _ in range(100):
        bench.queue.admit()
        bench.step()
        bench.check()
    bench.queue.admit()
    assert (bench.queue.is_idle(one), one.batch is not None, bench.queue.is_idle(other)) == (True, True, False)
    assert bench.queue.has_work
    bench.queue.hold(other)
    bench.queue.go_on(one)
    bench.queue.admit()
    assert bench.of(one)


def test_the_youngest_sequence_without_a_backward_gives_way_and_is_the_next_to_begin():
    bench = Bench()
    bench.queue.admit()
    before = list(bench.queue.active)
    _, batch = bench.queue.owner[before[-1]]
    assert bench.queue.give_way()
    assert bench.queue.active == before[:-1]
    assert batch.waiting[0].token_ids is before[-1].token_ids
    while bench.queue.give_way():
        bench.check()
    assert not bench.queue.active
    bench.queue.admit()
    assert sorted(seq.num_rows for seq in bench.queue.active) == sorted(seq.num_rows for seq in before)


@pytest.mark.parametrize("stash_blocks", [0, 40])
def test_a_sequence_may_need_all_accumulators_and_all_of_the_stash(stash_blocks):
    bench = Bench(stash_blocks, lengths=[ACC * PAGE + 1] * 3)
    bench.queue.admit()
    assert len(bench.queue.active) == 1
    bench.check()


def test_a_queue_whose_jobs_are_held_has_no_work_once_nothing_is_under_way():
    bench = Bench()
    bench.queue.admit()
    bench.queue.hold(bench.jobs[0])
    assert bench.queue.has_work
    bench.queue.hold(bench.jobs[1])
    assert not bench.queue.has_work
    bench.queue.go_on(bench.jobs[1])
    assert bench.queue.has_work


def test_a_sequence_begins_where_others_are_left_their_pages():
    bench = Bench(num_pages=8)
    bench.queue.admit(reserve=8)
    assert not bench.queue.active
    bench.queue.admit(reserve=8 - bench.pool.pages_for(bench.jobs[0].batch.waiting[0].num_tokens - 1))
    assert len(bench.queue.active) == 1


@STASHES
def test_sequences_with_dropout_go_forward_in_programs_that_know_it_alone(stash_blocks):
    bench = Bench(stash_blocks, lengths=[30] * 3, dropout=0.1)
    bench.queue.admit()
    assert {seq.dropout for seq in bench.queue.active} == {0.1}
    assert len({seq.drop_key for seq in bench.queue.active}) > 1
    assert bench.queue.left()[2]
    plain, other = (bench.queue.draft(0, 64, 16, plain=plain).forwards for plain in (True, False))
    assert (len(plain), len(other) > 0) == (0, True)
