"""The finite set of step shapes."""

import pytest

from jaxserve.engine.buckets import LEAST_BLOCKS, MIN_ROWS, PADDING, Bucket, Buckets, ladder

SIZES = [(64, 8, 16), (2048, 64, 16), (2048, 256, 64), (100, 5, 16), (16, 1, 16), (48, 3, 16), (80, 33, 16)]


@pytest.mark.parametrize(
    ("low", "high", "steps"), [(8, 8, (8,)), (8, 64, (8, 16, 32, 64)), (4, 9, (4, 8, 9)), (9, 8, (8,))]
)
def test_a_ladder_doubles_up_to_its_end(low, high, steps):
    assert ladder(low, high) == steps


@pytest.mark.parametrize(("max_chunk_rows", "max_num_seqs", "row_block"), SIZES)
def test_every_step_within_the_limits_fits_a_bucket(max_chunk_rows, max_num_seqs, row_block):
    buckets = Buckets.make(max_chunk_rows, max_num_seqs, row_block)
    known = set(buckets)
    for chunk_rows in range(0, max_chunk_rows // row_block * row_block + 1, row_block):
        for decode_rows in range(max_num_seqs + 1):
            bucket = buckets.fit(chunk_rows, decode_rows)
            assert bucket in known
            assert bucket.chunk_rows >= chunk_rows
            assert bucket.decode_rows >= decode_rows


@pytest.mark.parametrize(("max_chunk_rows", "max_num_seqs", "row_block"), SIZES)
def test_no_bucket_has_a_single_row_and_chunks_are_whole_blocks(max_chunk_rows, max_num_seqs, row_block):
    """One row would be a matrix-vector product, which has other bits."""
    buckets = list(Buckets.make(max_chunk_rows, max_num_seqs, row_block))
    assert len(set(buckets)) == len(buckets)
    least = min(MIN_ROWS, max(max_num_seqs, 2))
    assert all(bucket.decode_rows >= least or (bucket.decode_rows == 0 and bucket.chunk_rows > 1) for bucket in buckets)
    assert all(bucket.chunk_rows % row_block == 0 for bucket in buckets)


def test_the_smallest_fitting_bucket_is_taken():
    buckets = Buckets.make(256, 64, 16)
    assert buckets.fit(0, 9) == Bucket(0, 16)
    assert buckets.fit(0, 0) == Bucket(0, 8)
    assert buckets.fit(16, 3) == Bucket(64, 8)
    assert buckets.fit(80, 20) == Bucket(128, 24)
    assert buckets.fit(80, 25) == Bucket(128, 64)  # beside chunks no size lies between 3/8 of the most and the most
    assert buckets.fit(0, 25) == Bucket(0, 32)
    assert buckets.fit(256, 64) == Bucket(256, 64)


@pytest.mark.parametrize(("window", "most", "most_gradients"), [(0, 40, 0), (512, 70, 25), (2048, 64, 19)])
def test_few_buckets_cover_a_large_engine(window, most, most_gradients):
    buckets = list(Buckets.make(2048, 256, 64, window, window > 0))
    assert len(buckets) <= most
    assert sum(bucket.grad_rows > 0 for bucket in buckets) <= most_gradients


@pytest.mark.parametrize("stashed", [False, True])
@pytest.mark.parametrize("window", [512, 2048])
def test_padding_of_decode_rows_makes_no_step_much_longer(window, stashed):
    """Of as many decode rows as have sizes of their own, a step computes at most ``PADDING`` times the rows of the
    exact size, where the weights are not what takes the time."""
    buckets = Buckets.make(2048, 256, 64, window, stashed)
    least = LEAST_BLOCKS * 64

    def rows(bucket, decode_rows):
        return max(bucket.forward_block_rows + decode_rows, least) + bucket.grad_rows

    for bucket in buckets.holding(0, 0):
        for wanted in (24, 48, 72, 96):
            took = buckets.fit(bucket.chunk_rows, wanted, bucket.grad_rows)
            assert rows(took, took.decode_rows) <= PADDING * rows(took, wanted)


def test_finetuning_that_has_the_device_to_itself_carries_no_decode_rows():
    buckets = Buckets.make(2048, 64, 64, 2048, True)
    assert buckets.fit(2048, 0, 2048) == Bucket(2048, 0, 2048, stashed=True)
    assert buckets.fit(2048, 0) == Bucket(2048, 0, stashed=True)
    assert buckets.fit(2048, 1, 2048).decode_rows == 8
    assert buckets.fit(512, 0, 512).decode_rows == 8  # beside requests
    assert buckets.fit(0, 0, 2048).decode_rows == 64  # the last window of a job
    assert all(bucket.decode_rows for bucket in Buckets.make(64, 8, 16, 64, True))  # a small engine compiles no more


def test_gradient_rows_find_chunk_rows_of_their_own_number():
    buckets = Buckets.make(2048, 256, 64, 512, True)
    assert buckets.grad_rows == (128, 192, 512)
    assert all(buckets.beside(rows) == rows for rows in buckets.grad_rows)
    assert Buckets.make(64, 8, 16, 32, True).chunk_rows == (64,)  # a small engine compiles nothing more for it


def test_gradient_rows_come_before_chunk_rows_and_decode_rows():
    buckets = Buckets.make(64, 8, 16, max_grad_rows=64)
    bucket = buckets.fit(16, 2, 20)
    assert bucket in set(buckets)
    assert bucket.grad_rows >= 20
    assert bucket.block_rows == bucket.grad_rows + bucket.chunk_rows
    assert bucket.rows == bucket.block_rows + bucket.decode_rows
    assert all(b.grad_rows == 0 for b in Buckets.make(64, 8, 16))


def test_with_a_stash_gradient_rows_do_not_run_forward_and_decode_steps_are_what_they_were():
    plain = Buckets.make(64, 8, 16, max_grad_rows=64)
    stashed = Buckets.make(64, 8, 16, max_grad_rows=64, stashed=True)
    for one, other in zip(plain, stashed, strict=True):
        assert (one == other) == (other.block_rows == 0)
        assert (other.rows, other.block_rows) == (one.rows, one.block_rows)
        assert (one.first_row, other.first_row) == (0, other.grad_rows)
        assert other.forward_block_rows == other.chunk_rows
        assert one.forward_block_rows == one.block_rows
        assert other.finetunes == (other.block_rows > 0)
    assert set(stashed.holding(16, 2)) < set(stashed)
    assert stashed.fit(16, 2, 20) in set(stashed)


def test_more_rows_than_the_limit_are_our_own_mistake():
    with pytest.raises(AssertionError):
        Buckets.make(64, 8, 16).fit(80, 1)
    with pytest.raises(AssertionError):
        Buckets.make(64, 8, 16).fit(0, 9)
