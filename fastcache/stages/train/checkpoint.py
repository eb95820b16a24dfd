"""Checkpoints: a folder each, written under another name first, so that a killed run leaves only whole ones."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastcache.errors import FormatError, IntegrityError
from fastcache.files import make_directory, new_folder, read_json, readable_json, require_fields, write_file
from fastcache.sae.fast.cpu import this_cpu
from fastcache.sae.fast.gpu import passes
from fastcache.sae.storage import require_finite
from fastcache.stages.train.stream import MixingBuffer
from fastcache.stages.train.trainer import Trainer
from fastcache.stages.train.watch import LossWatch

FOLDER = "checkpoints"
STREAM_PREFIX = "stream."


def numerics(device: str) -> dict[str, Any]:
    """What, besides code and settings, the bits of a step depend on."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_model": this_cpu().model,
        "passes": passes(torch.device(device)),
        "MKL_CBWR": os.environ.get("MKL_CBWR", ""),
        "matmul": torch.get_float32_matmul_precision(),
        "mkldnn_matmul": str(torch.backends.mkldnn.matmul.fp32_precision),  # type: ignore[attr-defined]
    }


class Run:
    """The parts of a run that have a state."""

    def __init__(self, trainer: Trainer, buffer: MixingBuffer, watch: LossWatch, device: str) -> None:
        self.trainer, self.buffer, self.watch, self.device = trainer, buffer, watch, device

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A JSON-ready part, and all tensors by name. Rows of the stream are numbers, not activations."""
        stream, arrays = self.buffer.state_dict()
        trainer, tensors = self.trainer.state_dict()
        tensors |= {STREAM_PREFIX + name: torch.from_numpy(array) for name, array in arrays.items()}
        scalars = {"trainer": trainer, "stream": stream, "watch": self.watch.state_dict()}
        return {**scalars, "numerics": numerics(self.device)}, tensors

    def load_state_dict(self, scalars: dict[str, Any], tensors: Mapping[str, Tensor], stream: bool = True) -> None:
        """Go back to where `state_dict` was taken."""
        length = len(STREAM_PREFIX)
        arrays = {name[length:]: value.numpy() for name, value in tensors.items() if name.startswith(STREAM_PREFIX)}
        self.trainer.load_state_dict(scalars["trainer"], dict(tensors))
        if stream:
            self.buffer.load_state_dict(scalars["stream"], arrays)
        self.watch.load_state_dict(scalars["watch"])


def save_checkpoint(out: Path, run: Run, kept: int) -> None:
    """Write the state of a run; the oldest checkpoints beyond `kept` go.

    Raises `NonFiniteError`, `SpaceError`, `StorageError`; the checkpoints that are there are kept then.
    """
    require_finite(run.trainer.sae)
    folder = out / FOLDER
    final = folder / f"{run.trainer.step_number:09d}"
    make_directory(folder)
    scalars, tensors = run.state_dict()
    with new_folder(final) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary / "state.safetensors")
        write_file(temporary / "state.json", readable_json(scalars))
    for old in sorted(folder.glob("[0-9]*"))[:-kept]:
        shutil.rmtree(old)


def checkpoint_steps(out: Path) -> list[int]:
    """The steps that there are checkpoints of."""
    return sorted(int(folder.name) for folder in (out / FOLDER).glob("[0-9]*"))


def load_checkpoint(out: Path, step: int, run: Run, stream: bool = True) -> list[str]:
    """Go back to the checkpoint of `step`; without `stream`, where another run has loaded the stream that they share.

    Returns in what this machine differs from the one that wrote it, as far as numbers may depend on it. Raises
    `IntegrityError` if it can't be read.
    """
    folder = out / FOLDER / f"{step:09d}"
    try:
        tensors = load_file(folder / "state.safetensors")
        scalars = read_json(folder / "state.json")
        require_fields(scalars, dict.fromkeys(("trainer", "stream", "watch", "numerics"), dict), folder / "state.json")
    except (SafetensorError, FormatError, OSError) as error:
        raise IntegrityError(f"The checkpoint {folder} can't be read ({error}).") from error
    run.load_state_dict(scalars, tensors, stream)
    now, then = numerics(run.device), scalars["numerics"]
    return [f"{name} {then[name]} -> {value}" for name, value in now.items() if name in then and then[name] != value]
