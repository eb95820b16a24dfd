"""Where torch computes."""

from fastcache.errors import InputError, first_line, quoted


def default_dtype(device: str) -> str:
    """The dtype that a model runs in where the user doesn't say."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def choose_device(wanted: str | None) -> str:
    """`wanted`, or `cuda` where there is one, else `cpu`; raises `InputError` for a device that isn't there."""
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=wanted).sum().item()  # `meta` and its like hold no numbers
    except (RuntimeError, AssertionError, ImportError, ValueError, TypeError) as error:
        raise InputError(
            f"--device {quoted(wanted)} can't be used here ({first_line(error)}). Leave it out, or say cpu."
        ) from error
    return wanted
