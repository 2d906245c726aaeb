"""Which rows of a finetune sequence are next, as its windows are cut."""

import numpy as np
import pytest

from jaxserve.finetune.windows import Lane, Targets, TrainSequence

LANE = Lane(0, (1,), (0,), (0,))
STASHED = {"stash_blocks": [0, 1, 2, 3, 4], "row_block": 4}


def sequence(num_rows=19, **options):
    tokens = np.arange(num_rows + 1, dtype=np.int32)
    return TrainSequence(tokens, Targets(weights=np.ones(num_rows + 1, np.float32)), LANE, **options)


def walk(seq, room, last):
    """(start, end) of the windows of phase F, then of those of phase B."""
    forwards, grads = [], []
    while window := seq.forward_window(room, last):
        seq.take_forward(window)
        forwards.append((window.start, window.end))
    while window := seq.backward_window(room):
        seq.take_backward(window)
        grads.append((window.start, window.end))
    assert (seq.done, seq.num_losses) == (True, len(forwards if seq.forward_only else grads))
    return forwards, grads


@pytest.mark.parametrize(
    ("options", "room", "last", "forwards", "grads"),
    [
        ({}, 30, 30, [], [(0, 19)]),
        ({}, 8, 8, [(0, 8), (8, 11)], [(11, 19), (3, 11), (0, 3)]),
        ({"window": 5}, 8, 8, [(0, 8), (8, 14)], [(14, 19), (9, 14), (4, 9), (0, 4)]),
        ({"window": 8, "fixed": True}, 16, 3, [(0, 16)], [(16, 19), (8, 16), (0, 8)]),
        ({"window": 8, "fixed": True, "num_rows": 16}, 16, 3, [(0, 8)], [(8, 16), (0, 8)]),
        ({"window": 8, "fixed": True, "num_rows": 17}, 16, 3, [(0, 16)], [(16, 17), (8, 16), (0, 8)]),
        (STASHED, 8, 8, [(0, 8), (8, 16), (16, 19)], [(12, 19), (4, 12), (0, 4)]),
        (STASHED | {"window": 6}, 12, 8, [(0, 12), (12, 19)], [(12, 19), (4, 12), (0, 4)]),
        ({"forward_only": True, "window": 4}, 8, 8, [(0, 8), (8, 16), (16, 19)], []),
    ],
)
def test_all_rows_go_forward_before_their_backward_but_those_that_run_forward_in_it(
    options, room, last, forwards, grads
):
    assert walk(sequence(**options), room, last) == (forwards, grads)


def test_a_fixed_window_waits_for_a_step_that_holds_all_of_it():
    seq = sequence(window=8, fixed=True)
    assert seq.backward_window(2) is None
    window = seq.backward_window(3)
    assert (window.start, window.end) == (16, 19)


def test_a_backward_from_the_stash_takes_whole_blocks_that_have_been_forward():
    seq = sequence(**STASHED)
    seq.take_forward(seq.forward_window(16, 8))
    with pytest.raises(AssertionError, match="not forward yet"):
        seq.take_backward(seq.backward_window(3))
    seq.take_forward(seq.forward_window(16, 8))
    seq.take_backward(seq.backward_window(3))
    assert (seq.remaining, seq.backward_window(3)) == (16, None)


def test_phase_b_is_not_begun_before_its_rows_are_forward_and_phase_f_ends_with_it():
    seq = sequence()
    with pytest.raises(AssertionError, match="not forward yet"):
        seq.take_backward(seq.backward_window(8))
    seq.take_forward(seq.forward_window(11, 8))
    seq.take_backward(seq.backward_window(8))
    assert (seq.backward_begun, seq.forward_window(8, 4)) == (True, None)
