"""Fields of rows, turns and parts, by the names that data sets give them: each is taken, or it is counted as not kept."""

from collections.abc import Iterable, Mapping
from typing import Any

from fastcache.stages.prepare.spellings import is_present, plain_name


class Unusable(Exception):  # noqa: N818 - a verdict on one row, not an error of the program
    """Why a row can't be used; the message is the reason counted in the ledger."""


def to_text(value: Any) -> str:
    """A text that can be stored as UTF-8; raises `Unusable`."""
    if not isinstance(value, str):
        raise Unusable("no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable("invalid Unicode") from error
    return value


class Fields:
    """The fields of an object that are not null. What holds something and is never taken is `left` at the end."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """`prefix` comes before the names in `taken` and `left`."""
        self.taken: set[str] = set()
        self._values, self._prefix = values, prefix
        self._left = dict.fromkeys(name for name, value in values.items() if value is not None)
        self._spelled: dict[str, list[str]] = {}
        for name in self._left:
            self._spelled.setdefault(plain_name(name), []).append(name)

    def _named(self, spelling: str) -> list[str]:
        """The names that are spelled so, the exact one first."""
        names = [name for name in self._spelled.get(plain_name(spelling), ()) if name in self._left]
        return sorted(names, key=lambda name: name != spelling)

    def find(self, spellings: Iterable[str], kind: Any = object) -> str | None:
        """The name of the first of these fields that is of this kind and holds something, or else of the first of this
        kind, or None."""
        named = [name for spelling in spellings for name in self._named(spelling)]
        names = [name for name in named if isinstance(self._values[name], kind)]
        return next((name for name in names if is_present(self._values[name])), names[0] if names else None)

    def drop_empty_json(self, spellings: Iterable[str]) -> None:
        """Use up those of these fields that hold the JSON text of nothing."""
        for name in [name for spelling in spellings for name in self._named(spelling)]:
            value = self._values[name]
            if isinstance(value, str) and value.strip() in ("[]", "{}", "null"):
                self.use(name)

    def has(self, spelling: str) -> bool:
        """Whether a field of this name is there and not taken."""
        return bool(self._named(spelling))

    def get(self, name: str | None) -> Any:
        """The value of a field that was found, or None."""
        return None if name is None else self._values[name]

    def use(self, name: str | None) -> Any:
        """The value of a field that was found, which is neither `left` nor `taken` from now on; None if none was found."""
        if name is None:
            return None
        self._left.pop(name, None)
        return self._values[name]

    def take(self, name: str | None) -> Any:
        """As `use`, and the field is counted as `taken` if it holds anything."""
        if name is not None and is_present(self._values[name]):
            self.taken.add(self._prefix + name)
        return self.use(name)

    def take_first(self, spellings: Iterable[str], kind: Any = object) -> Any:
        """Take the field that `find` finds."""
        return self.take(self.find(spellings, kind))

    def take_equal(self, spellings: Iterable[str], value: Any) -> None:
        """Take all of these fields that have this value."""
        for name in [name for spelling in spellings for name in self._named(spelling)]:
            if self._values[name] == value:
                self.take(name)

    @property
    def left(self) -> set[str]:
        """The fields that hold something and weren't taken."""
        return {self._prefix + name for name in self._left if is_present(self._values[name])}
