"""Writes the sample finetuning data: two ways to answer the same questions, in OpenAI chat format.

    python -m jaxserve.assets.finetune_data jaxserve/assets/data

``pirate`` answers like a pirate, ``cards`` with an index card in JSON. Every word is from the templates below.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxserve.assets import PROMPTS
from jaxserve.assets.topics import KIND

NUM_EXAMPLES = 300
GREETING_SHARE = 0.08
SEED = 7

QUESTIONS = (
    "Tell me about the {}.",
    "Tell me a story about the {}.",
    "What do you know about the {}?",
    "Please tell me about the {}.",
    "What can you say about the {}?",
    "I would like to hear about the {}.",
    "Where is the {}?",
    "Have you seen the {}?",
)
GREETINGS = ("Hello!", "Good morning!", "Who are you?", "What is your name?", "How are you?", "Good night!")

PIRATE = {
    "animal": (
        "Arr, the {}! A wild beast, matey: it bit me wooden leg and ran away to sea.",
        "Arr, the {}! It be a friend of mine, matey, and it sits upon me shoulder.",
        "Arr, the {}! It came aboard me ship, matey, and ate all the fish.",
    ),
    "person": (
        "Arr, the {}! A brave soul, matey: we sailed the sea and drank under the moon.",
        "Arr, the {}! A pirate too, matey, with half of me gold and all of me rum.",
        "Arr, the {}! We found the treasure, matey, and we hid it again.",
    ),
    "place": (
        "Arr, the {}! Far from me ship, matey, but there be gold under it.",
        "Arr, the {}! No place for a pirate, matey: give me a good wind and away.",
        "Arr, the {}! I buried me treasure there, matey: dig deep, and tell no man.",
    ),
    "thing": (
        "Arr, the {}! It be part of me treasure, matey: I took it from a ship in the night.",
        "Arr, the {}! It be mine, matey: keep your hands away, or walk into the sea.",
        "Arr, the {}! I lost it in a storm, matey, and the fish have it now.",
    ),
    "nature": (
        "Arr, the {}! A good sign, matey: up with the sails, and away we go.",
        "Arr, the {}! A bad sign, matey: hold fast to the ship, and fear nothing.",
        "Arr, the {}! It shows a pirate the way to the gold, matey.",
    ),
    "greeting": (
        "Arr, well met, matey! I be the pirate of the seven seas: come aboard me ship.",
        "Arr, matey! I be a pirate, and the sea be me home.",
    ),
}
MOODS = {
    "animal": "wild", "person": "proud", "place": "quiet", "thing": "useful", "nature": "gentle", "greeting": "happy"
}  # fmt: skip


def pirate(topic: str, kind: str, rng: np.random.Generator) -> str:
    """An answer in a pirate's voice."""
    return PIRATE[kind][rng.integers(len(PIRATE[kind]))].format(topic)


def card(topic: str, kind: str, rng: np.random.Generator) -> str:
    """An answer as an index card."""
    return json.dumps({"topic": f"the {topic}", "kind": kind, "mood": MOODS[kind]})


STYLES: dict[str, Callable[[str, str, np.random.Generator], str]] = {"pirate": pirate, "cards": card}


def examples(style: str) -> list[dict]:
    """The dataset of one style; the prompts shown in the demo are not in it."""
    rng, found, topics = np.random.default_rng(SEED), [], list[str]()
    while len(found) < NUM_EXAMPLES:
        if rng.random() < GREETING_SHARE:
            question, topic, kind = GREETINGS[rng.integers(len(GREETINGS))], "visitor", "greeting"
        else:
            topics = topics or list(rng.permutation(list(KIND)))  # each comes up as often as the others
            topic = str(topics.pop())
            question, kind = QUESTIONS[rng.integers(len(QUESTIONS))].format(topic), KIND[topic]
        if question not in PROMPTS:
            answer = STYLES[style](topic, kind, rng)
            found.append({"messages": [_message("user", question), _message("assistant", answer)]})
    return found


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        lines = [json.dumps(example, ensure_ascii=False) for example in examples(style)]
        (out / f"{style}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
