"""Checkpoints: a folder each, written under another name first, so that a killed run leaves only whole ones."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastcache.errors import FormatError, IntegrityError
from fastcache.files import fsync_directory, fsync_tree, read_json, require_fields, write_json_atomic
from fastcache.sae.storage import require_finite
from fastcache.stages.train.stream import MixingBuffer
from fastcache.stages.train.trainer import Trainer

FOLDER = "checkpoints"
KEPT = 2
STREAM_PREFIX = "stream."


def save_checkpoint(out: Path, trainer: Trainer, buffer: MixingBuffer) -> None:
    """Write the state of training and stream; the oldest checkpoints beyond `KEPT` go."""
    require_finite(trainer.sae)
    folder = out / FOLDER
    temporary, final = folder / ".tmp", folder / f"{trainer.step_number:09d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    scalars, arrays = buffer.state_dict()
    tensors = trainer.state_dict() | {STREAM_PREFIX + name: torch.from_numpy(a) for name, a in arrays.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary / "state.safetensors")
    write_json_atomic(temporary / "state.json", {"step": trainer.step_number, "stream": scalars})
    fsync_tree(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    fsync_directory(folder)
    for old in sorted(folder.glob("[0-9]*"))[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(out: Path, trainer: Trainer, buffer: MixingBuffer) -> bool:
    """Go on from the newest checkpoint that can be read; returns whether there was one.

    Raises `IntegrityError` if there are some and none can be read.
    """
    found = sorted((out / FOLDER).glob("[0-9]*"), reverse=True)
    for folder in found:
        try:
            tensors = load_file(folder / "state.safetensors")
            state: dict[str, Any] = read_json(folder / "state.json")
            require_fields(state, {"step": int, "stream": dict}, folder / "state.json")
        except (SafetensorError, FormatError, OSError):
            continue  # damaged: the one before it will do
        arrays = {k.removeprefix(STREAM_PREFIX): v.numpy() for k, v in tensors.items() if k.startswith(STREAM_PREFIX)}
        trainer.load_state_dict(tensors, state["step"])
        buffer.load_state_dict(state["stream"], arrays)
        return True
    if found:
        raise IntegrityError(f"No checkpoint in {out / FOLDER} can be read. Start over with --fresh.")
    return False
