"""How a request wants its tokens drawn, checked once at the edge."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields
from numbers import Integral, Rational, Real
from typing import Any

from jaxserve.errors import InvalidRequest, ModelError

MAX_CHOICES = 16
MAX_LOGIT_BIAS = 300
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
GENERATION_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of generation_config.json


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; names and meanings as in vLLM and the OpenAI API.

    temperature 0 is greedy; top_k 0 or -1, top_p 1 and min_p 0 switch the filter off. The filters act in the order
    temperature, top-k, top-p (mass renormalised over what top-k kept), min-p (against the likeliest token), and a
    tie at the border of a filter is kept whole. Penalties and logit_bias come before the temperature.
    logprobs are of the model's own distribution, before any of these.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self):
        for each in fields(self):
            object.__setattr__(self, each.name, _plain(getattr(self, each.name)))

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def uses_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def validate(self, vocab_size: int, max_choices: int = MAX_CHOICES, max_logprobs: int = MAX_LOGPROBS) -> None:
        """Raises InvalidRequest naming the field, its value and the limit."""
        self._check_kinds()
        self._check_integers(max_choices, max_logprobs)
        self._check_floats()
        self._check_tokens(vocab_size)
        self._check_stops()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", self.min_tokens, f"at most max_tokens {self.max_tokens}")

    def _check_kinds(self) -> None:
        for field in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, field), bool):
                _refuse(field, getattr(self, field), "true or false")
        if not isinstance(self.logit_bias, Mapping | None):
            _refuse("logit_bias", self.logit_bias, "a table of token ids and numbers")
        for field, texts in (("stop", "a string or a list of strings"), ("stop_token_ids", "a list of token ids")):
            value = getattr(self, field)
            if not isinstance(value, Sequence | Set | None) or isinstance(value, bytes | bytearray):
                _refuse(field, value, texts)

    def _check_integers(self, max_choices: int, max_logprobs: int) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _integer("n", self.n, 1, max_choices)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                _integer(field, getattr(self, field), 0, max_logprobs)

    def _check_floats(self) -> None:
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)

    def _check_tokens(self, vocab_size: int) -> None:
        bias = self.logit_bias or {}
        if len(bias) > MAX_LOGIT_BIAS:
            _refuse("logit_bias", f"{len(bias)} entries", f"at most {MAX_LOGIT_BIAS}")
        for token, value in bias.items():
            _integer("logit_bias key", token, 0, vocab_size - 1, param="logit_bias")
            _number(f"logit_bias[{token}]", value, -100.0, 100.0, param="logit_bias")
        for token in self.stop_token_ids or ():
            _integer("stop_token_ids", token, 0, vocab_size - 1)

    def _check_stops(self) -> None:
        if len(self.stops) > MAX_STOPS:
            _refuse("stop", f"{len(self.stops)} strings", f"at most {MAX_STOPS}")
        for text in self.stops:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                _refuse("stop", text, f"strings of 1 to {MAX_STOP_CHARS} characters")


def default_params(generation: Mapping[str, Any]) -> SamplingParams:
    """What a model's generation_config.json recommends; ``do_sample`` false is greedy, as in transformers.

    Raises:
      ModelError: a value out of range.
    """
    fields = {name: generation[name] for name in GENERATION_FIELDS if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        fields["temperature"] = 0.0
    params = SamplingParams(**fields)
    try:
        params.validate(vocab_size=2**31)
    except InvalidRequest as error:
        raise ModelError(f"generation_config.json: {error}") from None
    return params


def plain_number(value: Any) -> Any:
    """A number of another library's, as numpy's, as Python's own; anything else as it is."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, Rational) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {plain_number(key): plain_number(each) for key, each in value.items()}
    return [plain_number(each) for each in value] if isinstance(value, list) else plain_number(value)


def _refuse(field: str, value: object, limit: str, param: str | None = None) -> None:
    raise InvalidRequest(f"{field} is {str(value)[:64]!r}; it must be {limit}", param=param or field)


def _integer(field: str, value: object, low: int, high: int, param: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(field, value, "an integer", param)
    elif not low <= value <= high:
        _refuse(field, value, f"between {low} and {high}", param)


def _number(
    field: str, value: object, low: float, high: float, open_low: bool = False, param: str | None = None
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
        _refuse(field, value, "a finite number", param)  # math.isfinite raises for a large integer
    elif not low <= value <= high or (open_low and value == low):
        _refuse(field, value, f"{'above' if open_low else 'at least'} {low} and at most {high}", param)
