"""A request that is not over: from the engine's news to the events that its caller sees, and to its result."""

from dataclasses import dataclass, field
from typing import Any, Self

from jaxserve.engine.results import News
from jaxserve.outputs import Completion, Event, RequestOutput
from jaxserve.scheduler.request import Request, Sequence
from jaxserve.text import TextStream
from jaxserve.tokenizer import Tokenizer


@dataclass
class LiveRequest:
    """One request, the text of its choices so far, and the result that is being put together."""

    request: Request
    streams: list[TextStream]
    output: RequestOutput
    choices: list[Sequence] = field(default_factory=list)
    open: set[int] = field(init=False)  # choices not finished
    collect: bool = False  # generate() wants the result

    def __post_init__(self):
        self.open = set(range(self.request.params.n))

    @classmethod
    def make(cls, request: Request, prompt: str | None, tokenizer: Tokenizer | None) -> Self:
        """A request that has nothing yet; without a tokenizer it will have no text."""
        params, version = request.params, request.adapter
        output = RequestOutput(
            request_id=request.id,
            prompt=prompt,
            prompt_token_ids=list(request.prompt_ids),
            prompt_logprobs=None if params.prompt_logprobs is None else [None for _ in request.prompt_ids],
            outputs=[Completion(index=i, logprobs=None if params.logprobs is None else []) for i in range(params.n)],
            adapter=version and version.name,
            adapter_version=version and version.version,
        )

        def stream() -> TextStream:
            decoder = None if tokenizer is None else tokenizer.stream(params.skip_special_tokens)
            return TextStream(decoder, params.stops, params.include_stop_str_in_output, params.min_tokens)

        return cls(request, [stream() for _ in range(params.n)], output)

    def take(self, news: News) -> Event | None:
        """Takes in what became of an open choice. Of a choice that ends at a stop string (its event's
        stop_reason is one) the scheduler does not know yet."""
        index, token, reason = news.outcome.seq.index, news.outcome.token, news.outcome.finish_reason
        if self.output.prompt_logprobs is not None:
            for position, logprobs in news.prompt_logprobs:
                self.output.prompt_logprobs[position] = logprobs
        if token is None:
            return self.end(index, "error", error=news.error) if reason else None
        completion = self.output.outputs[index]
        completion.token_ids.append(token)
        if news.logprobs is not None and completion.logprobs is not None:
            completion.logprobs.append(news.logprobs)
        text, stop, reason = self._text(index, token, reason)
        new = {"token_ids": [token], "text": text, "logprobs": [] if news.logprobs is None else [news.logprobs]}
        completion.text += text
        if reason is not None:
            return self.end(index, reason, stop_reason=stop, **new)
        return self._event(index, **new)

    def _text(self, index: int, token: int, reason: str | None) -> tuple[str, str | int | None, str | None]:
        """New text of a token, what stopped the choice, and why it ends, if it does."""
        stream = self.streams[index]
        stop = token if reason == "stop" else None
        if stop is not None and not self.request.params.include_stop_str_in_output:
            return stream.finish(), stop, reason
        text, hit = stream.push(token)
        if hit is not None:
            return text, hit, "stop"
        return (text + stream.finish(), stop, reason) if reason else (text, None, None)

    def end(self, index: int, reason: str, *, stop_reason=None, error: str | None = None, **new: Any) -> Event:
        """Closes a choice."""
        completion = self.output.outputs[index]
        completion.finish_reason, completion.stop_reason, completion.error = reason, stop_reason, error
        if reason in ("abort", "error"):
            new["text"] = self.streams[index].finish()
            completion.text += new["text"]
        self.open.discard(index)
        if not self.open:
            self.output.num_cached_tokens = self.choices[0].num_cached
        return self._event(index, finish_reason=reason, stop_reason=stop_reason, error=error, **new)

    def _event(self, index: int, **fields: Any) -> Event:
        output = self.output
        return Event(
            request_id=self.request.id,
            index=index,
            adapter=output.adapter,
            adapter_version=output.adapter_version,
            **fields,
        )
