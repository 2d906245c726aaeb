"""What callers give, checked: text or token ids, one or many, and what goes with them."""

from collections.abc import Iterable, Mapping, Sequence, Set
from types import UnionType
from typing import Any

import numpy as np

from jaxserve.errors import InvalidRequest
from jaxserve.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[str | None, tuple[int, ...]]:
    """A prompt's text, if it has one, and its token ids.

    Raises:
      InvalidRequest: text where there is no tokenizer, or what is no list of ids inside the vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequest("prompt is text, and this model directory has no tokenizer; give token ids", "prompt")
        return prompt, tuple(_checked(tokenizer.encode(prompt), vocab_size))
    return None, tuple(_checked(prompt, vocab_size))


def _checked(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Token ids as ints inside the vocabulary: JAX would read another row for a bad one and say nothing."""
    try:
        whole = np.asarray(ids)
    except (ValueError, OverflowError):
        whole = np.asarray(None)
    if whole.ndim != 1 or (whole.size and (whole.dtype.kind not in "iu" or bool in map(type, ids))):
        raise InvalidRequest(f"prompt is {str(ids)[:64]!r}; it must be a list of token ids", "prompt")
    if whole.size and not 0 <= whole.min() <= whole.max() < vocab_size:
        bad = whole[(whole < 0) | (whole >= vocab_size)][0]
        raise InvalidRequest(f"prompt has token id {bad}; ids go from 0 to {vocab_size - 1}", "prompt")
    return whole.tolist()


def template_variables(variables: Any) -> dict[str, Any]:
    """Names for a chat template, none of which it is given anyway. Raises InvalidRequest."""
    require("chat_template_kwargs", variables, Mapping | None, "a table of names and values")
    for name in variables or ():
        if not isinstance(name, str) or name in ("messages", "tools", "add_generation_prompt"):
            raise InvalidRequest(
                f"chat_template_kwargs has {name!r}; it must have names that chat does not set itself",
                "chat_template_kwargs",
            )
    return dict(variables or {})


def require(name: str, value: Any, kind: type | UnionType, wanted: str) -> None:
    """Raises InvalidRequest unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        raise InvalidRequest(f"{name} is {str(value)[:64]!r}; it must be {wanted}", name)


def as_list(prompts: Prompt | Iterable[Prompt]) -> list[Any]:
    """Prompts, or the only one, as a list. Raises InvalidRequest."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping | Set):
        shown = str(prompts)[:64]
        raise InvalidRequest(f"prompts is {shown!r}; it must be text, token ids or a list of them", "prompts")
    every = prompts if isinstance(prompts, Sequence) else list(prompts)
    return [every] if len(every) > 0 and isinstance(every[0], int | np.integer) else list(every)


def spread(name: str, value: Any, prompts: Sequence[Any], kind: type) -> list[Any]:
    """One ``kind`` or None per prompt. Raises InvalidRequest."""
    each = [value] * len(prompts) if value is None or isinstance(value, kind) else value
    if not isinstance(each, Sequence | np.ndarray) or not all(one is None or isinstance(one, kind) for one in each):
        wanted = f"a {kind.__name__}, or a list with one for each prompt"
        raise InvalidRequest(f"{name} is {str(value)[:64]!r}; it must be {wanted}", name)
    if len(each) != len(prompts):
        raise InvalidRequest(f"{name} has {len(each)} entries for {len(prompts)} prompts", name)
    return list(each)
