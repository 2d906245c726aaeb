"""What ships inside the package: a small model really trained on public-domain books, and sample finetuning data."""

from pathlib import Path

from jaxserve.errors import ConfigError

_HERE = Path(__file__).parent

STORYTELLER = _HERE / "storyteller"  # a Hugging Face model directory
DATASETS = {path.stem: path for path in sorted((_HERE / "data").glob("*.jsonl"))}  # OpenAI chat format
PROMPTS = (  # to show what finetuning changes: none of them is in the data
    "Tell me about the bear.",
    "What do you know about the sea?",
    "Tell me a story about the queen.",
    "Good evening!",
)
_SCHEME = "demo:"


def locate(name: str) -> str:
    """The path that a user's path stands for: demo:storyteller, demo:pirate and demo:cards are files of the package.

    Raises:
      ConfigError: another name after ``demo:``.
    """
    if not name.startswith(_SCHEME):
        return name
    known = {"storyteller": STORYTELLER, **DATASETS}
    if name.removeprefix(_SCHEME) not in known:
        raise ConfigError([f"{name}: no such part of the package; there are {', '.join(_SCHEME + n for n in known)}"])
    return str(known[name.removeprefix(_SCHEME)])
