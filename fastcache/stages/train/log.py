"""The metrics log of a run, `metrics.jsonl`: a line of figures every `--log-every` steps.

The figures of a line are those of its step, on the training batch and in training mode. In the last line `l0`, `mse` and `fvu`
are those of the SAE that is saved, on `saved_sae_rows` rows of those that it was trained on.
"""

import json
from pathlib import Path
from typing import Any

from fastcache import figures
from fastcache.files import append_to_log, read_json_lines, write_bytes_atomic

METRICS_FILE = "metrics.jsonl"

Line = dict[str, Any]


def add_line(path: Path, line: Line) -> None:
    """Append `line` to the log `path`; `flush_log` makes it durable."""
    append_to_log(path, (json.dumps(line) + "\n").encode(), durable=False)


def cut_log(path: Path, step_number: int) -> None:
    """Drop the lines of steps after `step_number`, the checkpoint's: they are done again."""
    kept = [json.dumps(line) + "\n" for line in read_json_lines(path) if line["step"] <= step_number]
    if kept or path.exists():
        write_bytes_atomic(path, "".join(kept).encode())


def in_words(line: Line) -> str:
    """The figures of a line for people."""
    dead = "not known yet" if line["dead_latents"] is None else figures.count(line["dead_latents"])
    subject = f"loss {figures.figure(line['loss'])}," if line.get("saved_sae_rows") is None else "saved SAE:"
    return f"{subject} L0 {figures.figure(line['l0'])}, FVU {figures.figure(line['fvu'])}, dead {dead}"


def measured_on(line: Line) -> str:
    """The rows that the figures of a line are measured on."""
    rows = line.get("saved_sae_rows")
    return "the last training batch" if rows is None else f"{rows:,} of the rows that it was trained on"
