"""What can go wrong, by kind. Every message says what was expected, what was found, where, and what to do next.

The command line prints these as one paragraph and exits with code 2; anything else is a bug and shows a traceback.
"""


class FastcacheError(Exception):
    """Base of all errors that a user can cause and mend."""


class InputError(FastcacheError, ValueError):
    """An option, a file or a row that can't be used."""


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
