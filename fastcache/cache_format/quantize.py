"""int8 residuals: each dimension standardised, each row with a scale of its own; rows of massive norm stay float32.

    q = round(z / s),   z = (x - mean) / deviation,   s = max |z| / 127

`mean` and `deviation` `[d_in]` come from the first rows of the part, so parts don't depend on each other. Without the
standardisation a few massive dimensions would leave nothing of the others; a row whose norm is massive would, too.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.schema import UNIT_ROWS
from fastcache.cache_format.statistics import GROUPS, sums_by_group
from fastcache.cache_format.unit_array import Files, Rows, UnitArray, UnitArrayWriter
from fastcache.errors import FormatError

Floats = npt.NDArray[np.float32]

CALIBRATION_ROWS = 16 * UNIT_ROWS
MASSIVE = 10
"""Rows with so many times the median norm stay raw: attention sinks have hundreds of times."""


def int8_array(hook: str, name: str) -> str:
    """Name of an array that belongs to the int8 rows of `hook`."""
    return f"{hook}.int8.{name}"


class Scheme(NamedTuple):
    """How a part's rows are quantised."""

    mean: Floats
    deviation: Floats
    largest_norm: float

    @classmethod
    def of(cls, rows: Floats) -> "Scheme":
        """From rows `[n, d_in]`."""
        norms = np.sqrt(np.square(rows, dtype=np.float64).sum(1))
        largest_norm = MASSIVE * float(np.median(norms))
        ordinary = rows[norms <= largest_norm].astype(np.float64)
        deviation = ordinary.std(0)
        # A dimension that hardly varies must not blow up the few values that do.
        floor = max(1e-6 * float(deviation.max()), 1e-8 * largest_norm, float(np.finfo(np.float32).tiny) * 2**20)
        return cls(ordinary.mean(0).astype(np.float32), np.maximum(deviation, floor).astype(np.float32), largest_norm)

    def encode(self, rows: Floats) -> tuple[npt.NDArray[np.int8], Floats, npt.NDArray[np.bool_]]:
        """Quantised rows `[n, d_in]`, scales `[n, 1]`, and which rows `[n]` are to stay raw: these are zeros here."""
        norms = np.sqrt(np.square(rows, dtype=np.float64).sum(1))
        raw = norms > self.largest_norm
        z = (np.where(raw[:, None], self.mean, rows) - self.mean) / self.deviation
        scales = (np.abs(z).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
        scales[scales == 0] = 1
        return np.rint(z / scales).astype(np.int8), scales, raw

    def decode(self, quantised: npt.NDArray[np.int8], scales: Floats) -> Floats:
        """Rows `[n, d_in]` again, as near as they are."""
        return quantised * scales * self.deviation + self.mean


class Int8Writer:
    """Writes the rows of one hook point as int8."""

    def __init__(self, files: Files, hook: str, shape: tuple[int, int]) -> None:
        self._files, self._hook, self._shape = files, hook, shape
        self._rows = UnitArrayWriter(files, hook, shape, "int8", "int8")
        self._scales = UnitArrayWriter(files, int8_array(hook, "scales"), (shape[0], 1), "float32", "float32")
        self._waiting: list[tuple[Floats, npt.NDArray[np.uint8]]] = []
        self._scheme: Scheme | None = None
        self._raw_rows: list[int] = []
        self._raw: list[Floats] = []
        self._squared_error = np.zeros(len(GROUPS))

    @property
    def n_rows(self) -> int:
        """Rows written."""
        return self._rows.n_rows

    def add(self, unit: Floats, token_types: npt.NDArray[np.uint8]) -> None:
        """Take a unit of float32 rows `[n, d_in]` with their token types `[n]`."""
        self._waiting.append((unit.copy(), token_types.copy()))
        if self._scheme is not None or len(self._waiting) * UNIT_ROWS >= CALIBRATION_ROWS:
            self._write_waiting()

    def _write_waiting(self) -> None:
        if self._scheme is None:
            self._scheme = Scheme.of(np.concatenate([unit for unit, _ in self._waiting]))
        for unit, token_types in self._waiting:
            quantised, scales, raw = self._scheme.encode(unit)
            errors = np.square(self._scheme.decode(quantised, scales).astype(np.float64) - unit).sum(1)
            errors[raw] = 0
            self._squared_error += sums_by_group(errors, token_types)
            self._raw_rows += (np.flatnonzero(raw) + self._rows.n_rows).tolist()
            self._raw += list(unit[raw][:, None])
            self._rows.add(quantised)
            self._scales.add(scales)
        self._waiting = []

    def finish(self) -> None:
        """Write what is left, and what stands beside the rows."""
        self._write_waiting()
        if self._scheme is None:
            raise FormatError(f"{self._hook}: there are no rows to write.")
        self._rows.finish()
        self._scales.finish()
        shape = (len(self._raw), self._shape[1])
        raw = UnitArrayWriter(self._files, int8_array(self._hook, "raw"), shape, "float32", "float32", unit_rows=1)
        for row in self._raw:
            raw.add(np.ascontiguousarray(row))
        raw.finish()
        self._files.small(int8_array(self._hook, "raw_rows"), np.array(self._raw_rows, np.int64))
        self._files.small(int8_array(self._hook, "mean"), self._scheme.mean)
        self._files.small(int8_array(self._hook, "deviation"), self._scheme.deviation)
        self._files.small(int8_array(self._hook, "squared_error"), self._squared_error)

    def close(self) -> None:
        """Let go of open files, after an error."""
        self._rows.close()
        self._scales.close()


class Int8Array:
    """int8 rows on disk, read as float32."""

    dtype: np.dtype[Any] = np.dtype(np.float32)

    def __init__(
        self, rows: UnitArray, scales: UnitArray, raw: UnitArray, raw_rows: npt.NDArray[np.int64], scheme: Scheme
    ) -> None:
        self._rows, self._scales, self._raw, self._raw_rows, self._scheme = rows, scales, raw, raw_rows, scheme

    def unit_arrays(self) -> list[UnitArray]:
        """The arrays of units that it is made of."""
        return [self._rows, self._scales, self._raw]

    def will_need(self, unit: int) -> None:
        """Say that a unit will be read soon."""
        self._rows.will_need(unit)
        self._scales.will_need(unit)

    def read_unit(self, unit: int, out: Rows, verify: bool = True) -> None:
        """Fill `out` float32 `[n, d_in]` with the rows of a unit; see `UnitArray.read_unit`."""
        quantised, scales = np.empty(out.shape, np.int8), np.empty((len(out), 1), np.float32)
        self._rows.read_unit(unit, quantised, verify)
        self._scales.read_unit(unit, scales, verify)
        out[...] = self._scheme.decode(quantised, scales)
        first = unit * UNIT_ROWS
        start, stop = np.searchsorted(self._raw_rows, [first, first + len(out)]).tolist()
        for number in range(start, stop):
            place = int(self._raw_rows[number]) - first
            self._raw.read_unit(number, out[place : place + 1], verify)
