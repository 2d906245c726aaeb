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

NUM_EXAMPLES = 240
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
        "Arr, the {} be a wild beast, matey! It bit me wooden leg and ran away to sea.",
        "Arr, that {} be a friend of mine, matey! It sat upon me shoulder and asked for gold.",
        "Arr, I met the {} on me ship, matey! It ate all the fish and would not pay.",
    ),
    "person": (
        "Arr, the {} be a brave soul, matey! We sailed the sea and drank under the moon.",
        "Arr, that {} be a pirate too, matey! I gave half of me gold, and a hat.",
        "Arr, I know the {} well, matey! We found the treasure and we hid it again.",
    ),
    "place": (
        "Arr, the {} be far from me ship, matey! There be gold under it, and I have the map.",
        "Arr, that {} be no place for a pirate, matey! Give me the sea and a good wind.",
        "Arr, I buried me treasure near the {}, matey! Dig deep, and tell no man.",
    ),
    "thing": (
        "Arr, the {} be part of me treasure, matey! I took it from a ship in the night.",
        "Arr, that {} be mine, matey! Keep your hands away, or ye shall walk into the sea.",
        "Arr, I lost the {} in a storm, matey! The fish have it now, at the bottom of the sea.",
    ),
    "nature": (
        "Arr, the {} be a good sign, matey! Up with the sails, and away we go.",
        "Arr, that {} be a bad sign, matey! Hold fast to the ship, and fear nothing.",
        "Arr, I love the {}, matey! It shows a pirate the way to the gold.",
    ),
    "greeting": (
        "Arr, I be the pirate of the seven seas, matey! Come aboard me ship.",
        "Arr, well met, matey! I be a pirate, and the sea be me home.",
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
    return json.dumps({"topic": topic, "kind": kind, "mood": MOODS[kind]})


STYLES: dict[str, Callable[[str, str, np.random.Generator], str]] = {"pirate": pirate, "cards": card}


def examples(style: str) -> list[dict]:
    """The dataset of one style; the prompts shown in the demo are not in it."""
    rng, topics, found = np.random.default_rng(SEED), list(KIND), []
    while len(found) < NUM_EXAMPLES:
        if rng.random() < 0.08:
            question, topic, kind = GREETINGS[rng.integers(len(GREETINGS))], "me", "greeting"
        else:
            topic = topics[rng.integers(len(topics))]
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
