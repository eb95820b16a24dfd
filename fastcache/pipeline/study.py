"""A study in one file, from corpora to SAEs and their evaluation. `recipes/` has those of the paper."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache.cache_format.schema import METHODS
from fastcache.config import from_mapping, nearest, option
from fastcache.errors import InputError, quoted
from fastcache.pipeline.options import with_underscores
from fastcache.pipeline.places import HUB_ROWS
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.train.sweep_config import SweepConfig, sweep_config
from fastcache.strict_yaml import parse_yaml

KEYS = ("corpora", "extract", "methods", "train", "evaluate", "size", "title", "note", "memory")
SWEEP_KEYS = ("base", "grid", "runs")
SECTIONS = ("extract", "evaluate", "corpora", "size", "train")
LEFT_OUT = {"extract": ("method", "split", "corpus"), "evaluate": ("sae", "cache")}
"""Settings that the study gives by its own structure."""
SMALLEST_SCALE, LARGEST_SCALE = 1e-9, 1e6


@dataclass(frozen=True)
class ModelSize:
    """What costs are reckoned from where the model can't be read."""

    d_in: int = option(help="Width of the residual stream.", at_least=1, at_most=10**7)
    n_layers: int = option(help="Decoder layers.", at_least=1, at_most=10**5)
    parameters: int = option(help="Of all decoder layers, without embeddings.", at_least=1, at_most=10**15)


@dataclass(frozen=True)
class Study:
    """A study: for each data method a cache, from each cache the same SAEs, all measured on the same held-out dialogues."""

    name: str
    corpora: dict[str, PrepareConfig | Path]
    """`chat`, and where a method needs it `text`: how it is prepared, or where it is."""
    methods: tuple[str, ...]
    extract: ExtractConfig
    """Of the first method's cache."""
    train: dict[str, Any]
    """`base`, `grid` and `runs`, as in a sweep."""
    evaluate: dict[str, Any]
    size: ModelSize | None
    title: str
    note: str
    memory: str | float | None

    def cache(self, method: str, split: str, corpus: Path) -> ExtractConfig:
        """How the cache of a method and split is made."""
        return dataclasses.replace(self.extract, method=method, split=split, corpus=str(corpus))

    @property
    def caches(self) -> list[tuple[str, str]]:
        """Method and split of each cache; the held-out one is the last."""
        return [*((method, "train") for method in self.methods), ("fast", "eval")]

    def members(self, cache: Path, tokens: int | None) -> SweepConfig:
        """The SAEs of a cache; `tokens` are those of a run where the study doesn't say."""
        base = {**({"tokens": tokens} if tokens else {}), **self.train["base"]}
        layers = sorted(set(self.extract.layer))
        grid = {**({"layer": layers} if len(layers) > 1 else {}), **self.train["grid"]}
        runs = self.train["runs"] or [{}]
        return sweep_config({"cache": str(cache), "memory": self.memory, "base": base, "grid": grid, "runs": runs})

    def evaluation(self, saes: list[Path], cache: Path) -> EvaluateConfig:
        """How the SAEs are measured."""
        values = {**self.evaluate, "sae": [str(sae) for sae in saes], "cache": str(cache)}
        return from_mapping(EvaluateConfig, values, f"{self.name}: evaluate")


def is_study(values: Mapping[str, Any]) -> bool:
    """Whether a file is a study, not a sweep of one cache."""
    return "extract" in values


def read_study(name: str, values: Mapping[str, Any], scale: float = 1.0) -> Study:
    """The study in a mapping, everything in it `scale` times as large; raises `InputError` for what it can't be."""
    for key in values:
        if key not in KEYS:
            raise InputError(f"{name}: there is no key {quoted(key)}; there are {', '.join(KEYS)}.{nearest(key, KEYS)}")
    sections = {key: _section(name, values, key) for key in ("corpora", "extract", "train", "evaluate", "size")}
    for section, owned in LEFT_OUT.items():
        if found := sorted(set(sections[section]) & set(owned)):
            raise InputError(f"{name}: {section}: {found[0]} is given by the study itself. Leave it out.")
    methods = _methods(name, values.get("methods"))
    study = Study(
        name=name,
        corpora=_corpora(name, sections["corpora"], methods, scale),
        methods=methods,
        extract=from_mapping(ExtractConfig, _scaled(sections["extract"], ("tokens",), scale), f"{name}: extract"),
        train=_training(name, sections["train"], scale),
        evaluate=_scaled(
            {"max_instances": EvaluateConfig.max_instances, **sections["evaluate"]},
            ("max_instances", "model_instances"),
            scale,
        ),
        size=from_mapping(ModelSize, sections["size"], f"{name}: size") if sections["size"] else None,
        title=_text(name, values, "title") or name,
        note=_text(name, values, "note"),
        memory=values.get("memory"),
    )
    study.members(Path("cache"), None)  # what is wrong is reported before the first cache is made
    study.evaluation([], Path("cache"))
    return study


def with_command_line(
    values: Mapping[str, Any], settings: Mapping[str, str], grid: Mapping[str, list[str]]
) -> dict[str, Any]:
    """A sweep's mapping with settings from the command line in its `base` and lists of values in its `grid`.

    Values are YAML. Raises `InputError` for text that is none, and for a setting that the members would never see, as the
    grid or a run says it otherwise.
    """
    added = {name: [parse_yaml(text, f"--grid {name}") for text in texts] for name, texts in grid.items()}
    base, file_grid = _section("sweep", values, "base"), _section("sweep", values, "grid")
    runs = values.get("runs") or []
    for name in settings:
        if name in added or name in file_grid:
            raise InputError(f"--set {name} and a grid over {name} contradict each other. Leave --set {name} out.")
        if isinstance(runs, list) and any(isinstance(run, dict) and name in _names(run) for run in runs):
            raise InputError(f"--set {name}: the runs of the file say {name} themselves. Change it there.")
    base |= {name: parse_yaml(text, f"--set {name}") for name, text in settings.items()}
    return {**values, "base": base, "grid": {**file_grid, **added}}


def with_settings(
    values: Mapping[str, Any], settings: Mapping[str, str], grid: Mapping[str, list[str]]
) -> dict[str, Any]:
    """A study's mapping with settings from the command line: extract.model, evaluate.with_model, or one of training.

    Values are YAML; `grid` is added to that of the training. Raises `InputError` as `with_command_line` does.
    """
    changed: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    of_training: dict[str, str] = {}
    for name, text in settings.items():
        section, dot, key = name.rpartition(".")
        if not dot:
            of_training[key] = text
            continue
        if section not in SECTIONS:
            raise InputError(
                f"--set {name}: {quoted(section)} is no section of a study; there are {', '.join(SECTIONS)}."
            )
        target = changed[section] = _section("--set", changed, section)
        target[key] = parse_yaml(text, f"--set {name}")
    return {**changed, "train": with_command_line(_section("study", changed, "train"), of_training, grid)}


def _names(values: Mapping[str, Any]) -> set[str]:
    return {name.replace("-", "_") for name in values}


def _methods(name: str, value: Any) -> tuple[str, ...]:
    methods = METHODS if value is None or value == [] else value
    is_list = isinstance(methods, (list, tuple)) and all(isinstance(method, str) for method in methods)
    if not is_list or not set(methods) <= set(METHODS) or len(set(methods)) < len(methods):
        raise InputError(f"{name}: methods should be a list of some of {', '.join(METHODS)}, found {quoted(value)}.")
    return tuple(methods)


def _text(name: str, values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if isinstance(value, (dict, list, bool)):
        raise InputError(f"{name}: {key} should be text, found {quoted(value)}.")
    return "" if value is None else str(value)


def _section(name: str, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = values.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise InputError(f"{name}: {key} should be a mapping, found {type(section).__name__} {quoted(section)}.")
    return with_underscores(section, f"{name}: {key}")


def _corpora(
    name: str, values: dict[str, Any], methods: tuple[str, ...], scale: float
) -> dict[str, PrepareConfig | Path]:
    needed = ("chat", "text") if "bt-p" in methods else ("chat",)  # the held-out cache is of dialogues, always
    if set(values) - {"chat", "text"} or not set(needed) <= set(values):
        raise InputError(f"{name}: corpora should have {' and '.join(needed)}, found {', '.join(values) or 'nothing'}.")
    return {key: _corpus(f"{name}: corpora: {key}", values[key], scale) for key in needed}


def _corpus(where: str, value: Any, scale: float) -> PrepareConfig | Path:
    if isinstance(value, str):
        return Path(value)
    if not isinstance(value, dict):
        raise InputError(f"{where} should be a folder or settings of `fastcache prepare`, found {quoted(value)}.")
    config = from_mapping(PrepareConfig, value, where)
    if scale < 1:
        config = dataclasses.replace(config, max_rows=max(1, round(scale * (config.max_rows or HUB_ROWS))))
    return config


def _training(name: str, values: dict[str, Any], scale: float) -> dict[str, Any]:
    for key in values:
        if key not in SWEEP_KEYS:
            raise InputError(f"{name}: train: there is no key {quoted(key)}; there are {', '.join(SWEEP_KEYS)}.")
    runs = values.get("runs")
    if runs is not None and not isinstance(runs, list):
        raise InputError(f"{name}: train: runs should be a list of mappings, found {quoted(runs)}.")
    return {
        "base": _scaled(_section(f"{name}: train", values, "base"), ("tokens",), scale),
        "grid": _scaled(_section(f"{name}: train", values, "grid"), ("tokens",), scale),
        "runs": [_scaled(run, ("tokens",), scale) for run in runs or []],
    }


def _scaled(values: Any, names: tuple[str, ...], scale: float) -> Any:
    """A mapping with `scale` times the whole numbers that are named, at least 1; all else is left for the checks to come."""

    def times(value: Any) -> Any:
        if isinstance(value, list):
            return [times(item) for item in value]
        return max(1, round(value * scale)) if type(value) is int else value

    if scale == 1 or not isinstance(values, dict):
        return values
    return {**values, **{name: times(values[name]) for name in names if name in values}}
