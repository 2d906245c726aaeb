"""What the scheduler knows about a request, and about each of its choices."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

from jaxserve.kvcache.prefix import PrefixChain
from jaxserve.sampling import SamplingParams

NEVER = float("inf")


class Objective(NamedTuple):
    """What a request is promised, in seconds."""

    ttft: float = NEVER  # from arrival to the first token
    tpot: float = NEVER  # mean time per output token after the first


NO_OBJECTIVE = Objective()


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A validated request. ``adapter`` is the version it starts with and keeps; None is the bare base model."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: Any = None  # its version; None is the base model
    adapter_digest: bytes = b""
    priority: int = 0  # lower is served earlier, under the priority policy
    tenant: str = ""
    salt: str = ""
    arrival: float = 0.0  # seconds, on the clock that plan() is called with
    objective: Objective = NO_OBJECTIVE


class State(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of a request.

    Choices beside the first begin as ``followers`` of the first one, their ``leader``: it computes the prompt for
    all of them, and they part from it with their first token.
    """

    request: Request
    index: int
    tokens: list[int]  # prompt, then the outputs the host has read
    max_total: int  # prompt and outputs together never get longer
    stop_ids: frozenset[int]
    rank: tuple  # order of importance: the smallest is served first and preempted last
    chain: PrefixChain
    state: State = State.WAITING
    finish_reason: str | None = None  # stop, length, abort or error
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are computed or in flight
    num_verified: int = 0  # of those, the ones whose step came back finite; of decode rows by whole pages
    num_drawn: int = 0  # prompt and outputs, those among them that the host has not read yet; 0 before the first output
    decode_end: int = 0  # decode rows before this position have their page and their place within ``max_total``
    quiet_until: int = 0  # tokens up to which reading one more neither fills a page nor ends the sequence
    prefill_end: int = 0  # tokens to compute in chunks before (again) decoding
    num_cached: int = 0  # prompt tokens found in the prefix cache when the sequence first started
    num_preempted: int = 0
    first_token_at: float | None = None  # when the host read it, on the same clock
    num_bypassed: int = 0  # plans in which others passed it because its adapter was not resident
    last_step: int = -1  # index of the last plan that has a row or a sample of this sequence
    copy_on_write: bool = False  # its last page is still the leader's to write
    leader: "Sequence | None" = None
    followers: "list[Sequence]" = field(default_factory=list)
    indexed: list[bytes] = field(default_factory=list)  # digests that this sequence brought into the prefix index
    prompt_len: int = field(init=False)

    def __post_init__(self):
        self.prompt_len = len(self.request.prompt_ids)

    @property
    def num_outputs(self) -> int:
        """Outputs that the host has read."""
        return len(self.tokens) - self.prompt_len

    @property
    def num_pending(self) -> int:
        """Tokens sampled on the device and not read yet; 2 while two steps are in flight."""
        return max(self.num_drawn - len(self.tokens), 0)

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def prefilling(self) -> bool:
        return self.num_computed < self.prefill_end

    @property
    def group(self) -> "list[Sequence]":
        """The sequences that start, and are sent back to the queue, together."""
        return [self, *self.followers]

    def __repr__(self) -> str:
        return f"Sequence({self.request.id!r}[{self.index}], {self.state.name}, {self.num_computed}/{len(self.tokens)})"
