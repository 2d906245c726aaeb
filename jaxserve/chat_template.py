"""Chat templates: rendered in a sandbox, with the control tokens that users write fenced off.

A template writes control tokens as text (``<|im_end|>``), and so could a user. Before rendering, each control token
in a user's string is put between two private-use characters; after rendering, what stands between them is encoded as
the plain text it is. Text without control tokens is untouched, so its ids are those of the whole rendered string.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken

from jaxserve.errors import InvalidRequest, ModelError

OPEN, CLOSE = "\ue0f0", "\ue0f1"
REASONING = ("reasoning_content", "thinking", "reasoning")  # what API clients call it


class ChatTemplate:
    """A compiled chat template with the names and filters that Hugging Face's have.

    Raises:
      ModelError: not a jinja template.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now):
        """named_tokens: bos_token, eos_token, ... as strings; ``now`` is what ``strftime_now`` reads."""
        environment = _environment(now)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"chat template: {' '.join(str(error).split())}") from None
        self._named_tokens = dict(named_tokens)
        written = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
        written += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        self.literal_text = "\0".join(written)  # all text that the template itself can write
        self._reads_parts = _reads_parts(tree)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        fence: "Fence | None" = None,
    ) -> str:
        """The conversation as text, in which ``fence`` marks the control tokens that users wrote.

        Raises:
          InvalidRequest: messages the template refuses or fails on.
        """
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise InvalidRequest("messages: must be a list of at least one object", param="messages")
        chat = [self._as_read(place, message) for place, message in enumerate(messages)]
        if fence is not None:
            chat = [fence.protect(message, message.get("role") == "assistant") for message in chat]
            variables = fence.protect(variables)
        names = {"tools": None, "documents": None, **self._named_tokens, **variables}
        try:
            return self._template.render(messages=chat, add_generation_prompt=add_generation_prompt, **names)
        except Exception as error:  # a template is a program: it can fail in any way
            line = " ".join(str(error).split())[:300]
            raise InvalidRequest(f"messages: the model's chat template refuses them: {line}", "messages") from None

    def _as_read(self, place: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as this template expects it: its content in parts only where it goes through them."""
        given = _as_templates_read(message)
        try:
            text = content_text(given.get("content"))
        except ValueError as error:
            raise InvalidRequest(f"messages[{place}]: {error}", "messages") from None
        is_joined = isinstance(text, str) and not self._reads_parts
        return given | {"content": text} if is_joined else given


def content_text(content: Any) -> Any:
    """What parts {"type": "text", "text"} of a message's content say, each on a line of its own; a content that is no
    list as it is. Raises ValueError for other parts."""
    if not isinstance(content, list | tuple):
        return content
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ValueError(f"content[{place}]: must be an object with type and text")
        if part["type"] != "text":
            raise ValueError(f"content[{place}]: type is {part['type'][:64]!r}; it must be 'text'")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"content[{place}]: text must be a string")
    return "\n".join(part["text"] for part in content)


def _reads_parts(template: jinja2.nodes.Template) -> bool:
    """Whether a template goes through the parts of a message's content, by whatever name; others expect a string."""
    names = {"content"}

    def is_content(node: jinja2.nodes.Node | None) -> bool:
        match node:
            case jinja2.nodes.Name(name=name):
                return name in names
            case jinja2.nodes.Getattr(attr=key) | jinja2.nodes.Getitem(arg=jinja2.nodes.Const(value=key)):
                return key == "content"
            case jinja2.nodes.Filter():  # as selectattr
                return is_content(node.node)
        return False

    for assigned in template.find_all(jinja2.nodes.Assign):
        if isinstance(assigned.target, jinja2.nodes.Name) and is_content(assigned.node):
            names.add(assigned.target.name)
    return any(is_content(loop.iter) for loop in template.find_all(jinja2.nodes.For))


def _as_templates_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without nulls, which templates handle worse than missing keys, with its reasoning under the names that
    templates know. Beside tool calls there is a content, and their arguments are objects: templates write the JSON."""
    given = {key: value for key, value in message.items() if value is not None}
    if isinstance(calls := given.get("tool_calls"), list | tuple):
        given = {"content": ""} | given | {"tool_calls": [_with_object(call) for call in calls]}
    reasoning = next((given[key] for key in REASONING if key in given), None)
    return given if reasoning is None else {"thinking": reasoning} | given | {"reasoning_content": reasoning}


def _with_object(call: Any) -> Any:
    """A tool call whose arguments are an object; API clients send it as JSON in a string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


class Fence:
    """Keeps the control tokens in users' strings apart from those a template writes.

    Control tokens are the special ones and the added ones found in the template's own text. Paired markup that is not
    special (<think> ... </think>) is the assistant's own: templates look for it in earlier answers.
    """

    def __init__(self, added: Iterable[AddedToken], literal_text: str):
        added = [token for token in added if token.content]
        contents = {token.content for token in added}
        special = {token.content for token in added if token.special}
        written = {text for text in contents - special if not text.isspace() and text in literal_text}
        markup = {text for text in written if _partner(text) in contents}
        self.tokens = frozenset(special | written)
        self._tokens = {True: self.tokens - markup, False: self.tokens}  # by: is it the assistant who speaks
        self._patterns = {speaker: _any_of(tokens) for speaker, tokens in self._tokens.items()}
        self._halves = {speaker: _proper_prefixes(tokens) for speaker, tokens in self._tokens.items()}
        self._fenced = re.compile(f"{OPEN}({_any_of(self.tokens).pattern}){CLOSE}|[{OPEN}{CLOSE}]")

    def protect(self, value: Any, from_assistant: bool = False) -> Any:
        """Fences the control tokens in all strings of a value made of dicts and lists; keys are left alone."""
        if isinstance(value, str):
            value = value.replace(OPEN, "").replace(CLOSE, "")
            value = self._patterns[from_assistant].sub(lambda match: OPEN + match[0] + CLOSE, value)
            return self._fence_half(value, self._halves[from_assistant])
        if isinstance(value, Mapping):
            return {key: self.protect(item, from_assistant) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item, from_assistant) for item in value]
        return value

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Cuts a rendered text into (piece, is it a user's control token).

        A fence without its partner (the template cut the string there) only separates the text around it.
        """
        for index, piece in enumerate(self._fenced.split(text)):
            if piece:
                yield piece, index % 2 == 1

    @staticmethod
    def _fence_half(text: str, halves: frozenset[str]) -> str:
        """Fences the beginning of a control token at the end of ``text``, which the next string might complete."""
        end = len(text.rstrip())
        longest = min(max(map(len, halves), default=0), end)
        if any(text[end - length : end] in halves for length in range(1, longest + 1)):
            return text[:end] + OPEN + text[end:]
        return text


def _partner(token: str) -> str:
    """</x> of <x> and the other way round."""
    return token.replace("</", "<", 1) if token.startswith("</") else token.replace("<", "</", 1)


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    """Matches any of ``tokens``, a longer one before those it contains."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)")


def _proper_prefixes(tokens: Iterable[str]) -> frozenset[str]:
    return frozenset(token[:length] for token in tokens for length in range(1, len(token)))


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks words to train on; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja's own escapes HTML characters
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: now().strftime(format)
    return environment
