"""What a sweep trains: a grid, a list, or both, over settings of `train`."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from fastcache.config import from_mapping, nearest
from fastcache.errors import InputError
from fastcache.stages.train.config import TrainConfig

KEYS = ("cache", "base", "grid", "runs", "memory")
SHARED = ("cache", "device", "on_corrupt", "checkpoint_every", "keep_checkpoints", "log_every")
"""Settings that are about the run as a whole: they can stand in `base` only."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The members of a sweep, by name."""

    members: dict[str, TrainConfig]
    memory: float | None = None
    """Bytes that it may take; None: most of what is free."""


def parse_memory(text: str | float | None) -> float | None:
    """16e9 for '16GB', bytes for a number; raises `InputError` for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(MB|GB|TB|)", str(text).strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise InputError(f"--memory {text}: expected a size such as 16GB.")
    return float(match[1]) * {"": 1, "MB": 1e6, "GB": 1e9, "TB": 1e12}[match[2].upper()]


def sweep_config(values: Mapping[str, Any]) -> SweepConfig:
    """The sweep that a mapping describes; raises `InputError` for what it can't be.

    `base` are settings of all members; `grid` maps settings to lists, of which every combination is a member; `runs` is a
    list of settings, each a member, in every combination of the grid if there is one.
    """
    for key in values:
        if key not in KEYS:
            raise InputError(f"sweep: there is no key {key!r}; there are {', '.join(KEYS)}.{nearest(key, KEYS)}")
    base = {**_mapping(values, "base"), **({"cache": values["cache"]} if values.get("cache") else {})}
    grid = {name.replace("-", "_"): _list(name, found) for name, found in _mapping(values, "grid").items()}
    runs = [{name.replace("-", "_"): value for name, value in run.items()} for run in _runs(values)]
    if not grid and not runs:
        raise InputError(
            "sweep: there is nothing to train. Give a grid, such as --grid target_l0=32,64, or a list of runs."
        )
    combinations = [dict(zip(grid, found, strict=True)) for found in product(*grid.values())]
    given = [{**combination, **run} for run in runs or [{}] for combination in combinations]
    for settings in given:
        if found := sorted(set(settings) & set(SHARED)):
            raise InputError(f"sweep: {found[0]} is the same for all members: put it into base.")
    seed = base.get("shuffle_seed", base.get("seed", TrainConfig.seed))
    configs = [from_mapping(TrainConfig, {"shuffle_seed": seed, **base, **settings}, "sweep") for settings in given]
    return SweepConfig(_named(configs, given), parse_memory(values.get("memory")))


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"sweep: {key} should map settings to values, found {type(found).__name__}.")
    return {str(name): value for name, value in found.items()}


def _list(name: str, found: Any) -> list[Any]:
    if not isinstance(found, list) or not found:
        raise InputError(f"sweep: grid: {name} should be a list of values, found {found!r}.")
    return found


def _runs(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = values.get("runs") or []
    if not isinstance(found, list) or not all(isinstance(run, dict) for run in found):
        raise InputError("sweep: runs should be a list of mappings, each with the settings of one SAE.")
    return found


def _named(configs: Iterable[TrainConfig], given: Iterable[dict[str, Any]]) -> dict[str, TrainConfig]:
    """Each by its architecture and the settings that were given for it alone."""
    named: dict[str, TrainConfig] = {}
    for config, settings in zip(configs, given, strict=True):
        words = [config.arch]
        for name, value in sorted(settings.items()):
            if name != "arch":
                shown = "-".join(map(str, value)) if isinstance(value, list) else str(value)
                words += [name.replace("_", "-"), re.sub(r"[^A-Za-z0-9.+-]+", "-", shown)]
        key = "-".join(words)
        if key in named:
            raise InputError(f"sweep: two members are {key}. Members differ in at least one setting.")
        named[key] = config
    return named
