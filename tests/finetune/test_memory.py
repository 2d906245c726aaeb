"""What a window's forward and backward keep: it depends on the window, not on the sequence it is part of."""

import training

from jaxserve.engine.step import step

PAGES_PER_SEQ = 8


def temporary_bytes(monkeypatch, pages_per_seq):
    """Of the compiled step, beside its arguments: the pool of keys and values and the accumulators are among those."""
    monkeypatch.setattr(training, "PAGES_PER_SEQ", pages_per_seq)
    trainer = training.Trainer("llama", "float32", "attention")
    ints, _, floats, _ = trainer.layout.empty()
    compiled = step.lower(trainer.params, trainer.state, ints, floats, None, spec=trainer.spec).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_activations_do_not_grow_with_the_sequence(monkeypatch):
    short, long = (temporary_bytes(monkeypatch, PAGES_PER_SEQ * times) for times in (1, 8))
    assert long < 1.1 * short, f"{short} bytes at {PAGES_PER_SEQ * training.PAGE} tokens, {long} at eight times as many"
