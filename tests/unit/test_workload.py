import math
from dataclasses import replace

import numpy as np
import pytest

from jaxserve.bench.workload import Row, clip, make_workload, random_rows, read_trace, rescale
from jaxserve.errors import ConfigError

HEADER = "arrival_s,prompt_tokens,output_tokens\n"
ROWS = [Row(float(i), 10 + i, 20 - i, f"t{i % 3}") for i in range(12)]


def trace(tmp_path, text: str) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def workload(rows=ROWS, **options):
    return make_workload(rows, **{"source": "test", "vocab_size": 100, "max_model_len": 64, **options})


# traces


def test_a_trace_is_read_by_column_name(tmp_path):
    path = trace(tmp_path, "tenant,output_tokens,more,prompt_tokens,arrival_s\na,3,x,5,0\nb,4,y,6,1.5\n")
    assert read_trace(path) == [Row(0.0, 5, 3, "a"), Row(1.5, 6, 4, "b")]


def test_a_trace_may_come_from_a_spreadsheet_or_from_a_hand_that_puts_spaces(tmp_path):
    text = "\ufeffarrival_s, prompt_tokens, output_tokens\r\n0.5, 7, 3\r\n\r\n1, 2, 4\r\n"
    (tmp_path / "trace.csv").write_bytes(text.encode())
    assert read_trace(tmp_path / "trace.csv") == [Row(0.5, 7, 3, ""), Row(1.0, 2, 4, "")]


def test_only_the_first_rows_are_read(tmp_path):
    assert len(read_trace(trace(tmp_path, HEADER + "0,1,1\n1,1,1\nbroken\n"), limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("x,5,5", "arrival_s: 'x'"),
        ("nan,5,5", "arrival_s: 'nan'"),
        ("inf,5,5", "arrival_s: 'inf'"),
        ("-1,5,5", "arrival_s: '-1'"),
        ("2,0,5", "prompt_tokens: '0'"),
        ("2,5.5,5", "prompt_tokens: '5.5'"),
        ("2,5,-5", "output_tokens: '-5'"),
        ("2,5,", "output_tokens: ''"),
        ("2,5", "2 fields; the header has 3"),
        (f"2,{'9' * 5000},5", f"prompt_tokens: '{'9' * 60}... is not a whole number from 1 to 1,000,000,000"),
        ("2,5,1000000001", "output_tokens: '1000000001'"),
        (f"{'x' * 5000},5,5", f"arrival_s: '{'x' * 60}... is not a time"),
    ],
)
def test_a_bad_row_is_refused_by_file_line_and_field(tmp_path, row, problem):
    path = trace(tmp_path, f"{HEADER}0,1,1\n{row}\n")
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert caught.value.errors[0].startswith(f"{path}:3: {problem}")


def test_an_arrival_before_the_one_above_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r":3: arrival_s: '1' is not a time in seconds, 2 or later"):
        read_trace(trace(tmp_path, HEADER + "2,1,1\n1,1,1\n"))


def test_all_bad_rows_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_trace(trace(tmp_path, HEADER + "0,0,1\n0,1,1\n0,1,0\n"))
    assert len(caught.value.errors) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("arrival_s,x\n", "no column prompt_tokens"),
        ("arrival_s,arrival_s,prompt_tokens,output_tokens\n", ":1: 2 columns arrival_s"),
        (HEADER, "no requests"),
    ],
)
def test_a_trace_without_its_columns_or_rows_is_refused(tmp_path, text, problem):
    with pytest.raises(ConfigError, match=problem):
        read_trace(trace(tmp_path, text))


def test_a_trace_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.csv")


# scaling and clipping


def test_stretching_keeps_the_requests_and_divides_their_times():
    assert rescale(ROWS, 4.0, "stretch") == [row._replace(arrival_s=row.arrival_s / 4) for row in ROWS]


def test_thinning_keeps_the_times_and_takes_a_share_of_the_rows():
    rows = [Row(float(i), 1, 1) for i in range(2000)]
    kept = rescale(rows, 0.25, "thin", seed=1)
    assert set(kept) < set(rows)
    assert 400 < len(kept) < 600
    assert kept == rescale(rows, 0.25, "thin", seed=1) != rescale(rows, 0.25, "thin", seed=2)


def test_thinning_cannot_speed_up():
    with pytest.raises(ConfigError, match="trace_speed 2"):
        rescale(ROWS, 2.0, "thin")


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [((10, 20), (10, 20)), ((90, 20), (44, 20)), ((10, 90), (10, 54)), ((90, 90), (32, 32)), ((64, 1), (63, 1))],
)
def test_a_prompt_gives_way_first_down_to_half_the_length(lengths, expected):
    assert clip(Row(0.0, *lengths), 64)[1:3] == expected


def test_clipped_requests_are_counted():
    assert workload([Row(0.0, 10, 10), Row(0.0, 60, 10), Row(0.0, 10, 60)]).num_clipped == 2


# made-up load


def test_made_up_lengths_spread_around_their_means():
    rows = random_rows(4000, input_len=100, output_len=40, range_ratio=0.5)
    prompts, outputs = np.array([row[1:3] for row in rows]).T
    assert (prompts.min(), prompts.max()) == (50, 150)
    assert (outputs.min(), outputs.max()) == (20, 60)
    assert prompts.mean() == pytest.approx(100, rel=0.02)


def test_without_a_range_all_lengths_are_equal():
    assert {row[1:3] for row in random_rows(10, input_len=7, output_len=3)} == {(7, 3)}


def test_an_infinite_rate_sends_all_at_once():
    assert {row.arrival_s for row in random_rows(10, input_len=7, output_len=3, rate=math.inf)} == {0.0}


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness):
    rows = random_rows(20_000, input_len=1, output_len=1, rate=5.0, burstiness=burstiness, seed=3)
    gaps = np.diff([row.arrival_s for row in rows])
    assert rows[0].arrival_s == 0.0
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_a_seed_fixes_everything():
    def make(seed):
        return workload(random_rows(8, input_len=9, output_len=5, rate=2.0, seed=seed), seed=seed)

    assert make(1) == make(1) != make(2)


# prompts and adapters


def test_prompts_have_their_lengths_and_fit_the_vocabulary():
    load = workload(vocab_size=7)
    assert [len(r.prompt_ids) for r in load.requests] == [row.prompt_tokens for row in ROWS]
    assert {i for r in load.requests for i in r.prompt_ids} == set(range(7))
    assert load.total_output_tokens == sum(row.output_tokens for row in ROWS)


def test_prompts_of_a_tenant_share_their_beginning_and_no_more():
    load = workload(shared_prefix_len=8)
    beginnings = {(r.tenant, r.prompt_ids[:8]) for r in load.requests}
    assert len(beginnings) == len({r.tenant for r in load.requests}) == 3
    assert len({r.prompt_ids[8:10] for r in load.requests}) == len(ROWS)


def test_a_prefix_longer_than_a_prompt_is_cut_to_it():
    assert [len(r.prompt_ids) for r in workload(shared_prefix_len=15).requests] == [row.prompt_tokens for row in ROWS]


def test_adapters_go_round_by_turn_by_tenant_or_at_random():
    load = workload()

    def names(how, seed=0):
        return [r.adapter for r in load.on_adapters(["a", "b"], how, seed).requests]

    assert names("round-robin") == ["a", "b"] * 6
    assert names("tenant") == ["a", "b", "a"] * 4  # the third of three tenants starts over
    assert set(names("random")) == {"a", "b"}
    assert names("random", 1) == names("random", 1) != names("random", 2)


def test_no_adapters_means_the_base_model():
    load = workload()
    assert load.on_adapters(["a"]).on_adapters(()) == load
    assert replace(load.on_adapters(["a"]).requests[0], adapter=None) == load.requests[0]
