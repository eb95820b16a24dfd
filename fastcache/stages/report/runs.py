"""Runs of `train` and `sweep` as they stand on disk, in training or done."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache.errors import FormatError, InputError
from fastcache.files import read_json, read_json_lines, require_fields
from fastcache.sae.info import INFO_FILE, read_info

MOST_POINTS, FEWEST_POINTS, POINTS_OF_ALL = 400, 40, 20_000
"""Points of a run's curve, at most and at least, and of all runs together: the page stays at a few MB."""
CURVES = ("loss", "fvu", "l0", "dead_latents")
MAY_BE_UNKNOWN = ("fvu", "dead_latents")
"""A batch of equal rows has no FVU; which latents are dead is known once the first window is over."""
HIDDEN = ("resolved", "cache_fingerprint", "device")
COMMANDS = ("train", "sweep")
MOST_NAMES = 8
"""The most SAEs that are named in one sentence."""

Evaluation = dict[str, Any]
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One SAE, trained or not."""

    folder: Path
    name: str
    arch: str
    place: str
    """The layer, or where none was chosen the cache."""
    model: str
    """Its name without the folder or owner; empty before the SAE is trained."""
    state: str
    """waiting, training, trained or failed."""
    reason: str
    """Why it failed."""
    failed_step: int
    settings: dict[str, Any]
    """With those that the recipe said, once it is begun."""
    lines: Lines
    """Of metrics.jsonl, thinned; the last is the newest."""
    spikes: Lines
    evaluation: Evaluation | None
    last_written: float
    """When the newest line was, in seconds since 1970; 0 where there is none."""

    @property
    def is_done(self) -> bool:
        """Whether nothing more is to come of it."""
        return self.state in ("trained", "failed")

    @property
    def evaluated(self) -> Evaluation:
        """The evaluation, of a run that has one."""
        assert self.evaluation is not None  # noqa: S101
        return self.evaluation

    @property
    def step(self) -> int:
        """Of the newest line."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def n_steps(self) -> int | None:
        """Of the whole run; None before it is begun."""
        return self.settings.get("steps")

    @property
    def batch_size(self) -> int:
        """Tokens of a step; 1 where that isn't known."""
        return self.settings.get("batch_size") or 1


def read_runs(folders: tuple[str, ...]) -> list[Run]:
    """The runs in these folders, members of sweeps among them, each once; those of a layer and architecture in a row.

    Raises `InputError` for a folder that is no output of `train` or `sweep`, `FormatError` for a damaged file.
    """
    members = {folder: config for given in folders for folder, config in _members(Path(given))}
    names = _names(list(members))
    n_points = max(FEWEST_POINTS, min(MOST_POINTS, POINTS_OF_ALL // len(members)))
    runs = [_run(folder, name, config, n_points) for name, (folder, config) in zip(names, members.items(), strict=True)]
    return sorted(runs, key=lambda run: (len(run.place), run.place, run.arch))  # layer 2 before layer 10


def not_evaluated(runs: list[Run]) -> str:
    """A sentence about the SAEs that have no held-out figures, empty where all have them."""
    missing = [run.name for run in runs if run.evaluation is None]
    n_evaluated = len(runs) - len(missing)
    if not missing:
        return ""
    names = ", ".join(missing[:MOST_NAMES]) + (f" and {len(missing) - MOST_NAMES} more" if missing[MOST_NAMES:] else "")
    if not n_evaluated:
        return f"None of the {len(runs)} SAEs is evaluated, so there are no held-out figures."
    verb = "is" if n_evaluated == 1 else "are"
    return f"{n_evaluated} of {len(runs)} SAEs {verb} evaluated, and only these have held-out figures. Not evaluated: {names}."


def _names(folders: list[Path]) -> list[str]:
    """Each folder's last name, or as many of its last names as tell it from the others."""
    names = [""] * len(folders)
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        tails = ["/".join(folder.parts[-length:]) for folder in folders]
        counts = Counter(tails)
        names = [name or (tail if counts[tail] == 1 else "") for name, tail in zip(names, tails, strict=True)]
    return [name or str(folder) for name, folder in zip(names, folders, strict=True)]


def _members(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folders of SAEs, with their settings as far as they are known without them."""
    path = folder / "run.json"
    if not path.is_file():
        if found := [each.parent for each in sorted(folder.glob("sae-*/run.json"))]:  # a study
            return [member for sweep in found for member in _members(sweep)]
        if (folder / "sae.json").is_file() or (folder / "evaluation.json").is_file():
            return [(folder, {})]
        raise InputError(
            f"{folder} holds no run.json: --sae takes an output of `fastcache train` or `fastcache sweep`, or a study."
        )
    run = read_json(path)
    if run.get("command") not in COMMANDS:
        raise InputError(
            f"{folder} is the output of `fastcache {run.get('command')}`; --sae takes one of train or sweep."
        )
    require_fields(run, {"settings": dict}, path)
    if run["command"] == "train":
        return [(folder, run["settings"])]
    require_fields(run["settings"], {"members": dict}, path)
    require_fields(run["settings"]["members"], dict.fromkeys(run["settings"]["members"], dict), path)
    return [(folder / name, config) for name, config in run["settings"]["members"].items()]


def _run(folder: Path, name: str, config: dict[str, Any], n_points: int) -> Run:
    path = folder / "run.json"
    if path.is_file():  # a member of a sweep that has begun: its recipe is known now
        run = read_json(path)
        require_fields(run, {"settings": dict}, path)
        config = run["settings"]
        require_fields(config, {"resolved": dict}, path)
        require_fields(config["resolved"], {"steps": int, "batch_size": int, "d_sae": int}, path)
    info = read_info(folder) if (folder / INFO_FILE).is_file() else None
    failed = _failure(folder / "failed.json")
    evaluation = _evaluation(folder)
    metrics = folder / "metrics.jsonl"
    settings = _settings(config, evaluation or info or {})
    require_fields(settings, {"arch": str}, path)
    return Run(
        folder=folder,
        name=name,
        arch=settings["arch"],
        place=_place(settings, info),
        model=_model(info),
        state="trained" if info or evaluation else "failed" if failed else "training" if path.is_file() else "waiting",
        reason=failed["reason"] if failed else "",
        failed_step=failed["step"] if failed else 0,
        settings=settings,
        lines=_lines(metrics, n_points),
        spikes=_spikes(folder / "events.jsonl"),
        evaluation=evaluation,
        last_written=metrics.stat().st_mtime if metrics.is_file() else 0.0,
    )


def _model(info: dict[str, Any] | None) -> str:
    model = (info or {}).get("model")
    return Path(str(model.get("name", ""))).name if isinstance(model, dict) else ""


def _evaluation(folder: Path) -> Evaluation | None:
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    evaluation = read_json(path)
    require_fields(evaluation, {"splits": dict, "training": dict, "held_out": dict}, path)
    return evaluation


def _failure(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    failed = read_json(path)
    require_fields(failed, {"step": int, "reason": str}, path)
    return failed


def _settings(config: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """What the user and the recipe said; of an SAE that came without its run.json, what it says itself."""
    if not config:
        return dict(info.get("training") or {})
    if "resolved" not in config:  # what isn't given isn't known yet
        return {name: value for name, value in config.items() if value is not None}
    return {**{name: value for name, value in config.items() if name not in HIDDEN}, **config["resolved"]}


def _place(settings: dict[str, Any], info: dict[str, Any] | None) -> str:
    if settings.get("layer") is not None:
        return f"layer {settings['layer']}"
    if settings.get("cache"):
        return Path(str(settings["cache"])).name
    return str((info or {}).get("hook_point", ""))


def _lines(path: Path, n_points: int) -> Lines:
    lines = read_json_lines(path, n_points)
    for line in lines:
        for name in ("step", *CURVES):
            value = line.get(name)
            if not isinstance(value, (int, float)) and not (name in MAY_BE_UNKNOWN and value is None):
                raise FormatError(f"{path}: {name} should be a number, found {value!r}. The file is damaged.")
    return lines


def _spikes(path: Path) -> Lines:
    spikes = [event for event in read_json_lines(path) if event.get("event") == "loss spike"]
    for spike in spikes:
        require_fields(spike, {"step": int, "part": int, "row": int}, path)
        require_fields(spike, dict.fromkeys(("loss", "mean", "largest_norm"), float), path)
    return spikes
