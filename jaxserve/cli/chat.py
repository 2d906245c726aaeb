"""A conversation on the terminal."""

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxserve.bench.engine import tokenizer_of
from jaxserve.config import Config
from jaxserve.errors import AdapterError, InvalidRequest

if TYPE_CHECKING:
    from jaxserve import Engine, Event, SamplingParams


def check(config: Config) -> None:
    """Raises InvalidRequest for a model without chat, before it is loaded."""
    tokenizer = tokenizer_of(config)
    if tokenizer is None or tokenizer.chat_template is None:
        missing = "tokenizer" if tokenizer is None else "chat template"
        raise InvalidRequest(f"this model directory has no {missing}", "messages")


def talk(engine: "Engine", params: "SamplingParams", adapter: str | None, variables: Mapping[str, Any]) -> None:
    """Reads lines until end of file, and streams an answer to each.

    Args:
      variables: further names for the chat template.
    """
    assert engine.tokenizer is not None, "check found one"
    messages: list[dict[str, str]] = []
    while (line := _read(adapter)) is not None:
        command, _, rest = line.partition(" ")
        if command == "/reset":
            messages = []
        elif command == "/adapter":
            adapter = rest.strip() or None
        elif line.strip():
            messages.append({"role": "user", "content": line})
            try:
                ids = engine.tokenizer.apply_chat_template(messages, **variables)
                messages.append({"role": "assistant", "content": _answer(engine, ids, params, adapter)})
            except (InvalidRequest, AdapterError) as error:  # the conversation goes on without this question
                print(f"error: {error}", file=sys.stderr)
                messages.pop()


def _read(adapter: str | None) -> str | None:
    try:
        return input(f"{adapter or 'base'}> ")
    except EOFError:
        print()
        return None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"what is read is not {error.encoding}: {error.reason}", "messages") from None


def _answer(engine: "Engine", prompt: list[int], params: "SamplingParams", adapter: str | None) -> str:
    """Prints the answer as it comes and returns it whole; Ctrl-C ends it early."""
    request = engine.add_request(prompt, params, adapter=adapter)
    pieces: list[str] = []
    try:
        for event in _events(engine):
            pieces.append(event.text)
            print(event.text, end="", flush=True)
            if event.error:
                print(f"error: {event.error}", file=sys.stderr)
    except KeyboardInterrupt:
        engine.abort(request)
        pieces += [event.text for event in _events(engine)]
    print()
    return "".join(pieces)


def _events(engine: "Engine") -> Iterator["Event"]:
    while engine.has_work():
        yield from engine.step()
