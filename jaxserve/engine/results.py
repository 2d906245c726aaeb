"""What the host reads of a step's output: tokens, log-probabilities, losses, and which of them are finite."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.engine.step import StepOutput
from jaxserve.finetune.windows import FinetunePlan, TrainSequence, total_rows
from jaxserve.scheduler.plan import Outcome, StepPlan, StepResult
from jaxserve.scheduler.request import Sequence as ServedSequence


class News(NamedTuple):
    """What became of one sequence in one step, with the log-probabilities it asked for."""

    outcome: Outcome
    logprobs: dict[int, float] | None
    prompt_logprobs: list[tuple[int, dict[int, float]]]  # (prompt position, log-probabilities) that became known
    error: str | None = None  # why, where the outcome is an error


def read_tokens(plan: StepPlan, output: StepOutput, chunk_slots: Sequence[int]) -> StepResult:
    """The tokens that a step drew.

    Args:
      chunk_slots: of the plan's chunks, as they were when the step was sent.
    """
    chunk_finite = np.asarray(output.finite_B)[list(chunk_slots)].tolist()
    count = plan.num_samples
    if output.drawn is None:
        assert count == 0, f"{count} tokens that were not drawn"
        return StepResult(tokens=[], finite=[], chunk_finite=chunk_finite)
    finite = np.asarray(output.drawn.finite_R)[:count].tolist()
    tokens = np.asarray(output.drawn.token_R)[:count].tolist()
    return StepResult(tokens=tokens, finite=finite, chunk_finite=chunk_finite)


def read_news(plan: StepPlan, output: StepOutput, outcomes: Sequence[Outcome], row_block: int) -> list[News]:
    """What the outcomes of a step mean to those who asked, and what became known of prompts that have none yet."""
    prompt = _prompt_logprobs(plan, output, row_block)
    news = [News(o, _logprobs(o, output), prompt.pop(o.seq, []), _why(o)) for o in outcomes]
    return news + [News(Outcome(seq, None, None, None), None, entries) for seq, entries in prompt.items()]


def _logprobs(outcome: Outcome, output: StepOutput) -> dict[int, float] | None:
    """The drawn token's log-probability and those of the top N, likeliest first after it."""
    wanted = outcome.seq.request.params.logprobs
    if wanted is None or outcome.token is None:
        return None
    drawn = output.drawn
    assert drawn is not None
    found = {outcome.token: float(np.asarray(drawn.logprob_R)[outcome.sample])}
    if wanted:
        tokens = np.asarray(drawn.top_token_RN)[outcome.sample, :wanted].tolist()
        values = np.asarray(drawn.top_logprob_RN)[outcome.sample, :wanted].tolist()
        found |= {token: value for token, value in zip(tokens, values, strict=True) if token not in found}
    return found


def _prompt_logprobs(
    plan: StepPlan, output: StepOutput, row_block: int
) -> dict[ServedSequence, list[tuple[int, dict[int, float]]]]:
    """By sequence: (position, log-probabilities) of the prompt tokens that this step's chunks predict."""
    found: dict[ServedSequence, list[tuple[int, dict[int, float]]]] = {}
    scored: Any = None if output.scored is None else jax.tree.map(np.asarray, output.scored)
    row = 0
    for segment in plan.chunks:
        wanted, prompt = segment.seq.request.params.prompt_logprobs, segment.seq.request.prompt_ids
        if wanted is not None:
            entries = found.setdefault(segment.seq, [])
            for offset in range(min(segment.length, len(prompt) - 1 - segment.start)):
                assert scored is not None
                position, at = segment.start + offset + 1, row + offset
                entry = {prompt[position]: float(scored.logprob_T[at])}
                tops = scored.top_token_TN[at, :wanted].tolist(), scored.top_logprob_TN[at, :wanted].tolist()
                pairs = zip(*tops, strict=True)
                entry |= {token: value for token, value in pairs if token not in entry}
                entries.append((position, entry))
        row += -(-segment.length // row_block) * row_block
    return found


def _why(outcome: Outcome) -> str | None:
    return "the model's numbers are not finite for this request" if outcome.finish_reason == "error" else None


def read_losses(
    plan: FinetunePlan, output: StepOutput, finite_slots: np.ndarray, chunk_rows: int, row_block: int
) -> Iterator[tuple[TrainSequence, bool]]:
    """Gives the sequences of a step's windows their losses and log-probabilities. Yields each window's sequence that
    got some, and whether they are finite.

    Args:
      finite_slots: of the finetune slots.
      chunk_rows: rows of the requests' chunks, before the forward windows.
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
            assert output.scored is not None
            logprob_T, weights = np.asarray(output.scored.logprob_T)[rows], seq.targets.weights[tokens]
            seq.logprobs[tokens] = logprob_T
            seq.losses[tokens] = np.where(weights > 0, -weights * logprob_T, 0)
            yield seq, bool(finite_slots[seq.slot])
        row += total_rows([window], row_block)
