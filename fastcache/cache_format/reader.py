"""Reading a cache: by instance, by unit, by row. Every residual read is checked against its unit's crc32c.

Opening reads two small files, whatever the size of the cache; it loads no model, no data set, no torch and no zarr.
"""

import gc
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.manifest import Log, load_manifest
from fastcache.cache_format.part import Part
from fastcache.cache_format.schema import ROW_DTYPES, UNIT_ROWS, decode
from fastcache.cache_format.statistics import Moments, merged
from fastcache.cache_format.storage import Storage, open_storage
from fastcache.cache_format.unit_array import RESTORE, Rows
from fastcache.config import nearest
from fastcache.errors import InputError, IntegrityError


class CachedInstance:
    """One sequence of the cache: a dialogue for `fast`, a block for block training."""

    def __init__(self, cache: "Cache", part: int, index: int) -> None:
        self._cache, self._part = cache, cache.parts[part]
        offsets = self._part.tokens["instance_offsets"]
        self._inside = slice(int(offsets[index]), int(offsets[index + 1]))
        self.instance_id = int(self._part.tokens["instance_ids"][index])
        """Row of the corpus for `fast`, number of the block for block training."""
        first = cache.first_row(part)
        self.rows = slice(first + self._inside.start, first + self._inside.stop)
        """The sequence's rows, counted over the whole cache."""

    def __len__(self) -> int:
        return self._inside.stop - self._inside.start

    @property
    def corpus_rows(self) -> list[int]:
        """Rows of the corpus whose text is in this instance: one for `fast`, one or more for a block."""
        starts = self._part.tokens["document_offsets"]
        first = bisect_right(starts, self._inside.start) - 1
        last = bisect_right(starts, self._inside.stop - 1)
        return [int(row) for row in self._part.tokens["document_ids"][first:last]]

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """Token ids `[n]`."""
        return cast(npt.NDArray[np.int32], self._part.tokens["token_ids"][self._inside])

    @property
    def token_types(self) -> npt.NDArray[np.uint8]:
        """Flags `[n]`, see `fastcache.cache_format.schema.TokenType`."""
        return cast(npt.NDArray[np.uint8], self._part.tokens["token_types"][self._inside])

    def residuals(self, hook_point: str) -> npt.NDArray[np.float32]:
        """The residual stream `[n, d_in]` at `hook_point`, for example `"resid_post.18"`, as float32."""
        return self._cache.residuals(hook_point, self.rows.start, self.rows.stop)

    def to_torch(self, hook_point: str) -> Any:
        """The same as a float32 torch tensor `[n, d_in]`."""
        return self._cache.to_torch(hook_point, self.rows.start, self.rows.stop)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Many small objects that all stay: to look for garbage among them again and again takes most of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Cache:
    """A cache opened for reading."""

    def __init__(self, storage: Storage) -> None:
        self.path = storage.url
        """Folder or address of the cache."""
        self.manifest = load_manifest(storage)
        with _no_collection():
            self.parts = [Part(storage, record, self.manifest) for record in Log(storage).records]
        self._first_instance = np.cumsum([0, *(part.record.n_instances for part in self.parts)]).tolist()
        self._first_row = np.cumsum([0, *(part.record.n_tokens for part in self.parts)]).tolist()
        totals = {"n_parts": len(self.parts), "n_tokens": self.n_tokens, "n_instances": self.n_instances}
        for name, found in totals.items():
            if self.complete and self.manifest.totals.get(name) != found:
                expected = self.manifest.totals.get(name)
                raise IntegrityError(f"{self.path}: the log has {name} = {found}, the manifest {expected}. {RESTORE}")

    @property
    def n_instances(self) -> int:
        """Number of sequences."""
        return int(self._first_instance[-1])

    @property
    def n_tokens(self) -> int:
        """Number of rows."""
        return int(self._first_row[-1])

    @property
    def hook_points(self) -> list[str]:
        """The captured hook points, for example `["resid_post.18"]`."""
        return self.manifest.hook_points

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self.manifest.d_in

    @property
    def row_dtype(self) -> np.dtype[Any]:
        """Dtype of rows before they are decoded."""
        return np.dtype(ROW_DTYPES[self.manifest.dtype])

    @property
    def complete(self) -> bool:
        """Whether extraction has finished."""
        return self.manifest.state == "complete"

    def require_complete(self) -> None:
        """Raise `InputError` for a cache that is still being written."""
        if not self.complete:
            raise InputError(f"{self.path} is not complete: run its `fastcache extract` command again to finish it.")

    def require_dialogues(self) -> None:
        """Raise `InputError` for a cache of blocks, in which text of several dialogues goes through the model together."""
        if self.manifest.identity["method"]["name"] != "fast":
            raise InputError(
                f"{self.path} holds blocks; this is by dialogue, on a cache of `fastcache extract --method fast`."
            )

    def require_hook(self, hook_point: str | None) -> str:
        """`hook_point` if the cache has it, or its only one; raises `InputError` otherwise."""
        if hook_point is None and len(self.hook_points) == 1:
            return self.hook_points[0]
        if hook_point not in self.hook_points:
            chosen = "none was chosen" if hook_point is None else f"{hook_point!r} was asked for"
            guess = nearest(hook_point, self.hook_points) if hook_point else ""
            raise InputError(
                f"{self.path} holds {', '.join(self.hook_points)}; {chosen}. Choose one with --layer.{guess}"
            )
        return hook_point

    def instance(self, index: int) -> CachedInstance:
        """Sequence number `index`, in the order of the cache; negative numbers count from the end."""
        if not -self.n_instances <= index < self.n_instances:
            raise IndexError(f"instance {index} of a cache with {self.n_instances} instances")
        index %= self.n_instances
        part = bisect_right(self._first_instance, index) - 1
        inside = index - self._first_instance[part]
        return CachedInstance(self, part, inside)

    def __len__(self) -> int:
        return self.n_instances

    @overload
    def __getitem__(self, index: int) -> CachedInstance: ...
    @overload
    def __getitem__(self, index: slice) -> list[CachedInstance]: ...
    def __getitem__(self, index: int | slice) -> CachedInstance | list[CachedInstance]:
        if isinstance(index, slice):
            return [self.instance(i) for i in range(*index.indices(self.n_instances))]
        return self.instance(index)

    def instances(self) -> Iterator[CachedInstance]:
        """All sequences in order."""
        return (self.instance(index) for index in range(self.n_instances))

    def units(self) -> npt.NDArray[np.int64]:
        """Part, first row and last row + 1, of every unit `[n_units, 3]`: at most `UNIT_ROWS` rows each."""
        n_tokens = np.array([part.record.n_tokens for part in self.parts], np.int64)
        n_units = -(-n_tokens // UNIT_ROWS)
        parts = np.repeat(np.arange(len(self.parts)), n_units)
        starts = (np.arange(len(parts)) - np.repeat(np.cumsum(n_units) - n_units, n_units)) * UNIT_ROWS
        return np.stack([parts, starts, np.minimum(starts + UNIT_ROWS, n_tokens[parts])], 1)

    def first_row(self, part: int) -> int:
        """Number, counted over the whole cache, of the first row of `part`."""
        return int(self._first_row[part])

    def residuals(self, hook_point: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows `start` to `stop` - 1, counted over the whole cache, as float32 `[stop - start, d_in]`."""
        hook = self.require_hook(hook_point)
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"rows {start} to {stop} of a cache with {self.n_tokens} rows")
        pieces = [
            part.rows(hook, max(0, start - first), min(part.record.n_tokens, stop - first))
            for part, first in zip(self.parts, self._first_row, strict=False)
            if start < first + part.record.n_tokens and first < stop
        ]
        stored = np.concatenate(pieces) if pieces else np.empty((0, self.d_in), self.row_dtype)
        return decode(stored, self.manifest.dtype)

    def to_torch(self, hook_point: str, start: int, stop: int) -> Any:
        """`residuals` as a float32 torch tensor."""
        import torch

        return torch.from_numpy(self.residuals(hook_point, start, stop))

    def gather(self, hook: str, row_numbers: npt.NDArray[np.int64]) -> Rows:
        """The rows `[n, d_in]` with these numbers, counted over the whole cache, as stored."""
        gathered: Rows | None = None
        parts = np.searchsorted(self._first_row, row_numbers, side="right") - 1
        keys = parts * (1 << 40) + (row_numbers - np.take(self._first_row, parts)) // UNIT_ROWS
        order = np.argsort(keys, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1) if len(order) else []:
            part = int(parts[group[0]])
            inside = row_numbers[group] - self.first_row(part)
            start = int(inside.min())
            values = self.parts[part].rows(hook, start, int(inside.max()) + 1)
            if gathered is None:
                gathered = np.empty((len(row_numbers), self.d_in), values.dtype)
            gathered[group] = values[inside - start]
        return np.empty((0, self.d_in), self.row_dtype) if gathered is None else gathered

    def statistics(self, hook: str) -> Moments:
        """Moments of all rows at `hook`, merged over the parts."""
        return merged((part.moments(hook) for part in self.parts), self.d_in)

    def summary(self, hook: str) -> dict[str, Any]:
        """What the manifest says of the rows at `hook`, by group of tokens."""
        errors = [error for part in self.parts if (error := part.squared_error(hook)) is not None]
        return self.statistics(hook).summary(np.sum(errors, 0) if errors else None)


def open_cache(path: str | PathLike[str]) -> Cache:
    """Open the cache in a folder, or at an address such as `s3://bucket/folder`.

    Raises `FormatError` if it is none, or of another format version; `IntegrityError` if its manifest or log is damaged.
    """
    return Cache(open_storage(path))
