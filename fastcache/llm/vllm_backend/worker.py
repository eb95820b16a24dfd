"""vLLM's worker, with the residual stream taken from each batch that it runs.

The model's own EAGLE3 interface makes it give the residual stream after chosen layers as outputs of its graph, which
holds under compilation, CUDA graphs and tensor parallelism. Auxiliary state k is the output of layer k - 1: hidden and
residual already added, before the final norm. The runner keeps them between `execute_model` and `sample_tokens`.

A batch may hold a piece of a sequence (chunked prefill) or rows it has had before (preemption), in any order; which rows
these are is in the scheduler's word, and each is written where it belongs. Requests without our mark are vLLM's warm-up.
"""

import os
import select
from dataclasses import dataclass
from threading import Thread
from typing import Any

from vllm.platforms import current_platform

from fastcache.llm.vllm_backend import loader  # noqa: F401  registers the load format in this process
from fastcache.llm.vllm_backend.arena import Arena, ArenaShape
from fastcache.llm.vllm_backend.capture import Capture, CudaCapture, Span

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as VllmWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker

SLOT, ROW = "fastcache_slot", "fastcache_row"
"""What a request carries: its counter and its first row in the arena."""


@dataclass
class _Sequence:
    """A request of ours in flight."""

    slot: int
    row: int
    length: int
    written: int = 0
    pieces: int = 0


class CaptureWorker(VllmWorker):
    """Writes the residuals of every prompt token into the arena that `fastcache_connect` names."""

    def load_model(self, **keywords: Any) -> None:
        """Load, and have the model give its residual stream too: before profiling, compilation and graph capture."""
        super().load_model(**keywords)
        config = self.vllm_config
        if config.cache_config.enable_prefix_caching or config.parallel_config.pipeline_parallel_size > 1:
            raise RuntimeError("Capture needs prefix caching off and one pipeline stage.")
        self._layers: list[int] = config.additional_config["fastcache"]["layers"]
        self.model_runner.get_model().set_aux_hidden_state_layers(tuple(layer + 1 for layer in self._layers))
        self.model_runner.use_aux_hidden_state_outputs = True
        self._capture: Capture | None = None
        self._sequences: dict[str, _Sequence] = {}
        self._counts = {"sequences": 0, "split": 0, "replayed": 0}

    def fastcache_connect(self, path: str, n_rows: int, n_slots: int, owner: int) -> None:
        """Open the arena at `path` of the process `owner`, and end when that one ends."""
        if owner != os.getpid():
            _end_with(owner)
        if self.rank % self.parallel_config.tensor_parallel_size:
            return  # all ranks have the same residuals
        config = self.model_config
        shape = ArenaShape(len(self._layers), n_rows, n_slots, config.get_hidden_size(), config.dtype)
        arena = Arena(shape, path)
        is_cuda = self.device.type == "cuda"
        batch_tokens = self.scheduler_config.max_num_batched_tokens
        self._capture = CudaCapture(arena, batch_tokens) if is_cuda else Capture(arena)

    def fastcache_counts(self) -> dict[str, int]:
        """Sequences seen, those that came in several pieces, and rows that came again after a preemption."""
        return dict(self._counts)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a batch as vLLM does, and take its residuals."""
        for request in scheduler_output.scheduled_new_reqs:
            self._begin(request)
        output = super().execute_model(scheduler_output)
        if self._capture and self._sequences and scheduler_output.total_num_scheduled_tokens:
            state = self.model_runner.execute_model_state
            if state is None or state.aux_hidden_states is None:
                raise RuntimeError("This version of vLLM doesn't keep the auxiliary hidden states of a batch.")
            spans = self._spans(scheduler_output, state)
            n_tokens = scheduler_output.total_num_scheduled_tokens
            self._capture.take([rows[:n_tokens] for rows in state.aux_hidden_states], spans)
        for request_id in scheduler_output.finished_req_ids:
            self._sequences.pop(request_id, None)
        return output

    def _begin(self, request: Any) -> None:
        marks = (request.sampling_params and request.sampling_params.extra_args) or {}
        if SLOT not in marks or request.req_id in self._sequences:  # after a preemption a request may come as new again
            return
        if request.num_computed_tokens:
            raise RuntimeError("vLLM skips the first tokens of a sequence as already computed.")
        self._sequences[request.req_id] = _Sequence(marks[SLOT], marks[ROW], len(request.prompt_token_ids))
        self._counts["sequences"] += 1

    def _spans(self, scheduler_output: Any, state: Any) -> list[Span]:
        """Which rows of the batch go where."""
        # One of vLLM's runners keeps the order of the batch in its state, the other in itself.
        batch = state.input_batch if hasattr(state, "input_batch") else self.model_runner.input_batch
        known = scheduler_output.scheduled_cached_reqs
        starts = dict(zip(known.req_ids, known.num_computed_tokens, strict=True))
        starts |= {request.req_id: request.num_computed_tokens for request in scheduler_output.scheduled_new_reqs}
        spans, batch_row = [], 0
        for request_id in batch.req_ids:
            scheduled = scheduler_output.num_scheduled_tokens.get(request_id, 0)
            sequence = self._sequences.get(request_id)
            if sequence is not None and scheduled:
                span = self._span(sequence, batch_row, int(starts[request_id]), scheduled)
                if span.n_rows > 0:
                    spans.append(span)
            batch_row += scheduled
        if batch_row != scheduler_output.total_num_scheduled_tokens:
            raise RuntimeError("The batch holds other sequences than its scheduler says.")
        return spans

    def _span(self, sequence: _Sequence, batch_row: int, start: int, scheduled: int) -> Span:
        count = min(scheduled, sequence.length - start)  # what is beyond the prompt is a token that nobody asked for
        if start > sequence.written:
            raise RuntimeError(f"Tokens {sequence.written} to {start} of a sequence never came.")
        if count > 0:
            sequence.pieces += 1
            self._counts["split"] += sequence.pieces == 2
            self._counts["replayed"] += max(0, min(sequence.written, start + count) - start)
            sequence.written = max(sequence.written, start + count)
        return Span(batch_row, sequence.row + start, count, sequence.slot, sequence.written)


def _end_with(process: int) -> None:
    """End this process when `process` ends: killed, that one gives no word."""
    handle = os.pidfd_open(process)

    def watch() -> None:
        select.select([handle], [], [])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
