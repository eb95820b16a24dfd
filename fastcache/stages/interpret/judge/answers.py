"""Reading what a judge says: what doesn't follow the form is counted as such, and never guessed."""

import re
from collections.abc import Sequence
from typing import NamedTuple

LONGEST_NAME = 200
_BRACKETS = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


class UnparsedError(ValueError):
    """An answer that isn't in the form that was asked for; the message is a short reason, to be counted."""


class Score(NamedTuple):
    """From 1 to 5, and the pattern's name."""

    score: int
    name: str


def parse_score(text: str) -> Score:
    """The score and the name of an answer with just one [[score]] and then one [[name]]; raises `UnparsedError`."""
    found = _in_brackets(text, 2)
    if found[0] not in {"1", "2", "3", "4", "5"}:
        raise UnparsedError("no score from 1 to 5")
    if not found[1] or "\n" in found[1] or len(found[1]) > LONGEST_NAME:
        raise UnparsedError("no short name")
    return Score(int(found[0]), found[1])


def parse_detection(text: str, n_texts: int) -> frozenset[int]:
    """The numbers, of 1 to `n_texts`, of an answer with just one [[1, 4]] or [[none]]; raises `UnparsedError`."""
    (found,) = _in_brackets(text, 1)
    if found.lower() == "none":
        return frozenset()
    if not re.fullmatch(r"[0-9]{1,3}( *,? *[0-9]{1,3})*", found):
        raise UnparsedError("no list of numbers")
    numbers = [int(number) for number in re.findall("[0-9]+", found)]
    if len(set(numbers)) < len(numbers) or not all(1 <= number <= n_texts for number in numbers):
        raise UnparsedError("numbers of no texts")
    return frozenset(numbers)


def _in_brackets(text: str, count: int) -> list[str]:
    if not text.strip():
        raise UnparsedError("empty")
    found = [each.strip() for each in _BRACKETS.findall(text)]
    if not found:
        raise UnparsedError("no double brackets")
    if len(found) != count:
        raise UnparsedError(f"{'more' if len(found) > count else 'fewer'} double brackets than asked for")
    return found


def balanced_accuracy(said: frozenset[int], active: Sequence[bool]) -> float:
    """Mean of the shares of active and of other texts that were told right; 0.5 is chance."""
    right = [(number in said) == is_active for number, is_active in enumerate(active, 1)]
    shares = [
        sum(each for each, is_active in zip(right, active, strict=True) if is_active == kind) / list(active).count(kind)
        for kind in (True, False)
    ]
    return sum(shares) / 2
