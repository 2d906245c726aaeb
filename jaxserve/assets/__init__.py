"""What ships inside the package: a small model really trained on public-domain books, and sample finetuning data."""

from pathlib import Path

_HERE = Path(__file__).parent

STORYTELLER = _HERE / "storyteller"  # a Hugging Face model directory
DATASETS = {path.stem: path for path in sorted((_HERE / "data").glob("*.jsonl"))}  # OpenAI chat format
PROMPTS = (  # to show what finetuning changes: none of them is in the data
    "Tell me about the bear.",
    "What do you know about the sea?",
    "Tell me a story about the queen.",
    "Good evening!",
)
