"""`fastcache sweep`."""

from pathlib import Path
from typing import Any

import click

from fastcache.config import parse_number
from fastcache.errors import InputError
from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.names import RUNS, output_name, study_name
from fastcache.pipeline.options import assignments, output_options, read_config
from fastcache.pipeline.study import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Study,
    is_study,
    read_study,
    with_command_line,
    with_settings,
)
from fastcache.pipeline.study_files import find_study_file

HELP = """Train many SAEs in one pass over a cache, or run a study.

A grid gives every combination of its values; a file can also have a list of runs. All settings of `fastcache train`
can be used, by name. Members that train on the same rows (layer, selection, batch size, buffer, shuffle seed) share the
reading, the shuffle and the transfer; the seed of a grid is that of the weights. Each member has an output of its own, as
of `train`. Run again, a sweep resumes; a member that fails doesn't stop the others.

A file with `extract` is a study (docs/study.md): its corpora and caches are made first, one for each data method, and after
the SAEs of all come their evaluation and a report. There --set takes names such as extract.model too; `fastcache plan` says
what it costs.

\b
Examples:
  fastcache sweep --cache DIR --set arch=jumprelu --grid target_l0=16,32,64,128
  fastcache sweep --cache DIR --grid arch=topk,batchtopk --grid k=32,64 --grid seed=1,2 --memory 16GB
  fastcache sweep --cache DIR --config sweep.yaml --dry-run
  fastcache sweep --config demo-study
  fastcache sweep --config qwen2.5-0.5b-instruct --scale 0.01

\b
sweep.yaml:
  base: {expansion: 16, tokens: 40_000_000}
  grid: {seed: [1, 2]}
  runs:
    - {arch: jumprelu, target_l0: 32}
    - {arch: standard, coefficient: 5, tokens_of: content}
"""


@click.command(cls=Command, help=HELP)
@click.option("--cache", metavar="DIR", help="Cache made by `fastcache extract`.")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML or JSON file, or the name of a study that comes with fastcache.",
)
@click.option("--grid", multiple=True, metavar="KEY=V1,V2", help="Train with each of these values. Repeatable.")
@click.option("--set", "set_", multiple=True, metavar="KEY=VALUE", help="Set an option of all members. Repeatable.")
@click.option(
    "--memory", metavar="SIZE", help="What the sweep may take, such as 16GB.  [default: 80 % of what is free]"
)
@click.option("--scale", metavar="X", default="1", show_default=True, help="Of a study: so many times its tokens.")
@click.option("--dry-run", is_flag=True, help="Print the plan; train nothing.")
@output_options
def command(
    cache: str | None, config_file: str | None, grid: tuple[str, ...], set_: tuple[str, ...], memory: str | None,
    scale: str, dry_run: bool, out: Path | None, fresh: bool,
) -> None:  # fmt: skip
    """Run a sweep or a study."""
    path = find_study_file(config_file) if config_file else None
    values: dict[str, Any] = read_config(path) if path else {}
    values |= {name: given for name, given in (("cache", cache), ("memory", memory)) if given is not None}
    added = {key: text.split(",") for key, text in assignments(grid, "--grid").items()}
    settings = assignments(set_, "--set")
    times = parse_number("--scale", scale, SMALLEST_SCALE, LARGEST_SCALE)
    progress = RichProgress(make_console())
    if path and is_study(values):
        study = read_study(study_name(path), with_settings(values, settings, added), times)
        _run_study(study, dry_run, out or RUNS / study.name, fresh, progress)
        return
    if times != 1:
        raise InputError("--scale is for a study, a file with `extract`. For a sweep of one cache say --set tokens=N.")
    _run_sweep(with_command_line(values, settings, added), dry_run, out, fresh, progress)


def _run_sweep(values: dict[str, Any], dry_run: bool, out: Path | None, fresh: bool, progress: RichProgress) -> None:
    from fastcache.pipeline.next_steps import after_training, watch
    from fastcache.stages.train.sweep import plan_sweep, sweep
    from fastcache.stages.train.sweep_config import sweep_config

    config = sweep_config(values)
    if dry_run:
        for line in [*plan_sweep(config).lines(), "Nothing was written."]:
            progress.say(line)
        return
    first = next(iter(config.members.values()))
    place = out or RUNS / f"sweep-{output_name(str(first.cache))}"
    progress.say(f"Sweep: {place}")
    progress.say_commands("Watch:", watch(place))
    result = sweep(config, place, progress, fresh)
    states = [member["state"] for member in result["members"].values()]
    progress.say(f"{states.count('trained')} of {len(states)} SAEs are trained.")
    trained = [place / name for name, member in result["members"].items() if member["state"] == "trained"]
    progress.say_commands("Next:", after_training(trained))


def _run_study(study: Study, dry_run: bool, out: Path, fresh: bool, progress: RichProgress) -> None:
    if dry_run:
        from fastcache.pipeline.commands.plan import show_costs

        show_costs([study], None, 1, progress)
        return
    from fastcache.pipeline.run_study import REPORT_FILE, run_study
    from fastcache.pipeline.show import show_evaluations

    progress.say(f"Study {study.name} in {out}: prepare, extract, train, evaluate, report.")
    show_evaluations(progress.console, run_study(study, out, progress, fresh))
    progress.say(f"Report: {(out / REPORT_FILE).resolve()}")
