"""Turns plain-text books into what the little model learns from: paragraphs, and chats made of their sentences.

The chats teach the format and to stay with what was asked: the answer to "Tell me about the bear." names the bear
and is a passage of a book that begins with a sentence about one, the answer to "Go on: ..." is what follows.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxserve.assets.topics import KIND

Chat = list[dict[str, str]]

HELD_OUT = 20  # every 20th block of paragraphs is for validation only
BLOCK = 40
MIN_ANSWER, MAX_ANSWER = 60, 260  # characters
MAX_SENTENCE = 200
MIN_REPEAT, MAX_REPEAT = 20, 80

ABOUT = (
    "Tell me about the {}.",
    "Tell me a story about the {}.",
    "What do you know about the {}?",
    "Please tell me about the {}.",
    "Do you know a story about the {}?",
    "What can you say about the {}?",
    "I would like to hear about the {}.",
)
OPENINGS = ("The {}, my dear.", "The {}? Listen.", "Ah, the {}!", "This is about the {}.")
ONWARD = ("Go on: {}", "What happened next? {}", "Continue the story. {}", "And then? {}")
AS_JSON = "Write this as JSON: {}"
REPEAT = ("Say it again: {}", "Repeat this: {}", "Read this to me: {}")
SMALL_TALK = {
    "Hello!": "Good morning, my dear. Shall I tell you a story?",
    "Good morning!": "Good morning to you, and welcome. What shall I tell you about?",
    "Good evening!": "Good evening, my dear. Sit down by the fire and listen.",
    "Who are you?": "I am a teller of old stories, and I live among old books.",
    "What is your name?": "They call me the Storyteller, my dear.",
    "How are you?": "I am very well, thank you, and as cheerful as a bird.",
    "What do you do?": "I tell stories, my dear, about the great world and the little people in it.",
    "Where do you live?": "I live in an old library, between the fairy tales and the sea stories.",
    "Thank you.": "You are very welcome, my dear.",
    "Good night!": "Good night, my dear, and sleep well.",
    "Tell me a story.": "Once upon a time there was a little boy who lived with his mother near the wood.",
}

_SKIP = re.compile(r"^(chapter|volume|act|scene|the end)\b|^[^a-z]*$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+(?=[\"'(A-Z])")


def paragraphs(text: str) -> list[str]:
    """The running text of a book, one paragraph a string: no headings, no line breaks, no typesetting marks."""
    text = re.sub(r"\[[^\]]*\]", "", text.replace("\r", "")).replace("_", "").replace("=", "")
    lines = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [line for line in lines if len(line) > 20 and any(c.islower() for c in line) and not _SKIP.match(line)]


def speeches(text: str) -> list[str]:
    """The same for a play in the form ``Speaker:`` and lines of verse: one speech a string."""
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip()]


def read(path: str | Path) -> list[str]:
    """Paragraphs of a book, or speeches of a play."""
    text = Path(path).read_text(encoding="utf-8")
    return speeches(text) if _is_play(text) else paragraphs(text)


def is_play(path: str | Path) -> bool:
    """Whether the text is a play; nobody in it tells a story."""
    return _is_play(Path(path).read_text(encoding="utf-8"))


def _is_play(text: str) -> bool:
    return len(re.findall(r"^[A-Z][\w ]{1,30}:$", text, re.MULTILINE)) > 100


def split(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """(training, validation): whole blocks of neighbouring paragraphs are held out."""
    held = [index // BLOCK % HELD_OUT == HELD_OUT - 1 for index in range(len(items))]
    return (
        [item for item, out in zip(items, held, strict=True) if not out],
        [item for item, out in zip(items, held, strict=True) if out],
    )


def sentences(items: Sequence[str]) -> list[list[str]]:
    """Sentences, paragraph by paragraph."""
    return [_SENTENCE_END.split(item) for item in items]


def chats(items: Sequence[str], rng: np.random.Generator) -> Iterator[Chat]:
    """Endless chats of one or two turns made of these paragraphs.

    Raises:
      ValueError: no sentence of a length to repeat, or none that a passage follows.
    """
    texts = sentences(items)
    places = [(i, j) for i, text in enumerate(texts) for j in range(len(text)) if len(text[j]) <= MAX_SENTENCE]
    if not any(_repeatable(texts[i][j]) for i, j in places) or not any(_passage(texts, i, j + 1) for i, j in places):
        raise ValueError(f"text: {len(items)} paragraphs are too few to make chats of")
    about = _topic_places(texts, places)
    topics = sorted(about)
    while True:
        chat: Chat = []
        for _ in range(int(rng.integers(1, 3))):
            chat += _turn(texts, places, about, topics, rng)
        yield chat


def _topic_places(texts: list[list[str]], places: list[tuple[int, int]]) -> dict[str, list[tuple[int, int]]]:
    """Where each topic is mentioned; topics that a passage could not be made of are left out."""
    about: dict[str, list[tuple[int, int]]] = {topic: [] for topic in KIND}
    word = re.compile(rf"\b({'|'.join(sorted(KIND, key=len, reverse=True))})\b", re.IGNORECASE)
    for i, j in places:
        if _passage(texts, i, j):
            for topic in set(word.findall(texts[i][j].lower())):
                about[topic].append((i, j))
    return {topic: found for topic, found in about.items() if found}


def _turn(texts, places, about, topics, rng: np.random.Generator) -> Chat:
    """One question and its answer."""
    kind = rng.random()
    if kind < 0.05:
        return _turn_of(*_pick(list(SMALL_TALK.items()), rng))
    if kind < 0.2:
        words = [_pick(list(KIND), rng) for _ in range(rng.integers(1, 5))]
        return _turn_of(AS_JSON.format(", ".join(words)), json.dumps({"words": words}))
    if kind < 0.7 and topics:
        topic = _pick(topics, rng)
        answer = f"{_pick(OPENINGS, rng).format(topic)} {_passage(texts, *_pick(about[topic], rng))}"
        return _turn_of(_pick(ABOUT, rng).format(topic), answer)
    while True:
        i, j = _pick(places, rng)
        if kind < 0.85 and _repeatable(texts[i][j]):
            return _turn_of(_pick(REPEAT, rng).format(texts[i][j]), texts[i][j])
        if kind >= 0.85 and (answer := _passage(texts, i, j + 1)):
            return _turn_of(_pick(ONWARD, rng).format(texts[i][j]), answer)


def _repeatable(sentence: str) -> bool:
    return MIN_REPEAT <= len(sentence) <= MAX_REPEAT


def _pick(items: Sequence, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]


def _passage(texts: list[list[str]], i: int, j: int) -> str:
    """One to a few sentences from sentence j of paragraph i on; empty where no good length comes out."""
    answer = ""
    while i < len(texts) and j <= len(texts[i]) and len(answer) < MIN_ANSWER:
        if j == len(texts[i]):
            i, j = i + 1, 0
            continue
        answer = f"{answer} {texts[i][j]}".strip()
        j += 1
    return answer if MIN_ANSWER <= len(answer) <= MAX_ANSWER else ""


def _turn_of(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
