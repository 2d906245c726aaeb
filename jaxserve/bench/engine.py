"""The engine of a configuration."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxserve.assets import locate
from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from jaxserve import Engine
    from jaxserve.tokenizer import Tokenizer

FEW_TOKENS = 512  # of a step: enough for a prompt to be read about as fast as can be
TOLD_SECONDS = 5.0  # between words on how far the compiler is
NO_MODEL = "MODEL: name a model directory, or set model.path"
VERSIONS = 4  # of a job's adapter in the bank at once: requests in flight keep the one they began with


def room_for(config: Config, jobs: Sequence[FinetuneConfig]) -> dict[str, Any]:
    """Options of an engine in which these jobs run beside requests that they and lora.modules answer."""
    if not jobs:
        return {}
    lora, count = config.lora, VERSIONS * len(jobs) + len(config.lora.modules)
    return {
        "max_finetune_jobs": len(jobs),
        "max_lora_rank": max([lora.max_lora_rank, *(job.rank for job in jobs if job.method != "ia3")]),
        "max_loras": max(lora.max_loras, count),
        "max_cpu_loras": max(lora.max_cpu_loras, count),
    }


def options_of(config: Config, room: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the engine: the configuration's, and ``room`` where the user left them open."""
    given = {key for part in (config.engine, config.lora, config.finetune) for key in part.model_fields_set}
    return dict(config.engine_config()) | {name: value for name, value in room.items() if name not in given}


def room_alone(config: Config, rank: int | None) -> dict[str, Any]:
    """Options of an engine in which one job runs and nobody is served: few shapes are compiled.

    Args:
      rank: of its adapter; None: not known.
    """
    room = {"max_num_seqs": 2, "max_loras": 2, "max_cpu_loras": 2, "max_finetune_jobs": 1}
    room["max_num_batched_tokens"] = config.finetune.finetune_window
    return room if rank is None else room | {"max_lora_rank": rank}


def room_to_answer(config: Config, seqs: int, tokens: int = FEW_TOKENS) -> dict[str, Any]:
    """Options of an engine that runs so many sequences at once at most: few shapes are compiled.

    Args:
      tokens: of all prompts together, about.
    """
    engine, lora = config.engine, config.lora
    room: dict[str, Any] = {"max_num_seqs": min(seqs, engine.max_num_seqs)}
    if engine.enable_chunked_prefill:
        rows = 1 << (max(tokens, 1) - 1).bit_length()  # so that prompts of other lengths have shapes in common
        room["max_num_batched_tokens"] = max(min(rows, FEW_TOKENS), engine.max_num_seqs)
    return room | ({"max_loras": min(len(lora.modules), lora.max_loras)} if lora.modules else {"enable_lora": False})


def model_path(config: Config) -> str:
    """Where the model is.

    Raises:
      ConfigError: no model.
    """
    if config.model.path is None:
        raise ConfigError([NO_MODEL])
    return locate(config.model.path)


def tokenizer_of(config: Config) -> "Tokenizer | None":
    """The model's tokenizer, where there is one, before the model is loaded.

    Raises:
      ConfigError: no model.
      ModelError: a broken tokenizer.
    """
    from jaxserve.tokenizer import find_tokenizer

    return find_tokenizer(model_path(config), config.model.tokenizer)


def say(line: str) -> None:
    """Prints to stderr: results go to stdout."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def stage(text: str, say: Callable[[str], None] = say) -> Iterator[None]:
    """Says that something takes a while, and how long it took."""
    start = time.monotonic()
    say(f"{text} ...")
    with counting(text, say):
        yield
    say(f"{text}: {time.monotonic() - start:.1f} s")


@contextmanager
def counting(text: str, say: Callable[[str], None] = say, seconds: float = TOLD_SECONDS) -> Iterator[None]:
    """Says now and then how many programs are compiled."""
    from jaxserve.engine.compiles import watched

    said = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= seconds:
            said = time.monotonic()
            say(f"{text}: {done} of {total} programs")

    with watched(told):
        yield


def load_engine(config: Config, room: Mapping[str, Any] | None = None, jobs: Sequence[FinetuneConfig] = ()) -> "Engine":
    """Loads the model and lora.modules.

    Args:
      room: options that hold where the user left them open.
      jobs: those to come.

    Raises:
      ConfigError: no model.
    """
    path = model_path(config)
    from jaxserve import Engine

    options = options_of(config, room or {})
    return Engine.from_pretrained(path, adapters=dict(config.lora.modules), jobs=jobs, **options)
