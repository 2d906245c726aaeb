"""One step's two host buffers, and the same fields on the device."""

import jax
import numpy as np
import pytest

from jaxserve.engine.batch import ALWAYS, LORA_ITEM_FIELDS, NOWHERE, BatchLayout
from jaxserve.engine.buckets import Bucket

LAYOUTS = [
    BatchLayout(Bucket(0, 8), 8, 10),
    BatchLayout(Bucket(64, 8), 8, 10),
    BatchLayout(Bucket(64, 8), 16, 10, lora_items=12),
    BatchLayout(Bucket(0, 32), 32, 3, lora_items=40, train_slots=2),
    BatchLayout(Bucket(64, 8, 32), 8, 10, 12, train_slots=2, grad_items=4, row_block=16, scaled=True, dropout=True),
    BatchLayout(
        Bucket(64, 8, 32, stashed=True), 8, 10, 12, train_slots=2, grad_items=4, row_block=16, scaled=True, dropout=True
    ),
    BatchLayout(Bucket(64, 8, stashed=True), 8, 10, 12, train_slots=2, row_block=16, dropout=True),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_fields_lie_one_after_another_without_gap_or_overlap(layout):
    ints, int_views, floats, float_views = layout.empty()
    for buffer, views in ((ints, int_views), (floats, float_views)):
        buffer[:] = np.arange(len(buffer))
        assert np.concatenate([view.reshape(-1) for view in views.values()]).tolist() == list(range(len(buffer)))
        assert all(np.shares_memory(view, buffer) for view in views.values() if view.size)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_the_device_reads_what_the_host_wrote(layout):
    ints, int_views, floats, float_views = layout.empty()
    rng = np.random.default_rng(0)
    ints[:] = rng.integers(-(2**31), 2**31, len(ints))
    floats[:] = rng.standard_normal(len(floats))
    batch = jax.jit(layout.unpack)(ints, floats)
    bucket, block = layout.bucket, layout.row_block
    for name in ("page_table_BM", "sample_row_R", "flags"):
        np.testing.assert_array_equal(getattr(batch, name), int_views[name])
    np.testing.assert_array_equal(batch.token_T, int_views["token_T"][bucket.first_row :])
    parts = [(batch, slice(bucket.first_row, None))] + ([(batch.grad, slice(bucket.grad_rows))] if batch.grad else [])
    for part, where in parts:
        for name in ("position_T", "slot_T", "lead_page_T", "drop_key_T", "drop_rate_T"):
            views, found = float_views if name == "drop_rate_T" else int_views, getattr(part.rows, name)
            assert (found is None) == (name not in views), name
            if found is not None:
                np.testing.assert_array_equal(found, views[name][where])
        blocks = slice(where.start and where.start // block, where.stop and where.stop // block)
        assert (part.stash_block_N is None) == (not bucket.stashed)
        if bucket.stashed:
            np.testing.assert_array_equal(part.stash_block_N, int_views["stash_block_N"][blocks])
    if batch.grad is not None:
        np.testing.assert_array_equal(batch.grad.loss.target_W, int_views["loss_target_W"])
        np.testing.assert_array_equal(batch.grad.loss.weight_W, float_views["weight_W"])
    draw = jax.jit(layout.draw.unpack)(ints[: layout.draw.num_ints], floats[: layout.draw.num_floats])
    np.testing.assert_array_equal(draw.flags, int_views["flags"])
    np.testing.assert_array_equal(layout.draw.flags(ints), int_views["flags"])
    np.testing.assert_array_equal(draw.slot_R, int_views["sample_slot_R"])
    for name in ("edited_R", "counted_R"):
        np.testing.assert_array_equal(getattr(draw, name), int_views[name])
    for name in layout.draw.float_fields:
        view = float_views[name]
        np.testing.assert_array_equal(getattr(draw.rows, name), view)
    np.testing.assert_array_equal(draw.rows.seed_R2, int_views["seed_R2"].view(np.uint32))
    np.testing.assert_array_equal(draw.rows.top_k_R, int_views["top_k_R"])
    np.testing.assert_array_equal(draw.rows.choice_R, int_views["choice_R"])
    np.testing.assert_array_equal(draw.rows.position_R, int_views["sample_position_R"])
    assert (batch.lora is None) == (layout.lora_items == 0)
    if batch.lora is not None:
        for name in (*LORA_ITEM_FIELDS, "items_S"):
            np.testing.assert_array_equal(getattr(batch.lora, name), int_views[name])


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_an_empty_step_is_padding_through_and_through(layout):
    _, i, _, f = layout.empty()
    assert (i["position_T"] == -1).all()
    assert (i["target_T"] == -1).all()
    assert (i["slot_T"] == layout.all_slots).all()
    assert (i["sample_slot_R"] == layout.num_slots).all()
    assert (f["temperature_R"] == 0).all()
    assert (f["top_p_R"] == 1).all()
    assert (f["repetition_R"] == 1).all()
    assert np.flatnonzero(i["flags"]).tolist() == [ALWAYS]
    if layout.lora_items:
        assert not i["items_S"].any()
    if layout.bucket.stashed:
        assert (i["stash_block_N"] == NOWHERE).all()


def test_new_buffers_are_new_each_time():
    layout = LAYOUTS[0]
    first, second = layout.empty()[0], layout.empty()[0]
    assert not np.shares_memory(first, second)


def test_steps_without_chunks_draw_one_token_per_decode_row():
    assert BatchLayout(Bucket(0, 8), 16, 4).num_samples == 8
    assert BatchLayout(Bucket(64, 8), 16, 4).num_samples == 16
