"""The next command, ready to be pasted: with the caches and SAEs that are there, or else with how to make them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from fastcache.cache_format.manifest import Manifest, load_manifest
from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import hook_point, layer_of
from fastcache.cache_format.storage import open_storage
from fastcache.config import as_dict, from_mapping
from fastcache.errors import FastcacheError
from fastcache.files import parse_json, read_json
from fastcache.origins import cache_of_sae
from fastcache.pipeline.names import RUNS
from fastcache.pipeline.places import cache_place
from fastcache.rundir import stored_path
from fastcache.stages.extract.config import ExtractConfig

Command = list[str]
USES = {"interpret": ["interpret"], "steer": ["steer", "find"]}
"""What the rows of a split are held out for; those of all others are for `evaluate`."""
MOST_SAES = 12
"""The most SAEs that one printed command names."""


def after_extract(cache: Cache) -> list[Command]:
    """Train on training rows; use the others with the SAEs that are there, or make the cache to train one."""
    split, place = cache.manifest.identity["corpus"]["split"], str(cache.path)
    if split == "train":
        return [_train(place, cache.hook_points)]
    saes = list(_saes_of(cache.manifest, _folders(Path(place) if "://" not in place else None)))
    if saes:
        use = USES.get(split, ["evaluate"])
        fresh = [sae for sae in saes if not (sae / "evaluation.json").exists()] if use == ["evaluate"] else []
        chosen = (fresh or saes[:1])[:MOST_SAES]
        return [["fastcache", *use, *_each("--sae", chosen), "--cache", place]]
    return _training_cache(cache)


def after_training(saes: Sequence[Path]) -> list[Command]:
    """Evaluate SAEs of one cache on held-out dialogues; where they aren't cached, that comes first."""
    cache = cache_of_sae(saes[0]) if saes else None
    if cache is None:
        return []
    infos = [read_json(sae / "sae.json") for sae in saes]
    hooks = sorted({info["hook_point"] for info in infos}, key=layer_of)
    evaluate = ["fastcache", "evaluate", *_each("--sae", saes), "--cache"]
    folders = _folders(Path(cache) if "://" not in cache else None)
    wanted = _like(infos[0], hooks, lambda method, split: method == "fast" and split == "eval")
    if found := next((folder for folder, _ in _caches(folders, wanted)), None):
        return [[*evaluate, str(found)]]
    config = _config_of(cache)
    if config is None:
        return []
    layers = tuple(map(layer_of, hooks))
    extract, place = _extract(replace(config, method="fast", split="eval", layer=layers))
    return [extract, [*evaluate, str(place)]]


def after_evaluate(saes: Sequence[str], cache: str) -> list[Command]:
    """A report of them; of a whole sweep by its folder."""
    parents = {Path(sae).parent for sae in saes}
    parent = parents.pop()
    with suppress(FastcacheError, OSError):
        run = read_json(parent / "run.json")
        members = {parent / name for name in run["settings"]["members"]} if run["command"] == "sweep" else set()
        if not parents and members == {Path(sae) for sae in saes}:
            saes = [str(parent)]
    return [["fastcache", "report", *_each("--sae", saes), "--cache", cache]]


def after_add_layer(cache: Cache, layers: Iterable[int]) -> list[Command]:
    """Train at the first layer that is new."""
    return [_train(str(cache.path), [hook_point(layer) for layer in layers][:1], needs_layer=True)]


def watch(place: Path) -> list[Command]:
    """Follow a training on a page."""
    return [["fastcache", "report", "--sae", str(place), "--watch", "30"]]


def _train(cache: str, hooks: Sequence[str], needs_layer: bool = False) -> Command:
    layer = ["--layer", str(layer_of(hooks[0]))] if needs_layer or len(hooks) > 1 else []
    return ["fastcache", "train", "--cache", cache, "--arch", "jumprelu", *layer]


def _training_cache(held_out: Cache) -> list[Command]:
    """Train on a cache of training rows that fits to a held-out one; where there is none, make it first."""
    place = str(held_out.path)
    wanted = _like(held_out.manifest.identity, held_out.hook_points, lambda _method, split: split == "train")
    for folder, manifest in _caches(_folders(Path(place) if "://" not in place else None), wanted):
        hooks = [hook for hook in manifest.hook_points if hook in held_out.hook_points]
        return [_train(str(folder), hooks, needs_layer=len(manifest.hook_points) > 1)]
    config = _config_of(place)
    if config is None:
        return []
    extract, out = _extract(replace(config, split="train"))
    return [extract, _train(str(out), held_out.hook_points)]


def _extract(config: ExtractConfig) -> tuple[Command, Path]:
    """The command that makes a cache of these settings, and where; in a place of its own where the usual one is taken."""
    usual = place = cache_place(config)
    number = 2
    while place.exists():
        place, number = usual.with_name(f"{usual.name}-{number}"), number + 1
    words = ["fastcache", "extract"]
    for field in fields(config):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if value == field.default or (field.default is MISSING and value is None):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += _each(flag, value if isinstance(value, tuple) else [value])
    return [*words, *([] if place == usual else ["--out", str(place)])], place


def _config_of(cache: str) -> ExtractConfig | None:
    """The settings that a cache was made with; None where they can't be read."""
    with suppress(FastcacheError, OSError, KeyError, TypeError):
        run = parse_json(open_storage(cache).read("run.json"), cache)
        settings = dict(run["settings"])
        if settings.get("corpus"):
            found = stored_path(run, settings["corpus"], Path(cache))
            settings["corpus"] = str(found) if found.exists() else settings["corpus"]
        known = as_dict(ExtractConfig(model="", layer=()))
        return from_mapping(ExtractConfig, {name: settings[name] for name in known if name in settings}, cache)
    return None


def _folders(near: Path | None) -> list[Path]:
    """Where caches and SAEs of a user are: beside the one in use, and where they go by default."""
    return list(dict.fromkeys([*([near.parent] if near else []), RUNS]))


Fits = Callable[[Manifest], bool]


def _like(identity: dict[str, Any], hooks: Sequence[str], fits: Callable[[str, str], bool]) -> Fits:
    """Whether a cache is of this model and tokenizer, has these hook points, and a method and split that fit."""

    def matches(manifest: Manifest) -> bool:
        other = manifest.identity
        same = all(other.get(name) == identity.get(name) for name in ("model", "tokenizer"))
        method_and_split = other["method"]["name"], other["corpus"]["split"]
        return same and set(hooks) <= set(manifest.hook_points) and fits(*method_and_split)

    return matches


def _caches(folders: Iterable[Path], fits: Fits) -> Iterator[tuple[Path, Manifest]]:
    """Complete caches in these folders."""
    for folder in folders:
        for path in sorted(folder.glob("*/manifest.json")):
            with suppress(FastcacheError, OSError, KeyError, TypeError):
                manifest = load_manifest(open_storage(path.parent))
                if manifest.state == "complete" and fits(manifest):
                    yield path.parent, manifest


def _saes_of(manifest: Manifest, folders: Iterable[Path]) -> Iterator[Path]:
    """Trained SAEs for a cache, the newest first; of sweeps their members."""
    paths = {path for folder in folders for pattern in ("*/sae.json", "*/*/sae.json") for path in folder.glob(pattern)}
    for path in sorted(paths, key=lambda path: -path.stat().st_mtime):
        with suppress(FastcacheError, OSError):
            info = read_json(path)
            same = all(info.get(name) == manifest.identity.get(name) for name in ("model", "tokenizer"))
            if same and info.get("hook_point") in manifest.hook_points:
                yield path.parent


def _each(flag: str, values: Iterable[Any]) -> Command:
    return [word for value in values for word in (flag, str(value))]
