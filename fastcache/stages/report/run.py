"""The report stage: collects what runs left behind and fills the page's template."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from fastcache import __version__, figures
from fastcache.cache_format.reader import open_cache
from fastcache.cache_format.schema import SPLIT_TITLES
from fastcache.corpus import Corpus
from fastcache.errors import InputError
from fastcache.extras import page_template, require_packages
from fastcache.files import make_directory, write_named_file
from fastcache.stages.report.config import ReportConfig
from fastcache.stages.report.paper import compared
from fastcache.stages.report.runs import Run, not_evaluated, read_runs
from fastcache.stages.report.series import Panel, at_equal_l0, best, panels
from fastcache.stages.report.tables import table
from fastcache.text_files import PAGE_BEGINS, require_output_file

L0_CAPTION = (
    "Lower FVU at the same L0 is better. A line joins SAEs that differ in sparsity alone; bars reach from the lowest to the "
    "highest seed. The dotted line is the L0 at which they are compared."
)
PANELS_TOGETHER = 4
"""Of one figure."""
MOST_SPIKES = 20
"""Of all runs, in the table."""
Speeds = dict[Path, float]


def require_report_packages() -> None:
    """Raise `InputError` where matplotlib or jinja2 is missing."""
    require_packages("The report", "report", "matplotlib", "jinja2")


def write_report(config: ReportConfig) -> None:
    """Write the page; raises `InputError` for a folder that holds no SAE, finished or not."""
    require_report_packages()
    require_output_file(Path(config.html), "--html", PAGE_BEGINS)
    _write_page(config, read_runs(config.sae))


def report_table(config: ReportConfig) -> str:
    """The evaluated SAEs in the wanted format; raises `InputError` as `write_report`, and where none was evaluated."""
    runs = read_runs(config.sae)
    return table(runs, config.format, compared(runs) if config.compare else [])


def watch_report(config: ReportConfig, seconds: float) -> None:
    """Write the page anew every so many seconds until all runs are done; raises what `write_report` raises."""
    require_report_packages()
    require_output_file(Path(config.html), "--html", PAGE_BEGINS)
    before: dict[Path, Run] = {}
    speeds: Speeds = {}
    while True:
        runs = read_runs(config.sae)
        for run in runs:
            earlier = before.setdefault(run.folder, run)
            if run.last_written > earlier.last_written and run.step > earlier.step:
                tokens = (run.step - earlier.step) * run.batch_size
                speeds[run.folder] = tokens / (run.last_written - earlier.last_written)
                before[run.folder] = run
        done = all(run.is_done for run in runs)
        _write_page(config, runs, None if done else seconds, speeds)
        if done:
            return
        time.sleep(seconds)


def _write_page(
    config: ReportConfig, runs: list[Run], reloads: float | None = None, speeds: Speeds | None = None
) -> None:
    """`reloads`: seconds until the page loads itself again; `speeds`: tokens a second, by folder."""
    from fastcache.stages.report import curves

    evaluations = [run.evaluation for run in runs if run.evaluation]
    _require_same_dialogues(runs)
    found, done = panels(runs), all(run.is_done for run in runs)
    page = page_template(Path(__file__).parent / "report.html.j2").render(
        title=config.title,
        note=config.note,
        version=__version__,
        split_titles=SPLIT_TITLES,
        fixed=figures.fixed,
        figure=figures.figure,
        percent=figures.percent,
        size=figures.size,
        evaluations=evaluations,
        not_evaluated=not_evaluated(runs),
        named=any(len({series.method for series in panel.series}) < len(panel.runs) for panel in found),
        runs=runs,
        colours=curves.run_colours(runs),
        states=Counter(run.state for run in runs),
        done=done,
        reloads=reloads,
        speeds=speeds or {},
        now=time.time(),
        clock=lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)),
        spikes=_largest_spikes(runs),
        caches=[_cache(Path(path)) for path in config.cache],
        corpora=[(path, Corpus(Path(path)).info) for path in config.corpus],
        settings=_settings(runs),
        curves=curves.training_curves(runs) if any(run.lines for run in runs) else None,
        panels=found,
        at_equal_l0=[(panel, at_equal_l0(panel)) for panel in found if panel.l0],
        best=best,
        published=compared(runs) if config.compare and (done or evaluations) else [],
        plots=_plots(found) if found else [],
    )
    path = Path(config.html)
    make_directory(path.parent)
    write_named_file(path, page.encode())


def _require_same_dialogues(runs: list[Run]) -> None:
    held_out: dict[str, set[Any]] = {}
    for run in runs:
        if run.evaluation:
            of = run.evaluation["held_out"]
            held_out.setdefault(run.model, set()).add((of["fingerprint"], of["dialogues"]))
    if any(len(found) > 1 for found in held_out.values()):
        raise InputError("These SAEs were evaluated on different held-out dialogues; evaluate them together first.")


def _plots(found: list[Panel]) -> list[tuple[str, str, list[str], str]]:
    """Heading, id, SVGs of a few panels each, so that a printed page can end between them, and what they show."""
    from fastcache.stages.report import plots

    chunks = [found[first : first + PANELS_TOGETHER] for first in range(0, len(found), PANELS_TOGETHER)]
    nearest = "each series the SAE that is nearest to the dotted L0, or the one of the middle"
    intervals = "Intervals are of 95 %, over dialogues."
    density = f"On which share of the tokens latents are active; of {nearest}."
    return [
        ("Error against sparsity", "l0", [plots.against_l0(chunk) for chunk in chunks], L0_CAPTION),
        (
            "Error by kind of token",
            "mse",
            [plots.error_by_tokens(chunk) for chunk in chunks],
            f"Every SAE. {intervals}",
        ),
        ("FVU by kind of token", "fvu", [plots.fvu_by_tokens(chunk) for chunk in chunks], f"Of {nearest}. {intervals}"),
        ("Latent densities", "density", [plots.densities(chunk) for chunk in chunks], density),
    ]


def _largest_spikes(runs: list[Run]) -> list[tuple[Run, dict[str, Any]]]:
    spikes = [(run, spike) for run in runs for spike in run.spikes]
    return sorted(spikes, key=lambda each: -each[1]["loss"] / max(each[1]["mean"], 1e-30))[:MOST_SPIKES]


def _cache(path: Path) -> dict[str, Any]:
    manifest = open_cache(path).manifest
    parity = [figures["max_abs_difference"] for figures in manifest.parity.get("hook_points", {}).values()]
    return {
        "path": str(path),
        "identity": manifest.identity,
        "totals": manifest.totals,
        "ledger": manifest.ledger,
        "parity": max(parity, default=None),
        "unchecked": manifest.unchecked(),
        "statistics": manifest.statistics,
    }


def _settings(runs: list[Run]) -> dict[str, Any]:
    """Training settings: those that all runs share, as far as they are known, and those in which they differ."""
    names = sorted({name for run in runs for name in run.settings})
    known = {name: [run.settings[name] for run in runs if name in run.settings] for name in names}
    shared = {name: column[0] for name, column in known.items() if all(value == column[0] for value in column)}
    differing = {name: [run.settings.get(name, "") for run in runs] for name in names if name not in shared}
    usual = {name: max(column, key=column.count) for name, column in differing.items()}
    return {"shared": shared, "differing": differing, "usual": usual}
