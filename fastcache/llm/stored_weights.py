"""The names of the weights in a checkpoint's safetensors files, read from their headers."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

EXPERT = re.compile(r"^(.*\.experts\.)(\d+)(\..*)$")


def stored_names(folder: Path) -> set[str]:
    """Names of all weights in the safetensors files of a folder; files that can't be read are left out."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except (SafetensorError, OSError):
            continue
    return names


def absent_experts(names: Iterable[str]) -> list[str]:
    """Weights of single experts that a checkpoint lacks: other experts of the layer, or this one in other layers, have them.

    transformers stacks the experts of a layer when it loads them, and doesn't say which one was absent.
    """
    numbers: set[str] = set()
    suffixes: dict[str, set[str]] = defaultdict(set)
    present = set()
    for name in names:
        if match := EXPERT.match(name):
            prefix, number, suffix = match.groups()
            numbers.add(number)
            suffixes[prefix].add(suffix)
            present.add(name)
    kinds = set().union(*suffixes.values())
    expected = {f"{prefix}{number}{suffix}" for prefix in suffixes for number in numbers for suffix in kinds}
    return sorted(expected - present)
