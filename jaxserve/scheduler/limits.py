"""What a step and a request may be at most, and the refusal of requests that can never be served."""

from dataclasses import dataclass

from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.kvcache.pages import PagePool
from jaxserve.scheduler.policy import POLICIES
from jaxserve.scheduler.request import Request


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and of a request. A step has at most max_num_seqs decode rows beside max_chunk_rows."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    row_block: int = 1  # a chunk takes whole blocks of this many rows
    policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    max_queue: int = 4096  # choices that may wait
    max_bypass: int = 256  # plans for which a request whose adapter has no room lets others with adapters pass
    eos_token_ids: tuple[int, ...] = ()
    base_digest: bytes = b""

    def __post_init__(self):
        counts = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "row_block", "max_queue")
        errors = [
            f"{name} is {getattr(self, name)}; it must be at least 1" for name in counts if getattr(self, name) < 1
        ]
        if not errors and self.max_num_batched_tokens < self.row_block:
            errors.append(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least {self.row_block}"
            )
        if self.policy not in POLICIES:
            errors.append(f"policy is {self.policy!r}; it must be one of {', '.join(POLICIES)}")
        if errors:
            raise ConfigError(errors)

    @property
    def max_chunk_rows(self) -> int:
        return self.max_num_batched_tokens // self.row_block * self.row_block


def max_total(request: Request, config: SchedulerConfig) -> int:
    """Tokens, prompt and outputs together, at which the request ends for its length."""
    if request.params.max_tokens is None:
        return config.max_model_len
    return len(request.prompt_ids) + request.params.max_tokens


def check_request(request: Request, config: SchedulerConfig, pool: PagePool, num_queued: int) -> None:
    """Raises InvalidRequest, naming the limit, for a request that never fits, or that the queue has no room for."""
    _check_lengths(request, config)
    n, total = request.params.n, max_total(request, config)
    if n > config.max_num_seqs:
        raise InvalidRequest(f"n is {n}; it must be at most max_num_seqs {config.max_num_seqs}", "n")
    num_pages = pool.pages_for(total - 1)  # nobody reads the last token's keys and values
    if num_pages > pool.num_pages:
        raise InvalidRequest(
            f"the request needs {num_pages} KV pages for {total} tokens; the pool has {pool.num_pages}", "max_tokens"
        )
    if num_queued + n > config.max_queue:
        raise InvalidRequest(
            f"the queue is full: {num_queued} choices wait, and n {n} more exceed max_queue {config.max_queue}",
            "max_queue",
        )


def _check_lengths(request: Request, config: SchedulerConfig) -> None:
    prompt_len, max_tokens = len(request.prompt_ids), request.params.max_tokens
    if prompt_len == 0:
        raise InvalidRequest("prompt is empty; it must have at least 1 token", "prompt")
    if prompt_len + (max_tokens or 1) > config.max_model_len:
        raise InvalidRequest(
            f"prompt has {prompt_len} tokens; with {max_tokens or 1} output tokens it exceeds the context length of "
            f"{config.max_model_len} tokens (max_model_len)",
            "prompt" if prompt_len >= config.max_model_len else "max_tokens",
        )
    if prompt_len + request.params.min_tokens > config.max_model_len:
        raise InvalidRequest(
            f"min_tokens is {request.params.min_tokens}; with a prompt of {prompt_len} tokens it exceeds the context "
            f"length of {config.max_model_len} tokens (max_model_len)",
            "min_tokens",
        )
    if prompt_len > config.max_chunk_rows and not config.enable_chunked_prefill:
        raise InvalidRequest(
            f"prompt has {prompt_len} tokens; without chunked prefill it must fit one step of "
            f"{config.max_chunk_rows} tokens (max_num_batched_tokens)",
            "prompt",
        )
