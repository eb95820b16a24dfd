"""An SAE on disk: `sae.safetensors` with the parameters and `sae.json` (`info.py`) with what they belong to.

A folder may come from anywhere, so names, shapes and dtypes are compared in the file's header before anything is allocated.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from fastcache.errors import FormatError, IntegrityError, NonFiniteError, SpaceError, first_line
from fastcache.files import fingerprint, make_directory, write_bytes_atomic, write_json_atomic
from fastcache.memory import free_memory
from fastcache.sae.architectures import ARCHITECTURES, Sae
from fastcache.sae.info import ALWAYS, FORMAT, FORMAT_VERSION, INFO_FILE, read_info

WEIGHTS_FILE = "sae.safetensors"
Layout = tuple[str, tuple[int, ...]]
"""Dtype, as safetensors writes it, and shape."""


def require_finite(sae: Sae) -> None:
    """Raise `NonFiniteError` for an SAE with NaN or infinite parameters."""
    for name, value in sae.state_dict().items():
        if not torch.isfinite(value).all():
            raise NonFiniteError(
                f"{name} of the SAE has NaN or infinity; it was not saved, and the last checkpoint is kept. "
                "Try a lower --lr, or look at the cache with `fastcache inspect`."
            )


def save_sae(folder: Path, sae: Sae, info: dict[str, Any]) -> None:
    """Write `sae` into `folder`; `info` says where its activations came from. The JSON is written last."""
    require_finite(sae)
    make_directory(folder)
    weights = {name: value.contiguous().cpu() for name, value in sae.state_dict().items()}
    write_bytes_atomic(folder / WEIGHTS_FILE, save(weights))
    shape = {"architecture": sae.architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "options": sae.options}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_json_atomic(folder / INFO_FILE, {**header, **shape, **info})


def load_sae(folder: Path, require: Collection[str] = ()) -> tuple[Sae, dict[str, Any]]:
    """The SAE in `folder` and its `sae.json`, with the fields `require` (see `read_info`).

    Raises `FormatError` for anything else, `IntegrityError` for weights that can't be read, `NonFiniteError` for NaN or
    infinite ones, `SpaceError` where they don't fit into the memory.
    """
    info, path = read_info(folder, {*ALWAYS, *require}), folder / WEIGHTS_FILE
    cls, d_in, d_sae = ARCHITECTURES[info["architecture"]], info["d_in"], info["d_sae"]
    _compare(cls.layout(d_in, d_sae), _read_layout(path), path)
    try:
        sae = cls(d_in, d_sae, **info["options"])
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"{folder / INFO_FILE}: options are not those of {info['architecture']}: {error}. Copy the SAE again, or train "
            "it again."
        ) from error
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    for name, value in weights.items():
        if not torch.isfinite(value.float()).all():  # float: the threshold is float64, and compared with float32
            raise NonFiniteError(f"{path}: {name} has NaN or infinity; this SAE can't be used. Train it again.")
        if name == "threshold" and value.min() < 0:
            raise FormatError(
                f"{path}: thresholds should be 0 or more, found {float(value.min()):g}. Train the SAE again."
            )
    sae.load_state_dict(weights)
    return sae, info


def sae_fingerprint(folder: Path) -> str:
    """SHA-256, in hex, of what an SAE is: its `sae.json` and its weights. Moving the folder doesn't change it."""
    with (folder / WEIGHTS_FILE).open("rb") as file:
        return fingerprint([read_info(folder), hashlib.file_digest(file, "sha256").hexdigest()])


def _read_layout(path: Path) -> dict[str, Layout]:
    """What the header says; nothing else is read. Raises `IntegrityError`, and `SpaceError` where the memory is too small."""
    if not path.is_file():  # to open a pipe would wait for ever
        raise FormatError(f"{path} is missing, or no plain file. Copy the SAE again, or train it again.")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            layout = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    free = free_memory()
    if free is not None and 2 * path.stat().st_size > free:
        raise SpaceError(
            f"{path} has {path.stat().st_size / 1e9:.3g} GB, and to load it takes twice that; {free / 1e9:.3g} GB of memory "
            "are free. Free some, or use a machine with more."
        )
    return layout


def _compare(expected: dict[str, Layout], stored: dict[str, Layout], path: Path) -> None:
    for name in sorted(expected.keys() | stored.keys()):
        wanted, there = (_shown(name, layout.get(name)) for layout in (expected, stored))
        if wanted != there:
            raise FormatError(
                f"{path} should hold {wanted} to go with {INFO_FILE}, found {there}. Copy the SAE again, or train it again."
            )


def _shown(name: str, layout: Layout | None) -> str:
    return f"no {name:.40}" if layout is None else f"{name:.40} as {layout[0]} {list(layout[1])}"


def _unreadable(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"{path} can't be read ({first_line(error)}). Copy the SAE again, or train it again.")
