"""Text to token ids and back.

Ids equal those of transformers' AutoTokenizer, wherever that takes tokenizer.json as it is: since version 5 its
LlamaTokenizer brings a pre-tokenizer of its own, and reads spaces at a beginning otherwise than the file says. One
thing is stricter: control tokens inside what a user wrote (``<|im_end|>`` in a message) are ordinary text, only the
chat template itself can write a control token.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from jaxserve.chat_template import ChatTemplate, Fence
from jaxserve.errors import InvalidRequest, ModelError
from jaxserve.files import directory, read_json, read_text

MAX_TOKENIZER_BYTES = 256 << 20
MAX_PENDING = 32  # tokens that may wait for the rest of a character
REPLACEMENT = "\ufffd"
TOOL_USE = "tool_use"  # the name of a template for conversations with tools
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokens(NamedTuple):
    """A text's token ids, and where the characters of each begin and end; both only grow."""

    text: str
    ids: list[int]
    starts: list[int]
    ends: list[int]

    def num_before(self, end: int) -> int | None:
        """How many tokens text[:end] has; None: the last of them goes on behind it."""
        count = bisect_left(self.starts, end)
        return count if not count or self.ends[count - 1] <= end else None


class Tokenizer:
    """A tokenizer and its chat template; safe to share between threads."""

    def __init__(
        self,
        backend: Backend,
        named_tokens: Mapping[str, str],
        chat_template: str | None = None,
        now: Callable[[], datetime] = datetime.now,
        tool_template: str | None = None,
    ):
        """
        Args:
          named_tokens: bos_token, eos_token, ... as strings.
          now: what ``strftime_now`` of a template reads.
          tool_template: for conversations with tools; by default the chat template.
        """
        self._backend = backend
        self._named_tokens = dict(named_tokens)
        self.chat_template = chat_template
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values(), default=-1) + 1  # the largest id + 1
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self._template, self._tool_template = (
            None if source is None else ChatTemplate(source, named_tokens, now)
            for source in (chat_template, tool_template)
        )

    def with_template(self, chat_template: str) -> "Tokenizer":
        """The same tokens under another chat template."""
        return Tokenizer(self._backend, self._named_tokens, chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``; control tokens written in it count as such, as transformers has it.

        Raises:
          InvalidRequest: text that is not Unicode (half of a surrogate pair).
        """
        return self._encoding(text, add_special_tokens).ids

    def _encoding(self, text: str, add_special_tokens: bool = False) -> Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequest("prompt: text must be valid Unicode", param="prompt") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; ids the tokenizer does not know give nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> "Stream":
        """An incremental decoder for one sequence of generated tokens."""
        return Stream(self, skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Ids of a conversation. Control tokens in messages or variables are encoded as the text they are.

        Args:
          variables: further names the template sees (``tools``, ``documents``, ...).

        Raises:
          InvalidRequest: no chat template, or one that refuses these messages.
        """
        return self.chat_tokens(messages, add_generation_prompt, **variables).ids

    def chat_tokens(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> Tokens:
        """The ids of ``apply_chat_template`` with the text that they are of."""
        text, ids, starts, ends = "", [], [], []
        for piece, is_control in self._chat_pieces(messages, add_generation_prompt, variables):
            new, offsets = self._piece(piece, is_control, inside=bool(ids))
            ids += new
            starts += [len(text) + start for start, _ in offsets]
            ends += [len(text) + end for _, end in offsets]
            text += piece
        return Tokens(text, ids, starts, ends)

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of ``chat_tokens``, which is not encoded."""
        return "".join(piece for piece, _ in self._chat_pieces(messages, add_generation_prompt, variables))

    def _chat_pieces(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> Iterator[tuple[str, bool]]:
        """What the template writes, cut into (piece, is it a user's control token)."""
        text = self._template_for(variables).render(messages, add_generation_prompt, variables, self._fence)
        return self._fence.split(text)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the template writes it, for people to read; raises as ``apply_chat_template`` does."""
        return self._template_for(variables).render(messages, add_generation_prompt, variables)

    def _named_id(self, name: str) -> int | None:
        return self.vocab.get(self._named_tokens.get(name, ""))

    @cached_property
    def _fence(self) -> Fence:
        templates = (self._template_for({}), self._template_for({"tools": []}))
        literal_text = "\0".join(template.literal_text for template in templates)
        return Fence(self._backend.get_added_tokens_decoder().values(), literal_text)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.vocab[token] for token in self._fence.tokens)

    def _template_for(self, variables: Mapping[str, Any]) -> ChatTemplate:
        if self._template is None:
            raise InvalidRequest("messages: the model has no chat template", param="messages")
        return self._template if variables.get("tools") is None else self._tool_template or self._template

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of ``text`` with no added token recognised: the pipeline without its first stage."""
        backend = self._backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for word in words for token in backend.model.tokenize(word)]
        if self._control_ids.isdisjoint(ids) or len(text) < 2:
            return [id for id in ids if id not in self._control_ids]
        # the model itself has a merge for it: cut the word
        return self._encode_plain(text[:1]) + self._encode_plain(text[1:])

    def _piece(self, piece: str, is_control: bool, inside: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a part of a text and where in it each is; ``inside``: not of the first part, where some tokenizers add
        the space that they start a text with."""
        text = "\n" + piece if inside else piece
        if is_control:
            ids = self._encode_plain(text)
            offsets = [(0, len(piece))] * len(ids)
        else:
            encoding = self._encoding(text)
            ids, offsets = encoding.ids, encoding.offsets
        if not inside:
            return ids, offsets
        newline = self.encode("\n", add_special_tokens=False)
        if ids[: len(newline)] != newline:
            return self._piece(piece, is_control, inside=False)
        shift = 0 if is_control else 1
        return ids[len(newline) :], [(start - shift, end - shift) for start, end in offsets[len(newline) :]]


class Stream:
    """Decodes one sequence token by token. A character spread over tokens comes out whole."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        # tokens before _start are done with; those in [_start, _read) are context that was already given out
        self._ids: list[int] = []
        self._read = 0

    def step(self, token_id: int) -> str | None:
        """The text that is complete with this token, or None."""
        if token_id in self._skipped or not 0 <= token_id < self._tokenizer.vocab_size:
            return None
        self._ids.append(token_id)
        text = self._new_text()
        if not text or (text.endswith(REPLACEMENT) and len(self._ids) - self._read <= MAX_PENDING):
            return None
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return text

    def flush(self) -> str:
        """What is left at the end: the bytes of an unfinished character as replacement characters."""
        text = self._new_text()
        self._read = len(self._ids)
        return text

    def _new_text(self) -> str:
        decode = partial(self._tokenizer.decode, skip_special_tokens=False)
        before, text = decode(self._ids[: self._read]), decode(self._ids)
        if text.startswith(before):
            return text[len(before) :]
        # byte tokens that are not UTF-8 spoil all of their run, also characters that were given out
        return decode(self._ids[self._read :])


def find_tokenizer(model_dir: str | os.PathLike, other: str | os.PathLike | None = None) -> Tokenizer | None:
    """That of another directory, where one is named, or the model's; a model without one serves token ids."""
    if other is not None:
        return load_tokenizer(other)
    path, names = directory(model_dir), ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return load_tokenizer(path) if any((path / name).exists() for name in names) else None


def load_tokenizer(model_dir: str | os.PathLike, chat_template: str | None = None) -> Tokenizer:
    """Loads tokenizer.json, or what transformers makes of older files.

    Args:
      chat_template: replaces the model's own.

    Raises:
      ModelError: no tokenizer, a broken one, or a chat template that is not one.
    """
    path = directory(model_dir)
    config = _optional_json(path / "tokenizer_config.json")
    if not (path / "tokenizer.json").exists():
        return _from_transformers(path, chat_template)
    text = read_text(path / "tokenizer.json", MAX_TOKENIZER_BYTES)
    try:
        backend = Backend.from_str(text)
    except BaseException as error:  # a panic of the Rust side is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"tokenizer.json: not a tokenizer: {_one_line(error)}") from None
    try:
        if "added_tokens_decoder" not in config:  # then older files say the rest
            config |= _optional_json(path / "special_tokens_map.json")
            config |= {"added_tokens_decoder": _added_tokens(_optional_json(path / "added_tokens.json"), backend)}
        named = _named_tokens(config)
        _complete(backend, config, named)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"tokenizer_config.json: does not fit tokenizer.json: {_one_line(error)}") from None
    default, for_tools = _model_templates(path, config) if chat_template is None else (chat_template, None)
    return Tokenizer(backend, named, default, tool_template=for_tools)


def _complete(backend: Backend, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """What tokenizer_config.json adds to tokenizer.json, in transformers' order.

    Its add_bos_token and add_eos_token mean nothing here: the post-processor in tokenizer.json decides.
    """
    backend.no_padding()
    backend.no_truncation()
    stored = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    for is_special, tokens in groupby((_added_token(token) for _, token in stored), lambda token: token.special):
        (backend.add_special_tokens if is_special else backend.add_tokens)(list(tokens))  # each call takes long
    extra = _extra_tokens(config)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for content in [*named.values(), *map(_content, [] if isinstance(extra, dict) else extra)]:
        if content not in special:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _added_token(token: Mapping[str, Any]) -> AddedToken:
    flags = {key: bool(token.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(token["content"], **flags)


def _from_transformers(path: Path, chat_template: str | None) -> Tokenizer:
    """Older formats (sentencepiece, tiktoken): transformers converts them to the same backend."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"tokenizer: no tokenizer.json, and not loadable otherwise: {_one_line(error)}") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ModelError(f"tokenizer: {type(loaded).__name__} has no tokenizer.json form; convert it first")
    if backend.get_vocab(with_added_tokens=False).keys() <= loaded.get_added_vocab().keys():
        raise ModelError("tokenizer: no vocabulary: neither tokenizer.json nor an older file with one is there")
    given = chat_template if chat_template is not None else getattr(loaded, "chat_template", None)
    default, for_tools = _by_use("tokenizer", given)
    return Tokenizer(backend, loaded.special_tokens_map, default, tool_template=for_tools)


def _model_templates(path: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """chat_template.jinja, or what tokenizer_config.json has, or chat_template.json; and the one for tools."""
    if (path / "chat_template.jinja").exists():
        for_tools = path / "additional_chat_templates" / f"{TOOL_USE}.jinja"
        return read_text(path / "chat_template.jinja"), read_text(for_tools) if for_tools.exists() else None
    where, template = "tokenizer_config.json", config.get("chat_template")
    if template is None:  # a processor's, of models that read more than text
        where, template = "chat_template.json", _optional_json(path / "chat_template.json").get("chat_template")
    return _by_use(where, template)


def _by_use(where: str, given: Any) -> tuple[str | None, str | None]:
    """The template, and of several the default and the one for tools."""
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    default, for_tools = (given.get("default"), given.get(TOOL_USE)) if isinstance(given, dict) else (given, None)
    if not (isinstance(default, str | None) and isinstance(for_tools, str | None)):
        raise ModelError(f"{where}: chat_template must be a string or a list of named templates")
    return default, for_tools


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Those every tokenizer may have, and those that this one has names for."""
    extra = _extra_tokens(config)
    tokens = {name: config.get(name) for name in _NAMED_TOKENS} | (extra if isinstance(extra, dict) else {})
    return {name: _content(token) for name, token in tokens.items() if token is not None}


def _extra_tokens(config: Mapping[str, Any]) -> list[Any] | dict[str, Any]:
    return config.get("extra_special_tokens") or config.get("additional_special_tokens") or []


def _added_tokens(ids: Mapping[str, int], backend: Backend) -> dict[str, dict[str, Any]]:
    """What added_tokens.json has beside tokenizer.json, as an ``added_tokens_decoder``."""
    new = {content: id for content, id in ids.items() if backend.token_to_id(content) is None}
    return {str(id): {"content": content, "normalized": True} for content, id in new.items()}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
