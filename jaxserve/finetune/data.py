"""Training data: loaded once, checked whole, then served batch by batch from a cursor.

The order of an epoch is a function of the seed and the epoch alone, so a job resumed from its cursor sees what the
undisturbed one would have seen.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from jaxserve.finetune.config import FinetuneConfig
from jaxserve.finetune.errors import DataError
from jaxserve.finetune.examples import Encoder, Example, example
from jaxserve.finetune.records import MAX_LINES, Problems, Record, parse_line, parse_record, read_lines
from jaxserve.tokenizer import Tokenizer

Source = str | os.PathLike[str] | Iterable[Any]
Tokens = tuple[Any, Any]  # (token ids, weights or None)


@dataclass(frozen=True, order=True)
class Cursor:
    """How far a job has read: ``position`` examples of ``epoch``."""

    epoch: int = 0
    position: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Cursor":
        """Raises DataError for anything that ``to_json`` did not make."""
        numbers = list(value.values()) if isinstance(value, Mapping) else []
        if not numbers or value.keys() != {"epoch", "position"} or any(type(n) is not int or n < 0 for n in numbers):
            raise DataError(["data cursor: must be {epoch, position}, two integers from 0"])
        return cls(**value)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Checked examples and their order."""

    examples: tuple[Example, ...]
    seed: int = 0
    shuffle: bool = True
    num_truncated: int = 0  # examples of the source that were cut to the longest length

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of all token ids and weights: what training sees, in the order it was given."""
        hasher = hashlib.sha256(f"dataset 1 {len(self.examples)}\n".encode())
        for each in self.examples:
            hasher.update(f"{each.num_tokens}\n".encode())
            hasher.update(each.token_ids.astype("<i4").data)
            hasher.update(each.weights.astype("<f4").data)
        return hasher.hexdigest()

    @cached_property
    def num_tokens(self) -> int:
        return sum(each.num_tokens for each in self.examples)

    @cached_property
    def num_trained(self) -> int:
        """Tokens with a weight other than 0."""
        return sum(each.num_trained for each in self.examples)

    def order(self, epoch: int) -> np.ndarray:
        """Places in ``examples`` in the order of one epoch, [len] int64."""
        if not self.shuffle:
            return np.arange(len(self.examples))
        return _shuffled(len(self.examples), self.seed, epoch)

    def batch(self, cursor: Cursor, batch_size: int) -> tuple[list[Example], Cursor]:
        """The examples of one optimizer step and the cursor after it; the last batch of an epoch may be smaller."""
        places = self.order(cursor.epoch)[cursor.position : cursor.position + batch_size]
        if not len(places):
            raise DataError([f"data cursor: position {cursor.position} is beyond the {len(self.examples)} examples"])
        after = replace(cursor, position=cursor.position + len(places))
        if after.position == len(self.examples):
            after = Cursor(cursor.epoch + 1, 0)
        return [self.examples[place] for place in places], after

    def split(self, fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """(training, validation): examples chosen by ``seed``, each part in the given order.

        Raises:
          DataError: fewer than two examples, so that one part would be empty.
        """
        count = len(self.examples)
        if count < 2:
            raise DataError([f"validation_fraction {fraction}: {count} example cannot be split"])
        held = min(count - 1, max(1, round(count * fraction)))
        # an epoch no job reaches: the split has nothing to do with any order
        chosen = set(_shuffled(count, seed, -1)[:held].tolist())
        parts = ([], [])
        for place, each in enumerate(self.examples):
            parts[place in chosen].append(each)
        training, validation = (replace(self, examples=tuple(part)) for part in parts)
        return training, replace(validation, shuffle=False, num_truncated=0)


@lru_cache(maxsize=8)
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    # the raw stream of a bit generator never changes between versions of numpy, permutations may
    keys = np.random.Philox(key=np.array([seed, epoch % 2**64], np.uint64)).random_raw(count)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def load_dataset(
    source: Source,
    tokenizer: Tokenizer | None,
    *,
    max_length: int,
    vocab_size: int,
    config: FinetuneConfig | None = None,
    weightless: bool = False,
) -> Dataset:
    """Reads and checks all of the data; nothing is trained unless every line is right.

    Args:
      source: a JSONL file, or an iterable of what its lines hold, of (token ids, weights) pairs or of
        {"input_ids", "weights"}. Weights may be None: all 1.
      tokenizer: the model's; not needed for token ids.
      max_length: tokens of the longest example the engine takes; ``config.max_length`` may say fewer.
      config: what is learnt, what happens to longer examples, seed and shuffle.
      weightless: takes examples none of whose tokens has a weight, too.

    Raises:
      DataError: the first ten problems, each by its line (or its place in the iterable) and its reason.
    """
    if not isinstance(source, str | os.PathLike | Iterable):
        raise DataError([f"training data: a {type(source).__name__}, must be a file or an iterable of examples"])
    config = config or FinetuneConfig()
    loader = _Loader(tokenizer, config, min(max_length, config.max_length or max_length), vocab_size, weightless)
    examples = tuple(loader.examples(source))
    loader.problems.check()
    if not examples:
        raise _no_examples()
    return Dataset(examples, config.seed, config.shuffle, loader.num_truncated)


def check_file(path: str | os.PathLike[str], tokenizer: Tokenizer | None, config: FinetuneConfig) -> None:
    """Reads a JSONL file as ``load_dataset`` does, as far as that is quick: of what is right the first line alone is
    encoded.

    Raises:
      DataError: the first ten problems, each by its line and its reason.
    """
    encoder = Encoder(tokenizer, config.loss_on) if tokenizer is not None else None
    problems, number, is_encoded = Problems(), 0, False
    for number, line in read_lines(path, problems):
        try:
            record = parse_line(line)
            if not is_encoded:
                is_encoded = True
                _encoded(record, encoder)
        except ValueError as error:
            problems.add(f"line {number}", str(error))
    problems.check()
    if not number:
        raise _no_examples()


def _encoded(record: Record, encoder: Encoder | None) -> Tokens:
    if encoder is None:
        raise ValueError("text needs a tokenizer, and the model has none")
    return encoder.encode(record)


def _no_examples() -> DataError:
    return DataError(["training data: no examples"])


class _Loader:
    """One pass over a source."""

    def __init__(
        self, tokenizer: Tokenizer | None, config: FinetuneConfig, max_length: int, vocab_size: int, weightless: bool
    ):
        self.encoder = Encoder(tokenizer, config.loss_on) if tokenizer is not None else None
        self.on_long: Literal["refuse", "truncate"] = config.on_long
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.weightless = weightless
        self.problems = Problems()
        self.num_truncated = 0

    def examples(self, source: Source) -> Iterator[Example]:
        """Yields what is right, with an index that counts examples; the rest goes to ``problems``."""
        items = self._lines(source) if isinstance(source, str | os.PathLike) else self._values(source)
        for index, (place, tokens) in enumerate(items):
            try:
                yield self._fitted(example(*tokens, index, self.vocab_size))
            except ValueError as error:
                self.problems.add(place, str(error))

    def _lines(self, path: str | os.PathLike[str]) -> Iterator[tuple[str, Tokens]]:
        for number, line in read_lines(path, self.problems):
            try:
                yield f"line {number}", _encoded(parse_line(line), self.encoder)
            except ValueError as error:
                self.problems.add(f"line {number}", str(error))

    def _values(self, values: Iterable[Any]) -> Iterator[tuple[str, Tokens]]:
        for number, value in enumerate(values):
            place = f"example {number}"
            if number >= MAX_LINES:
                self.problems.add(place, f"more than {MAX_LINES} examples")
                return
            try:
                yield place, self._tokens(value)
            except ValueError as error:
                self.problems.add(place, str(error))

    def _tokens(self, value: Any) -> Tokens:
        if isinstance(value, Mapping):
            if "input_ids" not in value:
                return _encoded(parse_record(value), self.encoder)
            unknown = sorted(map(str, value.keys() - {"input_ids", "weights"}))
            if unknown:
                raise ValueError(f"unknown key {unknown[0]!r}, known here are input_ids, weights")
            return value["input_ids"], value.get("weights")
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            return value[0], value[1]
        raise ValueError("must be (token ids, weights), {input_ids, weights} or a record as in a file")

    def _fitted(self, whole: Example) -> Example:
        """``whole``, cut if need be. Raises ValueError: too long, or nothing to learn."""
        if whole.num_tokens > self.max_length and self.on_long == "refuse":
            raise ValueError(
                f"{whole.num_tokens} tokens, at most {self.max_length} (the least of max_length, the engine's "
                "max_model_len and its finetune_stash_tokens; on_long=truncate cuts longer examples)"
            )
        fitted = replace(whole, token_ids=whole.token_ids[: self.max_length], weights=whole.weights[: self.max_length])
        self.num_truncated += fitted.num_tokens < whole.num_tokens
        if not (fitted.num_trained or self.weightless):
            cut = f" in the first {self.max_length} tokens" if whole.num_trained else ""
            raise ValueError(f"nothing to learn{cut}: no token has a weight")
        return fitted
