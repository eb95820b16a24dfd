"""What `inspect` shows of the outputs of train, sweep and everything after them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from fastcache import figures
from fastcache.files import read_json, read_json_lines, require_fields
from fastcache.origins import model_title
from fastcache.pipeline.console import print_text
from fastcache.pipeline.show import look_up
from fastcache.pipeline.tables import FullTable, figure_columns, name_columns, print_facts, print_table
from fastcache.sae.info import ALWAYS, read_info
from fastcache.stages.report.runs import Run, read_runs
from fastcache.stages.train.log import in_words, measured_on

HIDDEN = ("cache_fingerprint", "resolved")


def show_run(console: Console, path: Path) -> bool:
    """Show the output folder of a command other than prepare and extract; returns whether it is one."""
    if (path / "run.json").is_file():
        run = read_json(path / "run.json")
        require_fields(run, {"command": str, "settings": dict}, path / "run.json")
        SHOWN.get(run["command"], _show_unfinished)(console, path, run)
    elif (path / "sae.json").is_file():  # an SAE that was copied without its run.json
        show_sae(console, path)
    elif folders := sorted(each.parent for each in path.glob("*/run.json")):
        commands = [(folder.name, str(look_up(read_json(folder / "run.json"), "command"))) for folder in folders]
        print_facts(console, f"Folder {path} holds", [(name, f"output of {command}") for name, command in commands])
    else:
        return False
    return True


def _show_unfinished(console: Console, path: Path, run: dict[str, Any]) -> None:
    print_text(console, f"Unfinished output of `fastcache {run['command']}`: run that command again.\n{path}")


def show_sae(console: Console, path: Path, run: dict[str, Any] | None = None) -> None:
    """What an SAE was trained on, how, and where its training stands."""
    if run is None and (path / "run.json").is_file():
        run = read_json(path / "run.json")
        require_fields(run, {"settings": dict}, path / "run.json")
    given = look_up(run, "settings") or {}
    given = {**given, **(given.get("resolved") or {})}
    settings = {key: value for key, value in given.items() if value not in (None, []) and key not in HIDDEN}
    finished = (path / "sae.json").exists()
    rows = [("state", "trained" if finished else "not finished: run its train command again")]
    if finished:
        info = read_info(path, (*ALWAYS, "hook_point", "model", "method", "training"))
        trained = info["training"]
        rows += [
            ("architecture", f"{info['architecture']}, d_in {info['d_in']}, d_sae {info['d_sae']}"),
            (
                "of",
                f"{model_title(str(info['model'].get('name')))} {info['hook_point']}, method {info['method'].get('name')}",
            ),
            (
                "trained",
                f"{figures.count(trained.get('tokens'))} tokens in {figures.count(trained.get('steps'))} steps",
            ),
        ]
        settings = settings or trained
    if settings:
        rows.append(("settings", ", ".join(f"{key}={figures.setting(value)}" for key, value in settings.items())))
    if lines := read_json_lines(path / "metrics.jsonl"):
        last = lines[-1]
        rows.append((f"step {figures.count(last['step'])}", f"{in_words(last)} (on {measured_on(last)})"))
    if (path / "evaluation.json").is_file():
        held_out = look_up(read_json(path / "evaluation.json"), "held_out") or {}
        rows.append(
            ("evaluated", f"on {figures.count(held_out.get('dialogues'))} dialogues of {held_out.get('cache')}")
        )
    print_facts(console, f"SAE {path}", rows)


def _show_sweep(console: Console, path: Path, _run: dict[str, Any]) -> None:
    """Every member, in training or done."""
    runs = read_runs((str(path),))
    n_trained = sum(run.state == "trained" for run in runs)
    n_evaluated = sum(run.evaluation is not None for run in runs)
    state = "finished" if all(run.is_done for run in runs) else "not finished: run its sweep command again"
    facts = [("state", state), ("SAEs", f"{len(runs)}: {n_trained} trained, {n_evaluated} of them evaluated")]
    print_facts(console, f"Sweep {path}", facts)
    columns = [*name_columns("SAE", "state"), *figure_columns("step", "L0", "FVU", "dead", "evaluated")]
    print_table(console, FullTable(columns, [_member(run) for run in runs]))
    for run in runs:
        if run.state == "failed":
            print_text(console, f"{run.name} failed at step {run.failed_step:,}: {run.reason}")
    if any(run.lines for run in runs):
        print_text(
            console,
            "L0, FVU and dead latents are those of the last line in each training log: of the saved SAE where it is trained.",
        )


def _member(run: Run) -> list[str]:
    last = run.lines[-1] if run.lines else {}
    measured = [
        figures.figure(last.get("l0")),
        figures.figure(last.get("fvu")),
        figures.setting(last.get("dead_latents")),
    ]
    return [run.name, run.state, figures.count(run.step), *measured, figures.setting(run.evaluation is not None)]


def _show_export(console: Console, path: Path, run: dict[str, Any]) -> None:
    form = look_up(run, "settings", "format")
    rows = [("format", str(form)), ("of", str(look_up(run, "settings", "sae")))]
    config = path / "cfg.json"
    finished = config.is_file() and (path / "sae_weights.safetensors").is_file()
    rows.insert(0, ("state", "complete" if finished else "not finished: run its export command again"))
    if finished:
        values = read_json(config)
        metadata = look_up(values, "metadata")
        rows += [
            ("architecture", ", ".join(f"{name} {values.get(key)}" for name, key in EXPORT_FACTS)),
            ("model", f"{look_up(metadata, 'model_name')}, {look_up(metadata, 'hook_name')}"),
            ("data", str(look_up(metadata, "dataset_path") or "unknown")),
            ("load it by", f"SAE.load_from_disk({str(path)!r})"),
        ]
    print_facts(console, f"Export {path}", rows)


EXPORT_FACTS = (("architecture", "architecture"), ("d_in", "d_in"), ("d_sae", "d_sae"))


def _show_latents(console: Console, path: Path, _run: dict[str, Any]) -> None:
    """What `interpret` left."""
    if not (path / "latents.parquet").is_file():
        print_text(console, f"Latents {path}\nnot finished: run its interpret command again")
        return
    from fastcache.pipeline.show_latents import show_latents

    about = read_json(path / "about.json")
    sae = look_up(about, "sae")
    place = f"{look_up(sae, 'model')} {look_up(sae, 'hook_point')}"
    data = f"{figures.count(about.get('dialogues'))} dialogues, split {about.get('split')}"
    rows = [("SAE", f"{look_up(sae, 'name')}, {look_up(sae, 'architecture')}, {place}"), ("looked at", data)]
    print_facts(console, f"Latents {path}", rows)
    show_latents(console, path)


def _show_judged(console: Console, path: Path, _run: dict[str, Any]) -> None:
    from fastcache.pipeline.show_latents import show_scores

    if not (path / "summary.json").is_file():
        print_text(console, f"Scores {path}\nnot finished: run its interpret judge command again")
        return
    print_text(console, f"Scores {path}")
    show_scores(console, [read_json(path / "summary.json")])


def _show_steering(console: Console, path: Path, run: dict[str, Any]) -> None:
    settings = run["settings"]
    rows = read_json_lines(path / "steering.jsonl")
    facts = [("SAE", str(settings.get("sae")))]
    facts += [(name, figures.setting(settings.get(name))) for name in ("latent", "alpha", "mode", "prompts")]
    print_facts(console, f"Steering {path}", [*facts, ("generations", f"{len(rows):,} in {path / 'steering.jsonl'}")])


def _show_dashboard(console: Console, path: Path, _run: dict[str, Any]) -> None:
    page = path / "index.html"
    state = f"open {page.resolve().as_uri()}" if page.is_file() else "not finished: run its dashboard command again"
    print_facts(console, f"Dashboard {path}", [("page", state)])


SHOWN: dict[str, Callable[[Console, Path, dict[str, Any]], None]] = {
    "train": show_sae,
    "sweep": _show_sweep,
    "export": _show_export,
    "interpret": _show_latents,
    "interpret judge": _show_judged,
    "steer": _show_steering,
    "dashboard": _show_dashboard,
}
"""The function that shows an output, by the command in its run.json."""
