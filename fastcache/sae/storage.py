"""An SAE on disk: `sae.safetensors` with the parameters and `sae.json` with what they belong to."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fastcache.errors import FormatError, IntegrityError, NonFiniteError
from fastcache.files import make_directory, read_json, require_fields, write_bytes_atomic, write_json_atomic
from fastcache.sae.architectures import ARCHITECTURES, Sae

SAE_FORMAT_VERSION = "2.0"
WEIGHTS_FILE, INFO_FILE = "sae.safetensors", "sae.json"


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
    header = {"format": "fastcache-sae", "format_version": SAE_FORMAT_VERSION}
    write_json_atomic(folder / INFO_FILE, {**header, **shape, **info})


def load_sae(folder: Path) -> tuple[Sae, dict[str, Any]]:
    """The SAE in `folder` and its `sae.json`. Raises `FormatError` for anything else, `NonFiniteError` for NaN weights."""
    info = read_json(folder / INFO_FILE)
    if info.get("format") != "fastcache-sae" or str(info.get("format_version"))[:2] != "2.":
        raise FormatError(f"{folder / INFO_FILE} is not that of a fastcache SAE of version 2.x. Train the SAE again.")
    require_fields(info, {"architecture": str, "d_in": int, "d_sae": int, "options": dict}, folder / INFO_FILE)
    if info["architecture"] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FormatError(f"{folder}: unknown architecture {info.get('architecture')!r}; this fastcache knows {known}.")
    try:
        sae = ARCHITECTURES[info["architecture"]](info["d_in"], info["d_sae"], **info["options"])
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"{folder / INFO_FILE}: options {info['options']} are not those of {info['architecture']}: {error}."
        ) from error
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{folder / WEIGHTS_FILE} can't be read ({error}). Train the SAE again.") from error
    expected = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        raise FormatError(f"{folder / WEIGHTS_FILE} should hold {expected}, found {found}.")
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise NonFiniteError(f"{folder / WEIGHTS_FILE}: {name} has NaN or infinity; this SAE can't be used.")
    sae.load_state_dict(weights)
    return sae, info
