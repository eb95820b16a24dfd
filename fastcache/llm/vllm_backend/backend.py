"""A model in vLLM's engine, whose worker writes residuals into an arena that this process reads.

Sequences are requests for one token more, so that prefill is all there is; a window of them is in flight, and results
are given in their order, whatever order vLLM finishes them in. The engine is a process of its own: while this one
rounds and writes, the model goes on.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from fastcache.cache_format.schema import layer_of
from fastcache.errors import ModelError
from fastcache.llm.backend import LostBackendError, Residuals, TokenIds, default_pack_tokens
from fastcache.llm.loading import ModelSource, check_layers, cut_layers, load_config
from fastcache.llm.transformers_backend import DTYPES
from fastcache.llm.vllm_backend.arena import Arena, ArenaShape, RowRing
from fastcache.llm.vllm_backend.engine import cpu_settings, start_engine

BATCHES_IN_FLIGHT = 4
SLOTS = 1024
SECONDS_FOR_COPIES = 60.0
"""How long rows of a finished sequence may take from the device to the arena."""


class _Flight(NamedTuple):
    """A sequence that was given to the engine."""

    request_id: str
    slot: int
    row: int
    length: int


class VllmBackend:
    """A model cut after its deepest captured layer, in an engine of its own."""

    note: str | None = None

    def __init__(
        self,
        source: ModelSource,
        hook_points: Sequence[str],
        dtype: str,
        devices: Sequence[str],
        max_length: int,
        batch_tokens: int | None = None,
        **engine: Any,
    ) -> None:
        """Start the engine on `devices`, over which the model is split, for sequences of up to `max_length` tokens.

        `engine` are further arguments of vLLM's engine. Raises `ModelError` for a model that vLLM can't run or whose
        residual stream it doesn't give, `InputError` for a layer out of range.
        """
        config = load_config(source)
        check_layers(config, list(hook_points), source)
        self.hook_points = list(hook_points)
        layers = [layer_of(hook) for hook in hook_points]
        kind = torch.device(devices[0]).type
        self.batch_tokens = batch_tokens or default_pack_tokens("vllm", devices[0])
        settings = {
            "hf_overrides": partial(cut_layers, n_layers=max(layers) + 1),
            "additional_config": {"fastcache": {"layers": layers}},
            **_capture_settings(),
            **(cpu_settings(config, max(layers) + 1, self.batch_tokens + max_length) if kind == "cpu" else {}),
            **engine,
        }
        self._engine = start_engine(source, dtype, devices, max_length, self.batch_tokens, settings, _require_capture)
        n_rows = arena_rows(self.batch_tokens, max_length)
        self._arena = Arena(ArenaShape(len(layers), n_rows, SLOTS, config.hidden_size, DTYPES[dtype]))
        self._n_requests, self._is_lost = 0, False
        connection = (self._arena.path, n_rows, SLOTS, os.getpid())
        self._engine.collective_rpc("fastcache_connect", args=connection)

    def residuals(self, sequences: Iterable[TokenIds]) -> Iterator[Residuals]:
        """See `Backend`. Takes as many sequences ahead as the arena has room for."""
        source = iter(sequences)
        ring = RowRing(self._arena.shape.n_rows)
        flights: deque[_Flight] = deque()
        upcoming = next(source, None)
        try:
            while upcoming is not None or flights:
                while upcoming is not None and len(flights) < SLOTS:
                    row = ring.take(len(upcoming))
                    if row is None:
                        break
                    flights.append(self._submit(upcoming, row))
                    upcoming = next(source, None)
                self._wait_for(flights[0])
                yield self._read(flights.popleft())
                ring.give_back()
        finally:
            self._drain()

    def _submit(self, token_ids: TokenIds, row: int) -> _Flight:
        from vllm import SamplingParams

        from fastcache.llm.vllm_backend.worker import ROW, SLOT

        slot = self._n_requests % SLOTS
        flight = _Flight(str(self._n_requests), slot, row, len(token_ids))
        self._n_requests += 1
        self._arena.written[slot] = 0
        marks = {SLOT: slot, ROW: row}
        parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=marks)
        with self._alive():
            self._engine.add_request(flight.request_id, {"prompt_token_ids": token_ids.tolist()}, parameters)
        return flight

    def _wait_for(self, flight: _Flight) -> None:
        """Have the engine go on until all rows of `flight` are in the arena."""
        while int(self._arena.written[flight.slot]) < flight.length and self._engine.has_unfinished_requests():
            self._step()
        # vLLM is done with all it has: what is missing can only be on its way from the device.
        deadline = time.monotonic() + SECONDS_FOR_COPIES
        while int(self._arena.written[flight.slot]) < flight.length:
            if time.monotonic() > deadline:
                raise LostBackendError(
                    f"vLLM finished a sequence of {flight.length} tokens but gave {int(self._arena.written[flight.slot])} "
                    "of its rows. Use --backend transformers, and report this."
                )
            time.sleep(0.0005)

    def _read(self, flight: _Flight) -> Residuals:
        rows = self._arena.rows[:, flight.row : flight.row + flight.length]
        # A copy in any case: the rows are given to the next sequence.
        return {hook: rows[place].to(torch.float32, copy=True).numpy() for place, hook in enumerate(self.hook_points)}

    def _step(self) -> None:
        with self._alive():
            self._engine.step()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Tells the engine's end from other errors, at whatever call it is noticed."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            self._is_lost = True
            raise LostBackendError(
                "vLLM's engine ended while it worked, perhaps for want of memory. Run the same command again: it goes on "
                "from what is on disk; a lower --pack-tokens needs less memory."
            ) from error

    def _drain(self) -> None:
        """Let what is in flight land: nothing may be written into rows that are given anew."""
        while self._engine.has_unfinished_requests() and not self._is_lost:
            self._step()

    def counts(self) -> dict[str, int]:
        """Of the engine so far: sequences, those that came in pieces, and rows that came again after a preemption."""
        return self._engine.collective_rpc("fastcache_counts")[0]

    def close(self) -> None:
        """End the engine."""
        self._engine.engine_core.shutdown(timeout=0)
        self._arena.close()


def arena_rows(batch_tokens: int, max_length: int) -> int:
    """Rows of residuals that are held for sequences in flight."""
    return max(BATCHES_IN_FLIGHT * batch_tokens, 2 * max_length)


def _capture_settings() -> dict[str, Any]:
    """What capture relies on."""
    from fastcache.llm.vllm_backend.loader import LOAD_FORMAT

    return {
        "worker_cls": "fastcache.llm.vllm_backend.worker.CaptureWorker",
        "load_format": LOAD_FORMAT,
        "enable_chunked_prefill": True,
    }


def _require_capture(model_config: Any, source: ModelSource) -> None:
    """Raise `ModelError` for a model whose residual stream vLLM doesn't give."""
    from vllm.model_executor.models.interfaces import supports_eagle3

    model, architecture = model_config.registry.resolve_model_cls(model_config.architectures, model_config)
    if not supports_eagle3(model):
        raise ModelError(
            f"vLLM doesn't give the residual stream of {architecture}, the architecture of {source.name!r} (it has no "
            "auxiliary hidden states there). Use --backend transformers."
        )
