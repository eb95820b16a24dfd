"""One SAE in training, with its output directory: log, checkpoints, result. A sweep has many on one stream of batches."""

from pathlib import Path

from torch import Tensor

from fastcache.errors import NonFiniteError
from fastcache.files import flush_log, write_json_atomic
from fastcache.sae.storage import require_finite, save_sae
from fastcache.stages.train.checkpoint import Run, save_checkpoint
from fastcache.stages.train.log import METRICS_FILE, Line, add_line, cut_log, in_words
from fastcache.stages.train.order import Numbers
from fastcache.stages.train.saved_figures import saved_figures
from fastcache.stages.train.stream import MixingBuffer
from fastcache.stages.train.task import FAILED_FILE, Task, to_tensor
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
        self.line: Line = {}
        """The last line of the metrics log."""

    @property
    def is_trained(self) -> bool:
        """Whether all steps are done; the SAE is saved then."""
        return self.trainer.step_number == self.trainer.n_steps

    def begin(self) -> list[str]:
        """To be called once it is initialised or loaded; returns what the user should know."""
        for name in (METRICS_FILE, EVENTS_FILE):
            cut_log(self.out / name, self.trainer.step_number)
        return self.trainer.choose_products()

    def step(self, x: Tensor, numbers: Numbers) -> None:
        """Train on a batch x `[n, d_in]`, the rows `numbers` of the cache; raises `NonFiniteError`."""
        trainer, watch = self.trainer, self.run.watch
        figures = trainer.step(x)
        watch.add(trainer.step_number, figures.loss, numbers)
        if self.is_trained:
            watch.look()
            self._finish(trainer.figures(x, figures))
        elif trainer.step_number % self.task.config.log_every == 0:
            self._log(trainer.figures(x, figures))

    def _log(self, line: Line) -> None:
        self.line = line
        add_line(self.out / METRICS_FILE, line)

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

    def _finish(self, line: Line) -> None:
        """Measure the SAE as it is saved, put that into the last `line` of the log, and save it."""
        buffer, task = self.run.buffer, self.task
        sample = to_tensor(buffer.spread_rows, task.cache.manifest.dtype, task.device)
        sae = self.trainer.trained(sample)
        require_finite(sae)
        self._log(line | saved_figures(sae, sample))
        info = task.provenance(self.trainer.scale)
        info["tokens"] = {"of": task.config.tokens_of, **task.selection.as_json(buffer.n_read, buffer.n_too_large)}
        if buffer.skipped:
            info["skipped_units"] = list(buffer.skipped.values())
        self._flush_logs()
        save_sae(self.out, sae, info)

    def note(self) -> str:
        """The last figures in a few words."""
        return in_words(self.line) if self.line else ""
