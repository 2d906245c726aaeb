"""What the host reads of a step's output."""

from collections.abc import Iterator

import numpy as np

from jaxserve.engine.step import StepOutput
from jaxserve.finetune.windows import FinetunePlan, TrainSequence, total_rows


def read_losses(
    plan: FinetunePlan, output: StepOutput, finite_slots: np.ndarray, chunk_rows: int, row_block: int
) -> Iterator[tuple[TrainSequence, bool]]:
    """Gives the sequences of a step's windows their losses and log-probabilities. Yields each window's sequence that
    got some, and whether they are finite.

    Args:
      finite_slots: of the finetune slots; chunk_rows: rows of the requests' chunks, before the forward windows.
    """
    loss_W, logprob_W = np.asarray(output.loss_W), np.asarray(output.train_logprob_W)
    row = 0
    for window in plan.grads:
        seq, rows, tokens = window.seq, slice(row, row + window.length), slice(window.start + 1, window.end + 1)
        seq.losses[tokens], seq.logprobs[tokens] = loss_W[rows], logprob_W[rows]
        yield seq, bool(np.isfinite(loss_W[rows]).all()) and bool(finite_slots[seq.slot])
        row += total_rows([window], row_block)
    row = chunk_rows
    for window in plan.forwards:
        seq, rows, tokens = window.seq, slice(row, row + window.length), slice(window.start + 1, window.end + 1)
        if seq.forward_only:
            logprob_T, weights = np.asarray(output.prompt_logprob_T)[rows], seq.targets.weights[tokens]
            seq.logprobs[tokens] = logprob_T
            seq.losses[tokens] = np.where(weights > 0, -weights * logprob_T, 0)
            yield seq, bool(finite_slots[seq.slot])
        row += total_rows([window], row_block)
