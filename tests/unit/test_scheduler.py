"""The scheduler, one decision at a time."""

import time

import pytest
from fake_engine import EOS, FakeAdapter, FakeEngine, expected

from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.kvcache.pages import PagePool
from jaxserve.sampling import SamplingParams
from jaxserve.scheduler.plan import StepResult
from jaxserve.scheduler.policy import Fcfs
from jaxserve.scheduler.request import Request, State
from jaxserve.scheduler.scheduler import Scheduler, SchedulerConfig

G = 4


def engine(pages=32, prefix_cache=True, adapter_slots=2, run_ahead=1, report_chunks=True, **config):
    limits = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "row_block": 4,
        "eos_token_ids": (EOS,),
    }
    pool = PagePool(pages, G, prefix_cache)
    return FakeEngine(
        SchedulerConfig(**{**limits, **config}),
        pool,
        adapter_slots=adapter_slots,
        run_ahead=run_ahead,
        report_chunks=report_chunks,
    )


def request(id="r", prompt=6, max_tokens=4, adapter=None, priority=0, arrival=0.0, salt="", tenant="", **params):
    params = {"ignore_eos": True, **params}
    return Request(
        id=id,
        prompt_ids=tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        adapter=adapter,
        adapter_digest=adapter.digest if adapter else b"",
        priority=priority,
        arrival=arrival,
        salt=salt,
        tenant=tenant,
    )


def rows(segments):
    return [(segment.seq.request.id, segment.start, segment.length) for segment in segments]


# refusals


@pytest.mark.parametrize(
    ("refused", "config", "words"),
    [
        (request(prompt=0), {}, "at least 1 token"),
        (request(prompt=60, max_tokens=5), {}, "context length of 64"),
        (request(prompt=64, max_tokens=None), {}, "context length of 64"),
        (request(prompt=60, max_tokens=None, min_tokens=5), {}, "min_tokens is 5.* context length of 64"),
        (request(prompt=40, max_tokens=20), {"pages": 8}, "15 KV pages for 60 tokens; the pool has 8"),
        (request(n=5), {}, "n is 5; it must be at most max_num_seqs 4"),
        (request(prompt=17), {"enable_chunked_prefill": False}, "fit one step of 16"),
    ],
    ids=[
        "empty",
        "too long",
        "no room for one output",
        "no room for min_tokens",
        "too many pages",
        "too many choices",
        "longer than a step",
    ],
)
def test_a_request_that_never_fits_is_refused_with_the_limit_named(refused, config, words):
    fake = engine(**config)
    with pytest.raises(InvalidRequest, match=words):
        fake.add(refused)
    assert not fake.scheduler.has_work()


@pytest.mark.parametrize("lengths", [{"max_tokens": 4}, {"max_tokens": None, "min_tokens": 4}], ids=str)
def test_the_largest_request_that_fits_is_served(lengths):
    fake = engine(pages=16)
    (seq,) = fake.add(request(prompt=60, **lengths))
    fake.run()
    assert (seq.num_outputs, seq.finish_reason) == (4, "length")


def test_the_last_token_needs_no_page():
    fake = engine(pages=2)
    (seq,) = fake.add(request(prompt=6, max_tokens=3))
    fake.run()
    assert seq.num_outputs == 3
    with pytest.raises(InvalidRequest, match="KV pages"):
        fake.add(request(prompt=6, max_tokens=4))


def test_without_max_tokens_the_context_is_the_limit():
    fake = engine()
    (seq,) = fake.add(request(prompt=6, max_tokens=None))
    fake.run()
    assert (len(seq.tokens), seq.finish_reason) == (64, "length")


def test_an_id_is_taken_as_long_as_its_request_lives():
    fake = engine()
    fake.add(request())
    with pytest.raises(InvalidRequest, match="'r' is in use"):
        fake.add(request())
    fake.run()
    fake.add(request())


def test_the_queue_is_charged_per_choice():
    fake = engine(max_queue=5)
    fake.add(request("a", n=3))
    with pytest.raises(InvalidRequest, match="max_queue 5") as refusal:
        fake.add(request("b", n=3))
    assert refusal.value.param == "max_queue"
    fake.add(request("c", n=2))
    assert fake.scheduler.counts().waiting == 5


def test_a_wrong_config_is_refused_with_all_its_problems():
    with pytest.raises(ConfigError) as refusal:
        SchedulerConfig(max_num_seqs=0, max_num_batched_tokens=4, max_model_len=0, policy="luck")
    assert len(refusal.value.errors) == 3


def test_a_budget_below_one_row_block_is_refused():
    with pytest.raises(ConfigError, match="at least 8"):
        SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=4, max_model_len=8, row_block=8)


# chunks and decodes


def test_a_prompt_is_cut_into_chunks_and_only_the_last_one_draws():
    fake = engine()
    fake.add(request(prompt=40))
    plans = [fake.dispatch() for _ in range(3)]
    assert [rows(plan.chunks) for plan in plans] == [[("r", 0, 16)], [("r", 16, 16)], [("r", 32, 8)]]
    assert [len(plan.samples) for plan in plans] == [0, 0, 1]
    assert [(plan.chunk_rows, plan.num_rows) for plan in plans] == [(16, 16), (16, 16), (8, 8)]


def test_a_prompt_is_cut_where_the_planner_leaves_less_room_than_a_step_has():
    scheduler = engine().scheduler
    scheduler.add(request(prompt=20))
    assert rows(scheduler.plan(0.0, room=8).chunks) == [("r", 0, 8)]


def test_chunks_take_whole_row_blocks_of_the_budget():
    fake = engine()
    for name in "abc":
        fake.add(request(name, prompt=5))
    plan = fake.dispatch()
    assert rows(plan.chunks) == [("a", 0, 5), ("b", 0, 5)]
    assert plan.chunk_rows == 16


def test_a_running_prompt_goes_on_before_a_new_one_starts():
    fake = engine()
    fake.add(request("long", prompt=20))
    fake.dispatch()
    fake.add(request("early", prompt=8, arrival=-1.0))
    assert rows(fake.dispatch().chunks) == [("long", 16, 4), ("early", 0, 8)]


def test_decode_rows_leave_the_chunk_budget_alone():
    fake = engine()
    fake.add(request("a", prompt=16))
    fake.dispatch()
    fake.add(request("b", prompt=16, max_tokens=1))
    plan = fake.dispatch()
    assert (rows(plan.decodes), rows(plan.chunks)) == ([("a", 16, 1)], [("b", 0, 16)])
    assert plan.num_rows == 17


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_holds_all_of_it():
    fake = engine(enable_chunked_prefill=False)
    fake.add(request("a", prompt=8))
    fake.add(request("b", prompt=12))
    assert rows(fake.dispatch().chunks) == [("a", 0, 8)]
    assert rows(fake.dispatch().chunks) == [("b", 0, 12)]


def test_the_next_step_is_planned_before_the_last_ones_tokens_are_read():
    fake = engine()
    (seq,) = fake.add(request(prompt=6))
    fake.dispatch()
    assert (seq.num_pending, seq.num_outputs) == (1, 0)
    plan = fake.dispatch()
    assert rows(plan.decodes) == [("r", 6, 1)]
    assert plan.decodes[0].start >= len(seq.tokens)  # the device has to put in its own last token
    fake.collect()
    assert (seq.num_pending, seq.num_outputs) == (1, 1)


def test_nothing_is_planned_beyond_the_last_token():
    fake = engine()
    (seq,) = fake.add(request(prompt=6, max_tokens=2))
    assert fake.dispatch()
    assert fake.dispatch()
    assert fake.dispatch() is None
    fake.collect()
    assert [outcome.finish_reason for outcome in fake.collect()] == ["length"]
    assert seq.num_outputs == 2


def test_a_row_planned_before_its_sequence_ended_is_ignored():
    fake = engine()
    (seq,) = fake.add(request(prompt=6, max_tokens=20))
    fake.dispatch()
    fake.dispatch()
    fake.collect()
    fake.finish(seq)
    assert fake.collect() == []
    assert seq.num_outputs == 1
    fake.check_idle()


def test_decode_rows_are_the_same_object_until_somebody_comes_or_goes():
    fake = engine()
    fake.add(request("a", prompt=6, max_tokens=9))
    fake.dispatch()
    plans = [fake.dispatch() for _ in range(2)]
    fake.add(request("b", prompt=[7] * 5, max_tokens=4))
    plans += [fake.dispatch() for _ in range(3)]
    groups = [[seq.request.id for seq in plan.decoding] for plan in plans]
    assert groups == [["a"], ["a"], ["a"], ["a", "b"], ["a", "b"]]
    assert plans[0].decoding is plans[2].decoding
    assert plans[3].decoding is plans[4].decoding
    assert [plan.positions for plan in plans[1:4]] == [[7], [8], [9, 5]]
    assert [[sample.segment_index for sample in plan.samples] for plan in plans[2:4]] == [[0, 0], [0, 1]]


def test_only_rows_that_do_not_go_on_are_told_apart():
    fake = engine(run_ahead=3, max_num_batched_tokens=32)
    short, long = (fake.add(request(str(n), prompt=[n] * 5, max_tokens=n))[0] for n in (2, 9))
    over = fake.add(request("over", prompt=[1] * 5, max_tokens=9))[0]
    for _ in range(2):
        fake.dispatch()
    fake.collect()
    fake.finish(over)
    plan, result = fake.flying.popleft()
    read = fake.scheduler.read(plan, result)
    assert plan.decoding == (short, long, over)
    assert read.apart == {0, 2}
    assert [(outcome.seq, outcome.finish_reason, outcome.sample) for outcome in read.outcomes] == [(short, "length", 0)]
    assert (long.num_outputs, over.num_outputs) == (2, 1)


def test_outcomes_come_in_the_order_of_the_samples():
    fake = engine(run_ahead=3)
    first, second = (fake.add(request(str(n), prompt=[n] * 5, max_tokens=n))[0] for n in (9, 2))
    fake.dispatch()
    third = fake.add(request("c", prompt=[3] * 5))[0]
    fake.dispatch()
    fake.collect()
    outcomes = fake.collect()
    assert [(outcome.seq, outcome.sample) for outcome in outcomes] == [(first, 0), (second, 1), (third, 2)]
    assert [outcome.finish_reason for outcome in outcomes] == [None, "length", None]


def test_steps_are_committed_in_order():
    fake = engine()
    fake.add(request(prompt=20))
    fake.dispatch()
    late = fake.dispatch()
    with pytest.raises(AssertionError, match="0 is due"):
        fake.scheduler.commit(late, StepResult(tokens=[1], finite=[True]))


def test_a_plan_names_the_sequences_that_have_a_new_slot():
    fake = engine()
    group = fake.add(request(n=3))
    assert list(fake.dispatch().started) == group
    assert sorted(seq.slot for seq in group) == [0, 1, 2]
    assert fake.dispatch().started == ()


# order


def test_requests_start_in_order_of_arrival():
    fake = engine(max_num_seqs=1)
    for name, arrival in (("late", 2.0), ("early", 1.0)):
        fake.add(request(name, arrival=arrival, priority=int(-arrival)))
    assert rows(fake.dispatch().chunks)[0][0] == "early"


def test_under_the_priority_policy_lower_values_start_first_and_arrival_breaks_ties():
    fake = engine(policy="priority", max_num_batched_tokens=8)
    for name, priority, arrival in (("c", 1, 0.0), ("b", 0, 2.0), ("a", 0, 1.0)):
        fake.add(request(name, prompt=8, priority=priority, arrival=arrival))
    assert [rows(fake.dispatch().chunks)[0][0] for _ in range(3)] == ["a", "b", "c"]


def test_a_policy_object_may_order_the_queue_as_it_likes():
    class LastComeFirst(Fcfs):
        def order(self, waiting, now):
            return reversed(waiting)

    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=16, max_model_len=64)
    scheduler = Scheduler(config, PagePool(8, G), residency=None, policy=LastComeFirst())
    scheduler.add(request("a"))
    scheduler.add(request("b"))
    assert rows(scheduler.plan(0.0).chunks)[0][0] == "b"


def test_nobody_passes_a_request_that_waits_for_pages():
    fake = engine(pages=8, prefix_cache=False)
    fake.add(request("first", prompt=16, max_tokens=10))
    fake.add(request("big", prompt=20))
    fake.add(request("small", prompt=1))
    assert rows(fake.dispatch().chunks) == [("first", 0, 16)]
    assert rows(fake.dispatch().chunks) == []


def test_prompts_wait_while_rows_of_one_are_left_or_a_slot_is_free_for_one():
    fake = engine(max_num_seqs=1)
    assert not fake.scheduler.has_prompts
    fake.add(request("a", prompt=20))
    assert fake.scheduler.has_prompts
    fake.add(request("b"))
    fake.dispatch()
    assert fake.scheduler.has_prompts
    fake.dispatch()
    assert not fake.scheduler.has_prompts


# pages and preemption


def test_pages_that_somebody_else_gives_back_come_before_a_preemption():
    fake = engine(pages=8, prefix_cache=False)
    lent = fake.pool.alloc(3)

    def give_back():
        had_some = bool(lent)
        fake.pool.free([lent.pop()] if lent else [])
        return had_some

    fake.scheduler.reclaim = give_back
    pair = [fake.add(request(name, prompt=8, max_tokens=9))[0] for name in ("old", "young")]
    while fake.scheduler.has_work():
        fake.step()
    assert (lent, [seq.num_preempted for seq in pair]) == ([], [0, 0])


def test_the_youngest_is_preempted_and_recomputed_with_the_same_tokens():
    fake = engine(pages=8, prefix_cache=False)
    old, young = (fake.add(request(name, prompt=8, max_tokens=17))[0] for name in ("old", "young"))
    fake.run()
    fake.check_idle()
    assert (old.num_preempted, young.num_preempted > 0) == (0, True)
    assert fake.scheduler.counts().prompt_tokens == 16  # a recompute is not a prompt once more
    for seq in (old, young):
        assert seq.output_ids == expected(seq.request, 0, fake.config)[0]


def test_the_least_important_is_preempted_under_the_priority_policy():
    fake = engine(pages=8, prefix_cache=False, policy="priority")
    low, high = (
        fake.add(request(name, prompt=8, max_tokens=17, priority=priority, arrival=arrival))[0]
        for name, priority, arrival in (("low", 5, 0.0), ("high", 1, 1.0))
    )
    fake.run()
    assert (low.num_preempted > 0, high.num_preempted) == (True, 0)


def test_a_preempted_request_is_first_in_the_queue_again():
    fake = engine(pages=8, prefix_cache=False)
    fake.add(request("old", prompt=8, max_tokens=17))
    (young,) = fake.add(request("young", prompt=8, max_tokens=17))
    while not young.num_preempted:
        if young.num_outputs == 2:
            fake.add(request("newcomer", prompt=1))
        fake.step()
    assert [seq.request.id for seq in fake.scheduler.waiting] == ["young", "newcomer"]
    assert (young.state, young.pages, young.slot) == (State.WAITING, [], None)


def test_a_sequence_that_finds_nobody_behind_it_sits_out_and_keeps_its_pages():
    fake = engine(pages=4, prefix_cache=False)
    (old,) = fake.add(request("old", prompt=8, max_tokens=5))
    (young,) = fake.add(request("young", prompt=2, max_tokens=8))
    decoded = []
    while old.state is not State.FINISHED:
        fake.step()
        decoded += [[row[0] for row in rows(plan.decodes)] for plan, _ in fake.flying]
    assert ["old"] in decoded
    assert (young.state, len(young.pages), young.num_preempted) == (State.RUNNING, 1, 0)
    fake.run()
    assert young.output_ids == expected(young.request, 0, fake.config)[0]


def test_a_token_on_its_way_survives_the_preemption_of_its_sequence():
    fake = engine(pages=8, prefix_cache=False)
    fake.add(request("old", prompt=8, max_tokens=17))
    (young,) = fake.add(request("young", prompt=8, max_tokens=17))
    while not (plan := fake.dispatch()).preempted:
        if len(fake.flying) > 1:
            fake.collect()
    assert plan.preempted == (young,)
    before = young.num_outputs
    fake.collect()
    assert (young.num_outputs, young.num_pending) == (before + 1, 0)


def test_the_first_tokens_time_outlives_a_preemption():
    fake = engine(pages=8, prefix_cache=False)
    fake.add(request("old", prompt=8, max_tokens=17))
    (young,) = fake.add(request("young", prompt=8, max_tokens=17))
    while not young.num_outputs:
        fake.step()
    assert young.first_token_at == fake.clock
    before = fake.clock
    fake.run()
    assert (young.num_preempted > 0, young.first_token_at) == (True, before)


def test_a_recompute_longer_than_a_step_is_cut_even_without_chunked_prefill():
    fake = engine(pages=12, prefix_cache=False, enable_chunked_prefill=False)
    for name in ("old", "young"):
        fake.add(request(name, prompt=8, max_tokens=30))
    young = fake.sequences[1]
    while young.num_preempted == 0 or young.state is State.WAITING:
        fake.step()
    assert young.prefill_end > fake.config.max_chunk_rows
    fake.run()
    assert young.output_ids == expected(young.request, 0, fake.config)[0]


def test_eight_pages_serve_many_long_requests():
    fake = engine(pages=8, max_num_seqs=4)
    for name in range(12):
        fake.add(request(str(name), prompt=[name % 5] * 7, max_tokens=26))
    fake.run()
    fake.check_idle()
    assert fake.scheduler.counts().preemptions > 0
    for seq in fake.sequences:
        assert seq.output_ids == expected(seq.request, 0, fake.config)[0]


# prefix cache


def test_a_second_request_starts_behind_the_pages_of_the_first():
    fake = engine()
    fake.add(request("a", prompt=10))
    fake.run()
    (seq,) = fake.add(request("b", prompt=10))
    assert rows(fake.dispatch().chunks) == [("b", 8, 2)]
    assert seq.num_cached == 8
    assert fake.scheduler.counts().cached_tokens == 8


def test_at_least_one_prompt_token_is_computed():
    fake = engine()
    fake.add(request("a", prompt=8))
    fake.run()
    fake.add(request("b", prompt=8))
    assert rows(fake.dispatch().chunks) == [("b", 4, 4)]


def test_outputs_are_found_by_the_next_turn_of_a_conversation():
    fake = engine()
    (first,) = fake.add(request("a", prompt=6, max_tokens=7))
    fake.run()
    fake.add(request("b", prompt=[*first.tokens, 1, 2]))
    assert rows(fake.dispatch().chunks) == [("b", 12, 3)]


def test_pages_are_found_as_soon_as_their_step_came_back_finite():
    fake = engine()
    fake.add(request("a", prompt=24))
    fake.dispatch()
    assert fake.pool.longest_prefix(fake.sequences[0].chain, range(24)) == []
    fake.collect()
    assert len(fake.pool.longest_prefix(fake.sequences[0].chain, range(24))) == 4


def test_without_word_about_chunks_pages_wait_for_the_first_finite_sample():
    fake = engine(report_chunks=False)
    (seq,) = fake.add(request("a", prompt=24))
    fake.dispatch()
    fake.collect()
    assert fake.pool.longest_prefix(seq.chain, range(24)) == []
    fake.dispatch()
    fake.collect()
    assert len(fake.pool.longest_prefix(seq.chain, range(24))) == 5


@pytest.mark.parametrize(
    "other",
    [{"salt": "x"}, {"tenant": "x"}, {"adapter": FakeAdapter("a")}, {"prompt_logprobs": 0}],
    ids=["salt", "tenant", "adapter", "prompt logprobs"],
)
def test_no_hit_for_another(other):
    fake = engine()
    fake.add(request("a", prompt=10))
    fake.run()
    fake.add(request("b", prompt=10, **other))
    assert rows(fake.dispatch().chunks) == [("b", 0, 10)]


def test_a_new_version_of_an_adapter_of_the_same_name_finds_nothing_of_the_old_one():
    fake = engine()
    fake.add(request("a", prompt=10, adapter=FakeAdapter("math", version=1)))
    fake.run()
    fake.add(request("b", prompt=10, adapter=FakeAdapter("math", version=2)))
    assert rows(fake.dispatch().chunks) == [("b", 0, 10)]


# choices


def test_choices_share_the_prompt_and_each_gets_its_own_tokens():
    fake = engine()
    group = fake.add(request(prompt=6, max_tokens=5, n=3, seed=1))
    plan = fake.dispatch()
    assert rows(plan.chunks) == [("r", 0, 6)]
    assert [(sample.seq, sample.segment_index, sample.kind) for sample in plan.samples] == [
        (seq, 0, "chunk") for seq in group
    ]
    fake.run()
    fake.check_idle()
    outputs = [seq.output_ids for seq in group]
    assert outputs == [expected(group[0].request, choice, fake.config)[0] for choice in range(3)]
    assert len(set(map(tuple, outputs))) == 3


def test_followers_copy_the_partial_page_and_share_the_full_ones():
    fake = engine()
    group = fake.add(request(prompt=6, n=3))
    fake.dispatch()
    full, partial = group[0].pages
    assert (fake.pool.refcount(full), fake.pool.refcount(partial)) == (3, 3)
    plan = fake.dispatch()
    assert [src for src, _ in plan.page_copies] == [partial, partial]
    assert len({seq.pages[1] for seq in group}) == 3
    assert {seq.pages[0] for seq in group} == {full}


def test_a_prompt_of_full_pages_is_shared_without_copies():
    fake = engine()
    fake.add(request(prompt=8, n=3))
    fake.dispatch()
    assert fake.dispatch().page_copies == ()


def test_the_last_holder_of_a_partial_page_takes_it_over():
    fake = engine(run_ahead=0)
    leader, follower = fake.add(request(prompt=6, n=2))
    fake.step()
    partial = follower.pages[1]
    fake.finish(leader)
    assert fake.dispatch().page_copies == ()
    assert follower.pages[1] == partial


def test_a_page_that_its_leader_filled_and_indexed_leaves_the_index_before_a_follower_writes_it():
    fake = engine(pages=2)
    group = fake.add(request(prompt=6, max_tokens=3, n=2, seed=1))
    leader, follower = group
    while leader.state is not State.FINISHED:
        fake.step()
    partial = follower.pages[1]
    assert fake.pool.is_indexed(partial)
    fake.step()
    assert (follower.pages[1], fake.pool.is_indexed(partial)) == (partial, False)
    fake.run()
    assert [seq.output_ids for seq in group] == [expected(leader.request, i, fake.config)[0] for i in range(2)]


def test_choices_wait_until_there_are_slots_for_all():
    fake = engine()
    fake.add(request("a", n=2))
    fake.add(request("b", n=3))
    assert rows(fake.dispatch().chunks) == [("a", 0, 6)]
    assert fake.scheduler.counts()[:2] == (3, 2)


@pytest.mark.parametrize("pages", [3, 4, 5, 6, 8])
def test_choices_that_do_not_fit_together_finish_one_after_the_other(pages):
    fake = engine(pages=pages)
    group = fake.add(request(prompt=6, max_tokens=7, n=4, seed=3))
    fake.run()
    fake.check_idle()
    assert [seq.output_ids for seq in group] == [expected(group[0].request, i, fake.config)[0] for i in range(4)]


def test_a_leader_preempted_before_its_first_token_takes_its_followers_along():
    fake = engine(pages=20, prefix_cache=False, max_num_batched_tokens=4, adapter_slots=1)
    adapter = FakeAdapter("a")
    fake.add(request("old", prompt=3, max_tokens=30, adapter=adapter))
    for _ in range(8):
        fake.step()
    group = fake.add(request("group", prompt=60, max_tokens=4, n=2, adapter=adapter))
    while not group[0].num_preempted:
        assert group[1].leader is group[0]
        fake.step()
        fake.check()
    assert [seq.slot for seq in group] == [None, None]
    fake.run()
    fake.check_idle()
    assert [seq.output_ids for seq in group] == [expected(group[0].request, i, fake.config)[0] for i in range(2)]


# ends


def test_a_stop_token_ends_a_choice_and_wins_over_the_length():
    fake = engine()
    for seed in range(40):
        (seq,) = fake.add(request(str(seed), max_tokens=8, ignore_eos=False, seed=seed))
        fake.run()
        outputs, reason = expected(seq.request, 0, fake.config)
        assert (seq.output_ids, seq.finish_reason) == (outputs, reason)
    assert {seq.finish_reason for seq in fake.sequences} == {"stop", "length"}
    assert any(seq.finish_reason == "stop" and seq.num_outputs == 8 for seq in fake.sequences)


def commit_tokens(scheduler, *tokens):
    """Feeds one sequence these tokens; returns the finish reasons."""
    reasons = []
    for token in tokens:
        plan = scheduler.plan(0.0)
        reasons += [
            outcome.finish_reason for outcome in scheduler.commit(plan, StepResult(tokens=[token], finite=[True]))
        ]
    return reasons


@pytest.mark.parametrize(
    ("params", "tokens", "reason"),
    [
        ({"ignore_eos": False}, [1, EOS], "stop"),
        ({"ignore_eos": True}, [EOS, EOS, EOS, EOS], "length"),
        ({"ignore_eos": True, "stop_token_ids": [5]}, [EOS, 5], "stop"),
        ({"ignore_eos": False, "min_tokens": 2}, [EOS, EOS, EOS], "stop"),
    ],
)
def test_stop_tokens(params, tokens, reason):
    scheduler = engine().scheduler
    scheduler.add(request(max_tokens=4, **params))
    assert commit_tokens(scheduler, *tokens) == [None] * (len(tokens) - 1) + [reason]


def test_a_row_that_is_not_finite_ends_its_request_without_a_token():
    fake = engine()
    adapter = FakeAdapter("bad", poisoned_from=8)
    (bad,) = fake.add(request("bad", prompt=6, max_tokens=9, adapter=adapter))
    (good,) = fake.add(request("good", prompt=6, max_tokens=9))
    fake.run()
    fake.check_idle()
    assert (bad.finish_reason, bad.num_outputs) == ("error", 3)
    assert (good.finish_reason, good.num_outputs) == ("length", 9)


def test_pages_of_a_request_that_failed_leave_the_index():
    fake = engine()
    (bad,) = fake.add(request("bad", prompt=6, max_tokens=9, adapter=FakeAdapter("bad", poisoned_from=8)))
    fake.dispatch()
    fake.collect()
    assert fake.pool.is_indexed(bad.pages[0])
    fake.run()
    assert (bad.finish_reason, fake.pool.num_free) == ("error", fake.pool.num_pages)


@pytest.mark.parametrize("report_chunks", [True, False])
def test_a_prompt_that_fails_on_the_way_ends_all_its_choices(report_chunks):
    fake = engine(report_chunks=report_chunks)
    group = fake.add(request("bad", prompt=40, n=2, adapter=FakeAdapter("bad", poisoned_from=3)))
    fake.run()
    fake.check_idle()
    assert [seq.finish_reason for seq in group] == ["error", "error"]
    assert fake.pool.num_free == fake.pool.num_pages


@pytest.mark.parametrize("n", [1, 2])
def test_a_chunk_that_is_not_finite_fails_its_samples_even_if_that_row_is(n):
    scheduler = engine().scheduler
    group = scheduler.add(request(prompt=6, n=n))
    result = StepResult(tokens=[1] * n, finite=[True] * n, chunk_finite=[False])
    outcomes = scheduler.commit(scheduler.plan(0.0), result)
    assert [(outcome.seq, outcome.token, outcome.finish_reason) for outcome in outcomes] == [
        (seq, None, "error") for seq in group
    ]
    assert not any(seq.indexed for seq in group)


def test_a_finished_choice_cannot_be_finished_again():
    fake = engine()
    leader, follower = fake.add(request(n=2, max_tokens=9))
    fake.step()
    fake.step()
    assert fake.scheduler.finish(leader, "stop")
    assert not fake.scheduler.finish(leader, "stop")
    assert fake.scheduler.abort("r") == [follower]
    assert (leader.finish_reason, follower.finish_reason) == ("stop", "abort")
    assert not fake.scheduler.abort("r")
    assert fake.scheduler.abort("unknown") == []


def steps_then_abort(fake, steps):
    for _ in range(steps):
        fake.dispatch()
        if len(fake.flying) > 1:
            fake.collect()
    return fake.abort("r")


@pytest.mark.parametrize("steps", range(7), ids=["queued", *map(str, range(1, 7))])
@pytest.mark.parametrize("n", [1, 3])
def test_an_abort_gives_everything_back_in_any_phase(steps, n):
    fake = engine()
    group = fake.add(request(prompt=22, max_tokens=9, n=n, adapter=FakeAdapter("a")))
    assert steps_then_abort(fake, steps) == group
    fake.check()
    assert fake.pool.num_used == 0
    assert not fake.residency.pins
    fake.run()
    fake.check_idle()


def test_after_a_failed_step_everything_starts_over_from_the_known_tokens():
    fake = engine(pages=12)
    for name in range(4):
        fake.add(request(str(name), prompt=6, max_tokens=12, n=1 + name % 2))
    for _ in range(6):
        fake.step()
    fake.flying.clear()
    fake.cell_PG[:] = -1
    fake.scheduler.reset()
    fake.check()
    assert fake.pool.num_free == fake.pool.num_pages
    fake.run()
    fake.check_idle()
    for seq in fake.sequences:
        assert seq.output_ids == expected(seq.request, seq.index, fake.config)[0]


# adapters


def test_a_request_whose_adapter_has_no_room_lets_others_pass():
    fake = engine(adapter_slots=1)
    a, b = FakeAdapter("a"), FakeAdapter("b")
    for name, adapter in (("1", a), ("2", b), ("3", a), ("4", None)):
        fake.add(request(name, prompt=4, adapter=adapter))
    assert [row[0] for row in rows(fake.dispatch().chunks)] == ["1", "3", "4"]
    fake.run()
    fake.check_idle()


def test_a_request_is_not_passed_for_ever():
    fake = engine(adapter_slots=1, max_bypass=5)
    a, b = FakeAdapter("a"), FakeAdapter("b")
    fake.add(request("0", prompt=4, max_tokens=8, adapter=a))
    (waits,) = fake.add(request("b", prompt=4, adapter=b))
    for name in range(1, 100):
        fake.add(request(str(name), prompt=4, max_tokens=8, adapter=a))
        fake.step()
        if waits.state is State.FINISHED:
            break
    assert waits.num_bypassed < 30
    assert waits.state is State.FINISHED


def test_base_requests_pass_even_a_request_that_nobody_else_may_pass():
    fake = engine(adapter_slots=1, max_bypass=0)
    fake.add(request("a", prompt=4, max_tokens=30, adapter=FakeAdapter("a")))
    fake.add(request("b", prompt=4, adapter=FakeAdapter("b")))
    fake.add(request("a2", prompt=4, adapter=FakeAdapter("a")))
    fake.add(request("base", prompt=4))
    started = [row[0] for _ in range(3) for row in rows(fake.dispatch().chunks)]
    assert started[0] == "a"
    assert "base" in started
    assert "b" not in started


def test_a_group_pins_its_adapter_once_per_choice():
    fake = engine()
    adapter = FakeAdapter("a")
    fake.add(request(n=3, adapter=adapter))
    fake.dispatch()
    assert fake.residency.pins[adapter] == 3


def test_a_group_whose_adapter_is_refused_midway_keeps_no_pin():
    class Miser:
        pins = 0

        def try_acquire(self, adapter):
            granted = self.pins < 2
            self.pins += granted
            return granted

        def release(self, adapter):
            self.pins -= 1

    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)
    miser = Miser()
    scheduler = Scheduler(config, PagePool(8, G), miser)
    scheduler.add(request(n=3, adapter=FakeAdapter("a")))
    assert scheduler.plan(0.0) is None
    assert scheduler.counts()[:2] == (3, 0)
    assert miser.pins == 0


# host time


def test_planning_and_reading_64_decodes_takes_well_under_a_millisecond():
    config = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=4096, row_block=16)
    scheduler = Scheduler(config, PagePool(4096, 16), residency=None)
    for name in range(64):
        scheduler.add(request(str(name), prompt=[name] * 500, max_tokens=200))
    spent = []
    while scheduler.has_work():
        begin = time.process_time()
        plan = scheduler.plan(0.0)
        count = plan.num_samples
        scheduler.read(plan, StepResult(tokens=[1] * count, finite=[True] * count))
        if len(plan.decoding) == 64:
            spent.append(time.process_time() - begin)
    assert len(spent) > 50
    assert sorted(spent)[len(spent) // 4] < 0.2e-3  # a quartile: other processes share the cores
