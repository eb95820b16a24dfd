"""One SAE in training, with its output directory: log, checkpoints, result. A sweep has many on one stream of batches."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcache.errors import NonFiniteError
from fastcache.files import append_to_log, flush_log, read_json_lines, write_bytes_atomic, write_json_atomic
from fastcache.sae.storage import save_sae
from fastcache.stages.train.checkpoint import Run, save_checkpoint
from fastcache.stages.train.order import Numbers
from fastcache.stages.train.stream import MixingBuffer
from fastcache.stages.train.task import FAILED_FILE, METRICS_FILE, Task
from fastcache.stages.train.trainer import Trainer
from fastcache.stages.train.watch import EVENTS_FILE, LossWatch


class Member:
    """Takes batches; `out` must be held."""

    def __init__(self, task: Task, out: Path, buffer: MixingBuffer) -> None:
        self.task, self.out = task, out
        config = task.config
        self.trainer = Trainer(task.recipe, task.device)
        watch = LossWatch(task.cache, task.hook, out, 1 if task.device == "cpu" else config.log_every)
        self.run = Run(self.trainer, buffer, watch, task.device)
        self.line: dict[str, Any] = {}
        """The last line of the metrics log."""

    @property
    def is_trained(self) -> bool:
        """Whether all steps are done; the SAE is saved then."""
        return self.trainer.step_number == self.trainer.n_steps

    def begin(self) -> list[str]:
        """To be called once it is initialised or loaded; returns what the user should know."""
        for name in (METRICS_FILE, EVENTS_FILE):
            _cut_log(self.out / name, self.trainer.step_number)
        return self.trainer.choose_products()

    def step(self, x: Tensor, numbers: Numbers) -> None:
        """Train on a batch x `[n, d_in]`, the rows `numbers` of the cache; raises `NonFiniteError`."""
        trainer, watch = self.trainer, self.run.watch
        figures = trainer.step(x)
        watch.add(trainer.step_number, figures.loss, numbers)
        is_last = trainer.step_number == trainer.n_steps
        if is_last:
            watch.look()
        if is_last or trainer.step_number % self.task.config.log_every == 0:
            self.line = trainer.figures(x, figures)
            append_to_log(self.out / METRICS_FILE, (json.dumps(self.line) + "\n").encode(), durable=False)
        if is_last:
            self._save()

    def checkpoint(self) -> None:
        """Write the state of this moment; raises `NonFiniteError`."""
        self.run.watch.look()
        self._flush_logs()
        save_checkpoint(self.out, self.run, self.task.config.keep_checkpoints)

    def failed(self, error: NonFiniteError) -> None:
        """Leave a note of why it stopped."""
        write_json_atomic(self.out / FAILED_FILE, {"step": self.trainer.step_number, "reason": str(error)})

    def _flush_logs(self) -> None:
        """Make the lines of the steps so far durable: what is written next says that these steps are done."""
        for name in (METRICS_FILE, EVENTS_FILE):
            flush_log(self.out / name)

    def _save(self) -> None:
        buffer = self.run.buffer
        info = self.task.provenance(self.trainer.scale)
        selection = self.task.selection.as_json(buffer.n_read, buffer.n_too_large)
        info["tokens"] = {"of": self.task.config.tokens_of, **selection}
        if buffer.skipped:
            info["skipped_units"] = list(buffer.skipped.values())
        self._flush_logs()
        save_sae(self.out, self.trainer.trained(), info)

    def note(self) -> str:
        """The last figures in a few words."""
        if not self.line:
            return ""
        line = self.line
        fvu = "-" if line["fvu"] is None else f"{line['fvu']:.3f}"
        return f"loss {line['loss']:.4g}  L0 {line['l0']:.1f}  FVU {fvu}  dead {line['dead_latents']}"


def _cut_log(path: Path, step_number: int) -> None:
    """Drop the lines of steps after the checkpoint: they are done again."""
    kept = [json.dumps(line) + "\n" for line in read_json_lines(path) if line["step"] <= step_number]
    if kept or path.exists():
        write_bytes_atomic(path, "".join(kept).encode())
