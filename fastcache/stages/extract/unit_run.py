"""Units go through the model, here or in worker processes; before the first of them, the parity check."""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache.cache_format.layers import LayerWriter
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.writer import CacheWriter
from fastcache.llm.backend import Backend
from fastcache.llm.backends import BackendPlan
from fastcache.llm.parity import check_parity, spread
from fastcache.llm.reference import Reference
from fastcache.progress import Progress
from fastcache.stages.extract.compute import Worker, compute_by_crew, compute_here
from fastcache.stages.extract.model_use import ModelUse
from fastcache.stages.extract.plan import Plan, announce_time
from fastcache.stages.extract.sequences import Unit
from fastcache.stages.extract.status import Status


@dataclass
class LocalModel:
    """The backend of this process: opened when it is asked for."""

    plan: BackendPlan
    progress: Progress
    _backend: Backend | None = None

    @property
    def is_open(self) -> bool:
        """Whether it was asked for."""
        return self._backend is not None

    def backend(self) -> Backend:
        """The backend, after its word on how it runs the model."""
        if self._backend is None:
            self._backend = self.plan.open()
            if self._backend.note:
                self.progress.say(self._backend.note)
        return self._backend

    def close(self) -> None:
        """Let go of the model, if there is one."""
        if self._backend is not None:
            self._backend.close()
        self._backend = None


@dataclass
class UnitRun:
    """What a run is made with."""

    use: ModelUse
    worker: Worker
    plan: Plan
    sample: list[Instance]
    """Sequences for the parity check and for the estimate of the time."""
    progress: Progress
    status_path: Path | None

    def compute(
        self,
        name: str,
        units: Iterable[Unit],
        writer: CacheWriter | LayerWriter,
        on_parity: Callable[[dict[str, Any]], None] | None,
    ) -> dict[int, str]:
        """Make the parts of `units` that are missing; returns those given up, with the reason.

        `on_parity` takes the figures of the parity check, before the first unit; None: it was made before.
        """
        use = self.use
        with closing(LocalModel(self.worker.plan, self.progress)) as model:
            if use.n_checked and on_parity:
                on_parity(self._parity(model.backend()))
            if model.is_open or use.n_workers == 1:
                announce_time(self.plan, use, model.backend(), self.sample, self.progress)
            if use.n_workers > 1:
                model.close()  # the workers have models of their own
            done = [record.n_tokens for record in writer.committed.values()]
            expected = max(self.plan.expected_tokens, sum(done))
            with self.progress.task(name, expected, "tokens", sum(done)) as task:
                status = Status(task, self.progress, expected, self.plan.row_bytes, self.status_path)
                status.begin_with(sum(done), len(done))
                if use.n_workers > 1:
                    failed = compute_by_crew(units, writer, self.worker, use.n_workers, status)
                else:
                    failed = compute_here(units, writer, model.backend(), self.worker.skip_nonfinite, status)
                status.finish()
        return failed

    def _parity(self, backend: Backend) -> dict[str, Any]:
        """Figures of the parity check; the reference model is let go with the end of this function."""
        picked = spread([len(instance.token_ids) for instance in self.sample], self.use.n_checked)
        by_layer = self.plan.needs.reference_by_layer
        how = ", read layer by layer because it doesn't fit into memory" if by_layer else ""
        self.progress.say(f"Parity check of {len(picked)} sequences against the plain float32 model{how} ...")
        sequences = [self.sample[index].token_ids for index in picked]
        expected = Reference(self.use.source, self.use.hook_points, by_layer).residuals(sequences)
        figures = check_parity(
            backend, lambda _token_ids: next(expected), sequences, self.use.model_dtype, self.worker.skip_nonfinite
        )
        if n_left_out := len(sequences) - len(figures["lengths"]):
            self.progress.say(
                f"{n_left_out} of them were not compared: the plain model gives NaN or infinity for them too."
            )
        return figures
