"""Which fields rows have beside their dialogues: few sets of names for many rows."""

import json
from collections.abc import Collection

MAX_NAMES, MAX_NAME = 500, 80
"""The most field names that are counted one by one in a chunk, and the most characters in a name: some data sets have a
field for each row."""

OTHER_FIELDS = "(other fields)"


class FieldSets:
    """Which fields each row has beside its dialogue, kept and not kept, as numbers of texts that occur again and again."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {"[[], []]": 0}
        self._numbers: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
        self._names: dict[str, str] = {}

    def number(self, kept: Collection[str], not_kept: Collection[str]) -> int:
        """The number of the text of these fields."""
        key = tuple(kept), tuple(not_kept)
        number = self._numbers.get(key)
        if number is None:
            text = json.dumps([sorted({self._short(name) for name in sorted(set(names))}) for names in key])
            number = self.texts.setdefault(text, len(self.texts))
            if len(self._numbers) < MAX_NAMES:
                self._numbers[key] = number
        return number

    def _short(self, name: str) -> str:
        if name not in self._names and len(self._names) >= MAX_NAMES:
            return OTHER_FIELDS
        return self._names.setdefault(name, name[:MAX_NAME].encode(errors="replace").decode())
