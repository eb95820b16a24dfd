"""What can go wrong, by kind. Every message says what was expected, what was found, where, and what to do next.

The command line prints these as one paragraph and exits with code 2; anything else is a bug and shows a traceback.
Values and other libraries' errors are quoted in messages through `quoted` and `first_line`, so that messages stay short.
"""

import reprlib
from typing import Any

LONGEST_QUOTE = 120
LONGEST_REASON = 300


class FastcacheError(Exception):
    """Base of all errors that a user can cause and mend."""


class InputError(FastcacheError, ValueError):
    """An option, a file or a row that can't be used."""


class TemplateRefusalError(InputError):
    """A dialogue that the model's chat template doesn't take."""

    def __init__(self, reason: str, by_template: bool = False) -> None:
        """`reason` is the template's own message, or that of Jinja or Python if it has none (`by_template` false)."""
        super().__init__(f"The model's chat template refuses this dialogue: {reason}")
        self.reason = reason
        self.by_template = by_template


class ModelError(FastcacheError, ValueError):
    """A model or tokenizer that can't be found or can't be used."""


class FormatError(FastcacheError, ValueError):
    """A corpus, cache or checkpoint that doesn't follow its format, or follows another version of it."""


class IntegrityError(FastcacheError, OSError):
    """Stored bytes that differ from their checksum."""


class MismatchError(FastcacheError, ValueError):
    """Resuming, or combining, things made with different settings."""


class StorageError(FastcacheError, OSError):
    """A disk or an object store that fails while writing."""


class SpaceError(FastcacheError, OSError):
    """Not enough disk space or memory for what was asked."""


class NonFiniteError(FastcacheError, ArithmeticError):
    """NaN or infinity where numbers were expected."""


class EndpointError(FastcacheError, OSError):
    """A judge's endpoint that refuses, or fails again and again."""


class BudgetError(FastcacheError, RuntimeError):
    """The user's own limit on requests or cost was reached before the work was done."""


class BusyError(FastcacheError, OSError):
    """Another process works on the same output directory."""


def shortened(text: str, at_most: int = LONGEST_QUOTE) -> str:
    """`text`, with its middle replaced by ' ... ' where it has more than `at_most` characters."""
    if len(text) <= at_most:
        return text
    head = (at_most - 5) * 2 // 3
    tail = at_most - 5 - head
    return f"{text[:head]} ... {text[len(text) - tail :]}"


def printable(text: str) -> str:
    """`text` with a replacement character for everything that a terminal would obey, and for halves of surrogate pairs."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def quoted(value: Any) -> str:
    """The `repr` of a value for a message: at most about `LONGEST_QUOTE` characters, however large the value is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = LONGEST_QUOTE
    brief.maxlist = brief.maxtuple = brief.maxdict = 24
    return printable(shortened(brief.repr(value)))


def first_line(error: BaseException) -> str:
    """What an exception of another library says, printable and short; its class where it says nothing.

    That is its first line, and the next one where the first ends with a colon.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return printable(shortened(text, LONGEST_REASON)).rstrip(".") or type(error).__name__
