"""Tracked texts: equal to plain ones in all that a template can do, and each character keeps its code."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.llm.provenance import Tracked, code_of, joined, leaves, realigned, runs_of, to_json, tracked

words = st.text('ab<>/ \n\té"\\', max_size=12)
runs = st.lists(words, max_size=4)


def mixed(parts):
    """A text whose runs have the codes 0, 1, ..."""
    return joined(tracked(part, code) for code, part in enumerate(parts))


def codes(text):
    return [code for length, code in runs_of(text) for _ in range(length)]


OPERATIONS = {
    "strip": lambda text, other: text.strip(),
    "strip characters": lambda text, other: text.strip("a\n"),
    "split": lambda text, other: text.split(),
    "split at": lambda text, other: text.split("a"),
    "split once": lambda text, other: text.split("a", 1),
    "split from the right": lambda text, other: text.rsplit("a", 1),
    "lines": lambda text, other: text.splitlines(),
    "whole lines": lambda text, other: text.splitlines(True),
    "partition": lambda text, other: text.partition("a"),
    "partition from the right": lambda text, other: text.rpartition("a"),
    "prefix": lambda text, other: text.removeprefix("a"),
    "suffix": lambda text, other: text.removesuffix("a"),
    "slice": lambda text, other: text[1:-1],
    "every second": lambda text, other: text[::-2],
    "characters": lambda text, other: list(text),
    "upper": lambda text, other: text.upper(),
    "add": lambda text, other: text + other,
    "add to": lambda text, other: other + text,
    "times": lambda text, other: text * 2,
    "join": lambda text, other: text.join(["x", other]),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_are_those_of_str_and_characters_keep_their_codes(operation):
    @given(runs, words)
    def check(parts, other):
        # Letters stand for codes: a text in which each character says where it comes from.
        text, plain = mixed(parts), "".join(parts)
        made, expected = operation(text, other), operation(plain, other)
        assert made == expected
        for piece in [made] if isinstance(made, str) else made:
            assert len(codes(piece)) == len(piece)
            assert isinstance(piece, Tracked) or not piece

    check()


@given(runs, st.integers(-20, 20), st.integers(-20, 20))
def test_a_slice_has_the_codes_of_its_characters(parts, start, stop):
    text = mixed(parts)
    assert codes(text[start:stop]) == codes(text)[start:stop]


def numbered(text):
    """A text in which the code of each character is its place."""
    return joined(tracked(char, place) for place, char in enumerate(text))


def places(pieces):
    return [codes(piece) for piece in pieces]


@given(st.text("ab<", max_size=12), st.sampled_from(["a", "ab", "<a<"]), st.integers(-1, 3))
def test_pieces_keep_the_places_of_their_characters(plain, separator, count):
    text, n = numbered(plain), len(separator)
    starts = [0]
    while len(starts) - 1 != count and (place := plain.find(separator, starts[-1])) >= 0:
        starts.append(place + n)
    stops = [*(start - n for start in starts[1:]), len(plain)]
    assert places(text.split(separator, count)) == [[*range(a, b)] for a, b in zip(starts, stops, strict=True)]
    stops, starts = [len(plain)], []
    while len(stops) - 1 != count and (place := plain.rfind(separator, 0, stops[-1])) >= 0:
        starts.append(place + n)
        stops.append(place)
    starts.append(0)
    assert places(text.rsplit(separator, count)) == [[*range(a, b)] for a, b in zip(starts, stops, strict=True)][::-1]
    place = plain.find(separator)
    cuts = (place, place + n) if place >= 0 else (len(plain), len(plain))
    assert places(text.partition(separator)) == [[*range(cuts[0])], [*range(*cuts)], [*range(cuts[1], len(plain))]]


@given(st.text("ab \n", max_size=12))
def test_words_and_lines_keep_the_places_of_their_characters(plain):
    text = numbered(plain)
    for pieces in (text.split(), text.splitlines(True), [text.strip(), text.lstrip("a"), text.rstrip("\n")]):
        for piece in pieces:
            found = codes(piece)
            assert "".join(plain[place] for place in found) == piece
            assert found == [*range(found[0], found[0] + len(found))] if found else True
    kept = [place for piece in text.split() for place in codes(piece)]
    assert kept == [place for place, char in enumerate(plain) if not char.isspace()]


@given(runs)
def test_json_of_a_text_keeps_codes_through_escapes(parts):
    text = mixed(parts)
    written = to_json(text, ensure_ascii=True)
    assert written == json.dumps("".join(parts))
    for code, part in enumerate(parts):
        if part and parts.count(part) == 1:
            assert codes(written).count(code) >= len(part)


def test_replacements_stand_for_what_they_replace():
    text = tracked("an owl sat", 3).replace("owl", "eagle")
    assert (text, set(codes(text))) == ("an eagle sat", {3})


def test_json_of_data_has_the_code_of_the_data():
    data = tracked({"n": [1, True, None], "town": "Oslo"}, 5)
    assert data == {"n": [1, True, None], "town": "Oslo"}
    assert set(codes(to_json(data))) == {5}
    assert code_of(data["n"][0]) == 5
    assert [str(leaf) for leaf in leaves(data)] == ["n", "town", "Oslo"]


def test_a_text_made_in_an_unknown_way_is_found_again():
    source = tracked("owl in winter", 2)
    made = realigned("[OWL in winter!]", [source])
    assert codes(made) == [-1, -1, -1, -1, *[2] * 10, -1, -1]
