"""The evaluated SAEs as text: CSV or JSON with every figure, a Markdown table with those that are looked at first."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from fastcache.cache_format.schema import SPLIT_TITLES
from fastcache.errors import InputError
from fastcache.figures import NONE, fixed, percent
from fastcache.stages.report.paper import Published
from fastcache.stages.report.runs import Evaluation, Run
from fastcache.stages.report.series import Point, at_equal_l0, panels

NOT_FLAT = ("intervals", "l0_quantiles")


def table(runs: list[Run], form: str, published: Sequence[tuple[Run, Published]] = ()) -> str:
    """The table as csv, json or markdown, with the paper's values of those `published`.

    Raises `InputError` where no SAE was evaluated.
    """
    evaluated = [run for run in runs if run.evaluation]
    if not evaluated:
        raise InputError("None of these SAEs was evaluated; run `fastcache evaluate` first.")
    paper = {run.name: values for run, values in published}
    if form == "markdown":
        return _markdown(evaluated, paper) + _markdown_at_equal_l0(runs)
    rows = [row for run in evaluated for row in _rows(run, paper.get(run.name))]
    if form == "json":
        return json.dumps(rows, indent=1, allow_nan=False) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(run: Run, published: Published | None) -> Iterator[dict[str, Any]]:
    """One for each set of tokens that has any."""
    evaluation = run.evaluated
    shared = {
        "sae": run.name,
        "model": run.model,
        "architecture": evaluation["architecture"],
        "hook_point": evaluation["hook_point"],
        "trained_on": evaluation["trained_on"],
        **{key: evaluation[key] for key in ("d_sae", "dead_latents", "dead_share")},
    }
    with_model = evaluation.get("with_model", {}).get("splits", {})
    for tokens, figures in evaluation["splits"].items():
        if figures["n_tokens"]:
            spliced = {key: value for key, value in with_model.get(tokens, {}).items() if key != "n_tokens"}
            of_paper = published._asdict().get(tokens) if published else None
            beside = {} if of_paper is None else {"paper_log2_mse": of_paper}
            yield {**shared, "tokens": tokens, **_flat(figures), **_flat(spliced), **beside}


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in figures.items() if key not in NOT_FLAT}
    flat |= {f"l0_q{share}": value for share, value in figures.get("l0_quantiles", {}).items()}
    for key, (low, high) in figures.get("intervals", {}).items():
        flat |= {f"{key}_low": low, f"{key}_high": high}
    return flat


def _markdown(runs: list[Run], paper: dict[str, Published]) -> str:
    has_model = any("with_model" in run.evaluated for run in runs)
    names = ["SAE", "layer", "architecture", "trained on", "L0", "FVU", "FVU, content", "dead"]
    names += [f"log2 MSE, {title}" for title in SPLIT_TITLES.values()]
    names += ["LM loss added", "LM loss recovered"] if has_model else []
    names += ["paper: log2 MSE, all", "paper: special"] if paper else []
    rows = []
    for run in runs:
        evaluation = run.evaluated
        layer = evaluation["hook_point"].rpartition(".")[2]
        described = [run.name, layer, evaluation["architecture"], evaluation["trained_on"]]
        published = [fixed(value, 3) for value in paper.get(run.name, (None, None))] if paper else []
        rows.append([*described, *main_figures(evaluation, has_model), *published])
    return _markdown_table(names, rows, 4)


def _markdown_at_equal_l0(runs: list[Run]) -> str:
    """A second table, where there are curves to compare."""
    names = ["layer", "architecture", "trained on", "L0", *(f"FVU, {title}" for title in SPLIT_TITLES.values())]
    rows = [
        [panel.place, panel.architecture, series.label, fixed(l0, 1), *map(_with_spread, points)]
        for panel in panels(runs)
        if panel.l0
        for series, l0, points in at_equal_l0(panel)
    ]
    return f"\nAt the same L0:\n\n{_markdown_table([*names, 'LM loss recovered'], rows, 3)}" if rows else ""


def _with_spread(point: Point | None) -> str:
    """The mean over the seeds, and how far they reach."""
    if point is None:
        return NONE
    spread = f" ({fixed(point.low, 4)}-{fixed(point.high, 4)})" if point.low != point.high else ""
    return fixed(point.value, 4) + spread


def _markdown_table(names: list[str], rows: list[list[str]], n_words: int) -> str:
    """`n_words` columns of text, the others of numbers."""
    lines = [names, ["---"] * n_words + ["---:"] * (len(names) - n_words), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def main_figures(evaluation: Evaluation, has_model: bool) -> list[str]:
    """L0, FVU (all and content), dead latents, log2 MSE by set of tokens and, with `has_model`, LM loss added and recovered."""
    splits = evaluation["splits"]
    spliced = evaluation.get("with_model", {}).get("splits", {}).get("all", {})
    return [
        fixed(splits["all"]["l0"], 1),
        fixed(splits["all"]["fvu"], 4),
        fixed(splits["content"].get("fvu"), 4),
        percent(evaluation["dead_share"]),
        *(fixed(splits[split].get("log2_mse"), 3) for split in SPLIT_TITLES),
        *(fixed(spliced.get(key), 4) for key in ("delta_loss", "loss_recovered") if has_model),
    ]
