"""What a window's forward and backward keep: it depends on the window, not on the sequence it is part of."""

from functools import cache

import jax
import pytest
import training

from jaxserve.bench.hlo import copies
from jaxserve.engine import linear, stash
from jaxserve.engine.step import step

pytestmark = pytest.mark.quick_compiles

PAGES_PER_SEQ = 8


@cache
def compiled(pages_per_seq):
    """The step, and what it is of."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "PAGES_PER_SEQ", pages_per_seq)
        trainer = training.Trainer("llama", "float32", "attention")
        ints, _, floats, _ = trainer.layout.empty()
        program = step.lower(trainer.params, trainer.state, ints, floats, None, spec=trainer.spec).compile()
    return program, trainer


def test_activations_do_not_grow_with_the_sequence():
    """The pool of keys and values and the accumulators are the step's arguments, not among its temporary arrays."""
    programs = (compiled(PAGES_PER_SEQ * times)[0] for times in (1, 8))
    short, long = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert long < 1.1 * short, f"{short} bytes at {PAGES_PER_SEQ * training.PAGE} tokens, {long} at eight times as many"


def test_the_accumulators_are_added_to_in_place():
    program, trainer = compiled(PAGES_PER_SEQ)
    arrays = jax.tree.leaves((trainer.state.kv, trainer.state.train.acc))
    assert not copies(program.as_text(), [(x.dtype.name, x.shape) for x in arrays])


def test_gate_and_up_go_to_the_stash_as_they_are_gated(monkeypatch):
    """Nothing reads them again to write them there."""
    pools, widths = [], []
    gated, write = linear.lora_gated, stash.block_write
    monkeypatch.setattr(linear, "lora_gated", lambda *args, **kw: pools.append(args[5]) or gated(*args, **kw))
    monkeypatch.setattr(stash, "block_write", lambda *args: widths.extend(p.shape[2] for p in args[0]) or write(*args))
    ffn = 72  # no other test's: a step that was traced before would not be traced
    trainer = training.Trainer("llama", "float32", stashed=True, intermediate_size=ffn)
    ints, _, floats, _ = trainer.layout.empty()
    step.trace(trainer.params, trainer.state, ints, floats, None, spec=trainer.spec)
    assert [pool.shape for pool in pools] == [(training.STASH_BLOCKS, training.BLOCK, 2 * ffn)]
    assert widths, "the other activations"
    assert 2 * ffn not in widths
