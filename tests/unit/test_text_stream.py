"""TextStream against the same text looked at as a whole."""

import codecs
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text import TextStream


class ByteStream:
    """A token is a piece of UTF-8; what is no whole character yet is held, as tokenizers' DecodeStream does."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str | None:
        return self.decoder.decode(self.pieces[token_id]) or None


class FlushingStream(ByteStream):
    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


def stream_all(pieces: list[bytes], stop=(), include_stop=False, min_tokens=0, kind=FlushingStream):
    """Feeds pieces until a stop is hit; returns the deltas, the stop and the tokens used."""
    stream = TextStream(kind(pieces), stop, include_stop, min_tokens)
    deltas, hit = [], None
    for token in range(len(pieces)):
        delta, hit = stream.push(token)
        deltas.append(delta)
        if hit is not None:
            break
    return [*deltas, stream.finish()], hit, len(deltas)


def cut_as_a_whole(text: str, stops: tuple[str, ...], include_stop: bool) -> tuple[str, str | None]:
    """The definition, a character at a time: the first end of a stop cuts; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(places)]


FEW_LETTERS = st.text("abé🦜", max_size=24)
CUTS = st.lists(st.integers(0, 100), max_size=30)
STOPS = st.lists(st.text("abé🦜", min_size=1, max_size=5), max_size=4).map(tuple)


@given(text=FEW_LETTERS, cuts=CUTS, stops=STOPS, include=st.booleans())
def test_any_tokens_give_the_text_of_the_definition(text, cuts, stops, include):
    deltas, hit, _ = stream_all(split(text.encode(), cuts), stops, include)
    assert ("".join(deltas), hit) == cut_as_a_whole(text, stops, include)


@given(text=FEW_LETTERS, cuts=CUTS, stops=STOPS)
def test_at_most_the_longest_stop_less_one_is_held_back(text, cuts, stops):
    pieces = split(text.encode(), cuts)
    deltas, _, used = stream_all(pieces, stops)
    longest = max(map(len, stops), default=1)
    known = [len(bytes_.decode("utf-8", "ignore")) for bytes_ in accumulate(pieces)]
    given_out = list(accumulate(map(len, deltas)))
    for token in range(used - 1):  # the last may have hit a stop
        assert 0 <= known[token] - given_out[token] <= longest - 1


@given(data=st.binary(max_size=24), cuts=CUTS)
def test_arbitrary_bytes_add_up_to_their_decoding(data, cuts):
    deltas, hit, _ = stream_all(split(data, cuts))
    assert "".join(deltas) == data.decode("utf-8", "replace")
    assert hit is None


@given(text=st.text(max_size=24), cuts=CUTS)
def test_split_characters_never_show_as_replacement_characters(text, cuts):
    deltas, _, _ = stream_all(split(text.encode("utf-8", "ignore"), cuts), kind=ByteStream)
    assert "".join(deltas) == text.encode("utf-8", "ignore").decode()


@given(text=FEW_LETTERS, cuts=CUTS, stops=STOPS, min_tokens=st.integers(0, 12))
def test_a_stop_completed_before_min_tokens_is_ordinary_text(text, cuts, stops, min_tokens):
    pieces = split(text.encode(), cuts)
    deltas, hit, used = stream_all(pieces, stops, min_tokens=min_tokens)
    if hit is None:
        assert "".join(deltas) == text
    else:
        assert used >= min_tokens
        seen = b"".join(pieces[:used]).decode("utf-8", "ignore")
        assert seen.startswith("".join(deltas) + hit)


@pytest.mark.parametrize("others", [(), ("x", "other"), ("#", "ENOUGH")])
def test_a_stop_over_three_tokens_is_cut_exactly(others):
    deltas, hit, used = stream_all([b"one E", b"N", b"D two", b" three"], (*others, "END"))
    assert (deltas, hit, used) == (["one ", "", "", ""], "END", 3)


@pytest.mark.parametrize(("min_tokens", "used"), [(0, 1), (1, 1), (2, 3), (3, 3), (4, 4)])
def test_the_first_stop_completed_from_min_tokens_on_cuts(min_tokens, used):
    pieces = [b"END ", b"a ", b"END ", b"END "]
    deltas, *found = stream_all(pieces, ("END",), min_tokens=min_tokens)
    assert ("".join(deltas), *found) == ("END a END "[: (0, 0, 0, 6, 10)[used]], "END", used)


def test_a_false_start_of_a_stop_is_given_back():
    deltas, hit, _ = stream_all([b"EN", b"EN", b"T"], ("END",))
    assert (deltas, hit) == (["", "EN", "ENT", ""], None)


def test_an_unfinished_start_of_a_stop_is_text_at_the_end():
    assert stream_all([b"no EN"], ("END",))[0] == ["no ", "EN"]


def test_bytes_of_an_unfinished_character_show_only_at_the_end():
    parrot = "🦜".encode()
    assert stream_all([parrot[:2]])[0] == ["", "�"]
    assert stream_all([parrot[:2]], kind=ByteStream)[0] == ["", ""]
    assert stream_all([parrot[:2], parrot[2:]])[0] == ["", "🦜", ""]


def test_without_a_detokeniser_there_is_no_text():
    stream = TextStream(None, ("a",))
    assert stream.push(7) == ("", None)
    assert stream.finish() == ""


def test_finish_twice_gives_the_rest_once():
    stream = TextStream(FlushingStream([b"ab E"]), ("END",))
    assert stream.push(0) == ("ab ", None)
    assert [stream.finish(), stream.finish()] == ["E", ""]


@pytest.mark.parametrize("include_stop", [False, True])
def test_nothing_follows_a_stop(include_stop):
    stream = TextStream(FlushingStream([b"aENDb", b"c"]), ("END",), include_stop)
    assert stream.push(0) == ("aEND" if include_stop else "a", "END")
    assert stream.finish() == ""
    with pytest.raises(AssertionError, match="after the end"):
        stream.push(1)
