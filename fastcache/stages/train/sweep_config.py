"""What a sweep trains: a grid, a list, or both, over settings of `train`."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from itertools import product
from math import prod
from typing import Any

from fastcache.config import from_mapping, nearest
from fastcache.errors import InputError, quoted
from fastcache.files import fingerprint
from fastcache.stages.train.config import TrainConfig

KEYS = ("cache", "base", "grid", "runs", "memory")
SHARED = ("cache", "device", "on_corrupt", "checkpoint_every", "keep_checkpoints", "log_every")
"""Settings that are about the run as a whole: they can stand in `base` only."""
MOST_MEMBERS = 5000
LONGEST_NAME = 200
"""Characters of a member's name, which is that of its folder: file systems hold 255 bytes."""


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
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?(MB|GB|TB|)", str(text).strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise InputError(f"--memory {quoted(text)}: expected a size such as 16GB.")
    return float(match[1]) * {"": 1, "MB": 1e6, "GB": 1e9, "TB": 1e12}[match[2].upper()]


def sweep_config(values: Mapping[str, Any]) -> SweepConfig:
    """The sweep that a mapping describes; raises `InputError` for what it can't be.

    `base` are settings of all members; `grid` maps settings to lists, of which every combination is a member; `runs` is a
    list of settings, each a member, in every combination of the grid if there is one.
    """
    for key in values:
        if key not in KEYS:
            raise InputError(f"sweep: there is no key {quoted(key)}; there are {', '.join(KEYS)}.{nearest(key, KEYS)}")
    base = {**_mapping(values, "base"), **({"cache": values["cache"]} if values.get("cache") else {})}
    grid = {name: _list(name, choices) for name, choices in _mapping(values, "grid").items()}
    runs = _runs(values)
    if not grid and not runs:
        raise InputError(
            "sweep: there is nothing to train. Give a grid, such as --grid target_l0=32,64, or a list of runs."
        )
    n_members = prod(map(len, grid.values())) * max(1, len(runs))
    if n_members > MOST_MEMBERS:
        raise InputError(
            f"sweep: this would be {n_members:,} SAEs; a sweep has at most {MOST_MEMBERS:,}. Give the grid fewer values, or "
            "make several sweeps."
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
    mapping = values.get(key)
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise InputError(f"sweep: {key} should map settings to values, found {quoted(mapping)}.")
    return _with_underscores(mapping, key)


def _with_underscores(mapping: dict[Any, Any], where: str) -> dict[str, Any]:
    renamed = {str(name).replace("-", "_"): value for name, value in mapping.items()}
    if len(renamed) < len(mapping):
        raise InputError(f"sweep: {where} has a setting twice, with - and with _. Leave one of them out.")
    return renamed


def _list(name: str, choices: Any) -> list[Any]:
    if not isinstance(choices, list) or not choices:
        raise InputError(f"sweep: grid: {name} should be a list of values, found {quoted(choices)}.")
    return choices


def _runs(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    runs = values.get("runs") or []
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise InputError("sweep: runs should be a list of mappings, each with the settings of one SAE.")
    return [_with_underscores(run, "a run") for run in runs]


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
        if len(key) > LONGEST_NAME:
            key = f"{key[: LONGEST_NAME - 17]}-{fingerprint(settings)[:16]}"
        if key in named:
            raise InputError(f"sweep: two members are {key}. Members differ in at least one setting.")
        named[key] = config
    return named
