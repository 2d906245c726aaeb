"""The finite set of step shapes."""

import pytest

from jaxserve.engine.buckets import MIN_ROWS, Bucket, Buckets, ladder

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
    assert all(bucket.decode_rows >= min(MIN_ROWS, max(max_num_seqs, 2)) for bucket in buckets)
    assert all(bucket.chunk_rows % row_block == 0 for bucket in buckets)


def test_the_smallest_fitting_bucket_is_taken():
    buckets = Buckets.make(256, 64, 16)
    assert buckets.fit(0, 9) == Bucket(0, 16)
    assert buckets.fit(0, 0) == Bucket(0, 8)
    assert buckets.fit(16, 3) == Bucket(64, 8)
    assert buckets.fit(80, 9) == Bucket(128, 64)  # chunk steps come beside few or many decode rows only
    assert buckets.fit(256, 64) == Bucket(256, 64)


def test_few_buckets_cover_a_large_engine():
    assert len(list(Buckets.make(8192, 256, 64))) <= 30


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
