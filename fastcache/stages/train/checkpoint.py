"""Checkpoints: a folder each, written under another name first, so that a killed run leaves only whole ones."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastcache.files import fsync_directory, fsync_tree, read_json, write_json_atomic
from fastcache.stages.train.stream import MixingBuffer
from fastcache.stages.train.trainer import Trainer

FOLDER = "checkpoints"
KEPT = 2
STREAM_PREFIX = "stream."


def save_checkpoint(out: Path, trainer: Trainer, buffer: MixingBuffer) -> None:
    """Write the state of training and stream; the oldest checkpoints beyond `KEPT` go."""
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
    """Go on from the newest checkpoint; returns whether there was one."""
    found = sorted((out / FOLDER).glob("[0-9]*"))
    if not found:
        return False
    tensors = load_file(found[-1] / "state.safetensors")
    state: dict[str, Any] = read_json(found[-1] / "state.json")
    arrays = {k.removeprefix(STREAM_PREFIX): v.numpy() for k, v in tensors.items() if k.startswith(STREAM_PREFIX)}
    trainer.load_state_dict(tensors, state["step"])
    buffer.load_state_dict(state["stream"], arrays)
    return True
