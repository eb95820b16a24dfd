"""Memory that vLLM's worker writes residuals into and our process reads them from, row by row in their final order.

It is an anonymous file: it needs no room in /dev/shm, and it is gone with the last process that has it, however that
one ends. Each sequence in flight has a run of rows and a slot, in which the worker counts the rows it has written.
"""

import mmap
import os
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class ArenaShape(NamedTuple):
    """What two processes have to agree on."""

    n_hooks: int
    n_rows: int
    n_slots: int
    d_in: int
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Counters and rows."""
        return 8 * self.n_slots + self.n_hooks * self.n_rows * self.d_in * self.dtype.itemsize


class Arena:
    """`rows` `[n_hooks, n_rows, d_in]` and `written` `[n_slots]`, the leading rows of each sequence that are there."""

    def __init__(self, shape: ArenaShape, path: str | None = None) -> None:
        """A new arena, or that of another process at `path`."""
        self.shape = shape
        if path is None:
            self._file = os.memfd_create("fastcache-residuals")
            os.ftruncate(self._file, shape.n_bytes)
        else:
            self._file = os.open(path, os.O_RDWR)
        memory = mmap.mmap(self._file, shape.n_bytes)
        self.written = torch.frombuffer(memory, dtype=torch.int64, count=shape.n_slots)
        rows = torch.frombuffer(memory, dtype=shape.dtype, offset=8 * shape.n_slots)
        self.rows: Tensor = rows.view(shape.n_hooks, shape.n_rows, shape.d_in)

    @property
    def path(self) -> str:
        """Where another process of this user finds it, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        """Let go of the file; the memory goes with the tensors."""
        os.close(self._file)


class RowRing:
    """Runs of consecutive rows, taken and given back in the same order."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self._runs: deque[tuple[int, int]] = deque()

    def take(self, count: int) -> int | None:
        """First row of a run of `count` rows that nobody has, or None until earlier runs are given back."""
        start = 0
        if self._runs:
            oldest, newest = self._runs[0][0], self._runs[-1][1]
            has_wrapped = newest <= oldest
            start = newest
            if not has_wrapped and start + count > self.n_rows:
                start, has_wrapped = 0, True
            if has_wrapped and start + count > oldest:
                return None
        if start + count > self.n_rows:
            return None
        self._runs.append((start, start + count))
        return start

    def give_back(self) -> None:
        """The oldest run is free again."""
        self._runs.popleft()
