"""What the engine tells its caller: events while it runs, a result when a request is over."""

from dataclasses import dataclass, field

Logprobs = dict[int, float]  # token id -> log-probability, the drawn token first


@dataclass(frozen=True, kw_only=True)
class Event:
    """News of one choice of one request from one step."""

    request_id: str
    index: int  # the choice, 0 .. n - 1
    token_ids: list[int] = field(default_factory=list)  # new ones
    text: str = ""  # that became final with them; may lag behind the tokens
    logprobs: list[Logprobs] = field(default_factory=list)  # one per new token, if asked for
    finish_reason: str | None = None  # stop, length, abort or error; set in a choice's last event
    stop_reason: str | int | None = None  # the stop string or token that ended it
    error: str | None = None  # why, where finish_reason is error
    adapter: str | None = None
    adapter_version: int | None = None


@dataclass(kw_only=True)
class Completion:
    """One finished choice."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """A finished request. The fields of a completion are those of the first choice; ``outputs`` has all n."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None  # None for the first token: nothing comes before it
    outputs: list[Completion]
    adapter: str | None = None
    adapter_version: int | None = None
    num_cached_tokens: int = 0

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def logprobs(self) -> list[Logprobs] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self.outputs[0].stop_reason

    @property
    def error(self) -> str | None:
        return self.outputs[0].error
