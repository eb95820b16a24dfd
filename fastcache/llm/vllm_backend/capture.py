"""From the rows of a batch to the rows of the arena."""

import queue
from collections.abc import Sequence
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

from fastcache.llm.vllm_backend.arena import Arena

STAGING_BUFFERS = 3
"""One being filled by the device, one being emptied, one between them."""


class Span(NamedTuple):
    """Rows of one sequence in one batch."""

    batch_row: int
    arena_row: int
    n_rows: int
    slot: int
    written: int
    """Leading rows of the sequence that are in the arena once these are."""


class Capture:
    """Copies on the CPU, at once: the batch's tensors may be used again by the next one."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def take(self, states: Sequence[Tensor], spans: Sequence[Span]) -> None:
        """Bring the rows `spans` of `states`, one tensor `[n, d_in]` for each hook point, into the arena."""
        self._scatter(states, spans)

    def _scatter(self, states: Sequence[Tensor], spans: Sequence[Span]) -> None:
        for hook, rows in enumerate(states):
            target = self.arena.rows[hook]
            for span in spans:
                source = rows[span.batch_row : span.batch_row + span.n_rows]
                target[span.arena_row : span.arena_row + span.n_rows] = source
        for span in spans:  # last: who reads this counter relies on the rows
            self.arena.written[span.slot] = span.written


class CudaCapture(Capture):
    """Copies into pinned buffers, used in turn, behind the model's back; a thread brings them from there to the arena."""

    def __init__(self, arena: Arena, batch_tokens: int) -> None:
        super().__init__(arena)
        shape = arena.shape
        self._free: queue.Queue[Tensor] = queue.Queue()
        for _ in range(STAGING_BUFFERS):
            self._free.put(torch.empty(shape.n_hooks, batch_tokens, shape.d_in, dtype=shape.dtype, pin_memory=True))
        self._filled: queue.Queue[tuple[Tensor, torch.cuda.Event, Sequence[Span]]] = queue.Queue()
        self._error: BaseException | None = None
        Thread(target=self._empty_buffers, daemon=True).start()

    def take(self, states: Sequence[Tensor], spans: Sequence[Span]) -> None:
        """See `Capture.take`; waits only where all buffers are full."""
        if self._error:
            raise self._error
        buffer = self._free.get()
        for host, rows in zip(buffer, states, strict=True):
            host[: len(rows)].copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._filled.put((buffer, event, spans))

    def _empty_buffers(self) -> None:
        while True:
            buffer, event, spans = self._filled.get()
            try:
                event.synchronize()
                self._scatter(list(buffer), spans)
            except BaseException as error:  # told to vLLM's thread with its next batch
                self._error = error
            self._free.put(buffer)
