"""Matches module names against regular expressions from untrusted files, in bounded time.

PEFT lets adapter_config.json carry regular expressions. Handing those to a backtracking engine would let a file of a
few bytes stop the server, so they never reach one: a pattern is parsed here into a Thompson automaton, and names run
through that automaton with all states at once (and cached transitions). Every state visited is paid for from a
budget; a pattern that would need more is refused. Only yes or no is asked, so greedy and lazy repeats are the same.
Constructs that no such automaton has (look-around, back references, flags, atomic groups) are refused by name.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_LENGTH = 512  # characters of one pattern
MAX_STATES = 2048  # states of its automaton, after repeats are written out
MAX_DEPTH = 24  # nested groups
MAX_VISITS = 150_000  # state visits for all the patterns of one file, about 50 ms


class PatternError(ValueError):
    """A pattern that is malformed, unsupported or too expensive; str() says which."""


class Budget:
    """State visits left for one file."""

    def __init__(self, visits: int = MAX_VISITS):
        self.left = visits

    def spend(self, visits: int) -> None:
        self.left -= visits
        if self.left < 0:
            raise PatternError("patterns too expensive to check; list the module names instead")


def _mask(characters: Iterable[str]) -> int:
    """The set of these ASCII characters as an integer; others occur in no module name and are dropped."""
    mask = 0
    for character in characters:
        if ord(character) < 128:
            mask |= 1 << ord(character)
    return mask


_ASCII = [chr(code) for code in range(128)]
_ALL = _mask(_ASCII)
_WORD = _mask(c for c in _ASCII if c.isalnum() or c == "_")
_DIGIT = _mask("0123456789")
_SPACE = _mask(" \t\n\r\f\v\x1c\x1d\x1e\x1f")
_CLASSES = {"d": _DIGIT, "D": _ALL ^ _DIGIT, "w": _WORD, "W": _ALL ^ _WORD, "s": _SPACE, "S": _ALL ^ _SPACE}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_ANCHORS = {"A": "start", "Z": "end", "b": "boundary", "B": "inside"}
_GROUP_KINDS = {
    "?=": "look-ahead",
    "?!": "look-ahead",
    "?<=": "look-behind",
    "?<!": "look-behind",
    "?>": "atomic groups",
}

# Syntax tree: ("chars", mask) | ("at", kind) | ("seq", nodes) | ("any", nodes) | ("repeat", node, low, high or None)
Node = tuple
_NOT_NEWLINE = ("chars", _ALL ^ _mask("\n"))
_UP_TO_A_DOT = ("repeat", ("seq", [("repeat", _NOT_NEWLINE, 0, None), ("chars", _mask("."))]), 0, 1)


class _Parser:
    """Recursive descent over one pattern, Python's syntax."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0
        self.group_names: set[str] = set()

    def parse(self) -> Node:
        node = self.alternatives()
        if self.at < len(self.text):
            raise PatternError("unbalanced ')'")
        return node

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        if self.at >= len(self.text):
            raise PatternError("unexpected end of pattern")
        self.at += 1
        return self.text[self.at - 1]

    def alternatives(self) -> Node:
        branches = [self.sequence()]
        while self.peek() == "|":
            self.take()
            branches.append(self.sequence())
        return branches[0] if len(branches) == 1 else ("any", branches)

    def sequence(self) -> Node:
        nodes = []
        while self.peek() not in ("", "|", ")"):
            nodes.append(self.repeated(self.atom()))
        return ("seq", nodes)

    def atom(self) -> Node:
        character = self.take()
        if character == "(":
            return self.group()
        if character == "[":
            return ("chars", self.bracket())
        if character == ".":
            return _NOT_NEWLINE
        if character == "^":
            return ("at", "start")
        if character == "$":
            return ("at", "end")
        if character == "\\":
            return self.escape()
        if character in "*+?" or (character == "{" and self.braces(peek=True)):
            raise PatternError(f"nothing to repeat before {character!r}")
        return ("chars", _mask(character))

    def escape(self) -> Node:
        if self.peek() in _ANCHORS and self.peek():
            return ("at", _ANCHORS[self.take()])
        return ("chars", self.escaped_set())

    def escaped_set(self) -> int:
        character = self.take()
        if character in _CLASSES:
            return _CLASSES[character]
        if character in _CONTROLS:
            return _mask(_CONTROLS[character])
        if character.isascii() and character.isalnum():
            raise PatternError(f"escape '\\{character}' is not supported")
        return _mask(character)

    def group(self) -> Node:
        if self.peek() == "?":
            self.group_kind()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise PatternError(f"groups nested more than {MAX_DEPTH} deep")
        node = self.alternatives()
        if self.peek() != ")":
            raise PatternError("missing ')'")
        self.take()
        self.depth -= 1
        return node

    def group_kind(self) -> None:
        rest = self.text[self.at :]
        plain = re.match(r"\?:|\?P<([A-Za-z_][A-Za-z0-9_]*)>", rest)
        if plain is None:
            kinds = [name for prefix, name in _GROUP_KINDS.items() if rest.startswith(prefix)]
            kind = kinds[-1] if kinds else f"group '({rest[:2]}'"
            raise PatternError(f"{kind} not supported; list the module names instead")
        if plain[1] in self.group_names:
            raise PatternError("two groups of one name")
        self.group_names |= {plain[1]} if plain[1] else set()
        self.at += plain.end()

    def bracket(self) -> int:
        negated = self.peek() == "^"
        if negated:
            self.take()
        mask, first = 0, True
        while first or self.peek() != "]":
            first = False
            mask |= self.bracket_item()
        self.take()
        return _ALL ^ mask if negated else mask

    def bracket_item(self) -> int:
        low, low_set = self.bracket_character()
        if self.peek() != "-" or self.text[self.at + 1 : self.at + 2] in ("]", ""):
            return low_set
        self.take()
        high, _ = self.bracket_character()
        if low is None or high is None or high < low:
            raise PatternError("bad character range")
        return _mask(chr(code) for code in range(ord(low), min(ord(high), 127) + 1))

    def bracket_character(self) -> tuple[str | None, int]:
        character = self.take()
        if character != "\\":
            return character, _mask(character)
        if self.peek() == "b":
            self.take()
            return "\b", _mask("\b")
        letter, mask = self.peek(), self.escaped_set()
        if letter in _CLASSES:
            return None, mask
        return _CONTROLS.get(letter, letter), mask

    def repeated(self, node: Node) -> Node:
        bounds = self.bounds()
        if bounds is None:
            return node
        if node[0] == "at":
            raise PatternError("nothing to repeat after an anchor")
        if self.peek() == "+":
            raise PatternError("possessive repeats not supported")
        if self.peek() == "?":
            self.take()  # lazy: the same yes or no
        if self.bounds() is not None:
            raise PatternError("multiple repeat")
        return ("repeat", node, *bounds)

    def bounds(self) -> tuple[int, int | None] | None:
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self.peek())
        if simple is not None:
            self.take()
            return simple
        return self.braces() if self.peek() == "{" else None

    def braces(self, peek: bool = False) -> tuple[int, int | None] | None:
        """``{m}``, ``{m,}``, ``{,n}`` or ``{m,n}`` here; any other brace is a character like the others."""
        found = re.match(r"\{([0-9]*)(,?)([0-9]*)\}", self.text[self.at - 1 if peek else self.at :])
        if found is None or found.group() == "{}":
            return None
        low, comma, high = found.groups()
        if len(low) > 4 or len(high) > 4:
            raise PatternError("repeat counts above 9999 not supported")
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if most is not None and most < least:
            raise PatternError("repeat maximum below its minimum")
        if not peek:
            self.at += found.end()
        return least, most


@dataclass
class _State:
    """``mask`` characters lead to ``out``; without a mask ``out`` is free, on condition ``guard`` if there is one."""

    mask: int
    guard: str
    out: tuple[int, ...]


class Pattern:
    """One compiled pattern; ``dotted`` lets anything that ends in a dot come before it: ``(.*\\.)?(text)``.

    Raises:
      PatternError: malformed, too long, too large, or with a construct that is not supported.
    """

    def __init__(self, text: str, budget: Budget, dotted: bool = False):
        if len(text) > MAX_LENGTH:
            raise PatternError(f"pattern of {len(text)} characters, at most {MAX_LENGTH}")
        self._budget = budget
        self._states = [_State(0, "", ())]  # state 0 accepts
        budget.spend(100 + 4 * len(text))
        tree = _Parser(text).parse()
        start = self._emit(("seq", [_UP_TO_A_DOT, tree]) if dotted else tree, 0)
        self._sets: list[frozenset[int]] = [frozenset([start])]
        self._ids = {self._sets[0]: 0}
        self._steps: dict[tuple[int, str, str], int] = {}
        self._walks: dict[tuple[int, str, str], tuple[int, str]] = {}

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of ``name`` matches; like ``re.fullmatch(text, name) is not None``."""
        self._budget.spend(4)
        current, before = 0, ""
        for segment in re.findall(r"[^.]*\.?", name):  # names share their segments
            key = (current, before, segment)
            if key not in self._walks:
                self._walks[key] = self._walk(*key)
            current, before = self._walks[key]
            if not self._sets[current]:
                return False
        return 0 in self._closure(self._sets[current], before, "")

    def _walk(self, current: int, before: str, segment: str) -> tuple[int, str]:
        """The state set after ``segment`` and what kind of character came last."""
        for character in segment:
            key = (current, before, character)
            if key not in self._steps:
                self._steps[key] = self._step(self._sets[current], before, character)
            current = self._steps[key]
            before = "w" if _WORD >> ord(character) & 1 else "-"
        return current, before

    def _step(self, states: frozenset[int], before: str, character: str) -> int:
        bit = 1 << ord(character)
        after = "w" if _WORD & bit else "-"
        reached = self._closure(states, before, after)
        following = frozenset(self._states[s].out[0] for s in reached if self._states[s].mask & bit)
        if following not in self._ids:
            self._ids[following] = len(self._sets)
            self._sets.append(following)
        return self._ids[following]

    def _closure(self, states: frozenset[int], before: str, after: str) -> set[int]:
        reached, todo = set(states), list(states)
        while todo:
            state = self._states[todo.pop()]
            if state.mask or not _holds(state.guard, before, after):
                continue
            fresh = [s for s in state.out if s not in reached]
            reached.update(fresh)
            todo.extend(fresh)
        self._budget.spend(len(reached) + 1)
        return reached

    def _new(self, mask: int, guard: str, out: tuple[int, ...]) -> int:
        if len(self._states) >= MAX_STATES:
            raise PatternError(f"pattern needs more than {MAX_STATES} states")
        self._states.append(_State(mask, guard, out))
        return len(self._states) - 1

    def _emit(self, node: Node, then: int) -> int:
        """Adds the states of ``node`` that continue at ``then``; returns where they start."""
        self._budget.spend(1)  # even nothing, repeated often enough, takes long
        kind = node[0]
        if kind == "chars":
            return self._new(node[1], "" if node[1] else "never", (then,))
        if kind == "at":
            return self._new(0, node[1], (then,))
        if kind == "any":
            return self._new(0, "", tuple(self._emit(branch, then) for branch in node[1]))
        if kind == "seq":
            for part in reversed(node[1]):
                then = self._emit(part, then)
            return then
        return self._emit_repeat(node[1], node[2], node[3], then)

    def _emit_repeat(self, node: Node, low: int, high: int | None, then: int) -> int:
        if high is None:
            loop = self._new(0, "", (then,))
            self._states[loop].out = (self._emit(node, loop), then)
            start = loop
        else:
            start = then
            for _ in range(high - low):
                start = self._new(0, "", (self._emit(node, start), then))
        for _ in range(low):
            start = self._emit(node, start)
        return start


def _holds(guard: str, before: str, after: str) -> bool:
    """Whether an anchor holds between two characters: "w" word, "-" other, "" beyond the ends of the name."""
    boundary = (before == "w") != (after == "w")
    if guard in ("", "start", "end"):
        return guard == "" or (before if guard == "start" else after) == ""
    return guard != "never" and boundary == (guard == "boundary")


def matching(text: str, names: Sequence[str], budget: Budget) -> set[str]:
    """Those ``names`` that ``text`` matches as a whole. Raises PatternError."""
    pattern = Pattern(text, budget)
    return {name for name in names if pattern.fullmatch(name)}


def first_keys(keys: Iterable[str], names: Sequence[str], budget: Budget) -> dict[str, str]:
    """For each name the first of ``keys`` that matches its end, at a dot or from its start, as PEFT's patterns do.

    PEFT asks ``re.match(rf"(.*\\.)?({key})$", name)``. Names without a match are absent. Raises PatternError.
    """
    found: dict[str, str] = {}
    endings = _Endings(names)
    for key in keys:
        if re.fullmatch(r"[A-Za-z0-9_.]*", key):
            matched = endings.matching(key, budget)
        else:
            pattern = Pattern(key, budget, dotted=True)
            matched = [name for name in names if name not in found and pattern.fullmatch(name)]
        for name in matched:
            found.setdefault(name, key)
    return found


class _Endings:
    """Finds names by a key of word characters and dots, a dot standing for any character.

    Tools write such tables with a full name for every module: hundreds of keys for hundreds of names. So a key is
    looked up, without its dots, among the endings of its length, without the characters in the same places.
    """

    def __init__(self, names: Sequence[str]):
        self._by_length: dict[int, list[tuple[str, str]]] = {}
        self._tables: dict[tuple[int, ...], dict[str, list[str]]] = {}
        for name in names:
            for start in [0, *(at + 1 for at, character in enumerate(name) if character == ".")]:
                self._by_length.setdefault(len(name) - start, []).append((name[start:], name))

    def matching(self, key: str, budget: Budget) -> list[str]:
        """The names of which ``key`` matches an ending."""
        cuts = (-1, *(at for at, character in enumerate(key) if character == "."), len(key))
        if cuts not in self._tables:
            endings = self._by_length.get(len(key), [])
            budget.spend((4 + len(cuts)) * len(endings))
            table = self._tables[cuts] = {}
            for ending, name in endings:
                table.setdefault(_without(ending, cuts), []).append(name)
        budget.spend(2)
        return self._tables[cuts].get(_without(key, cuts), [])


def _without(text: str, cuts: tuple[int, ...]) -> str:
    return "".join(text[start + 1 : end] for start, end in pairwise(cuts))
