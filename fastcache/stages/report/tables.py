"""The evaluated SAEs as text: CSV or JSON with every figure, a Markdown table with those that are looked at first."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from fastcache.cache_format.schema import SPLIT_TITLES
from fastcache.errors import InputError
from fastcache.stages.report.runs import Evaluation, Run

NOT_FLAT = ("intervals", "l0_quantiles")


def table(runs: list[Run], form: str) -> str:
    """The table as csv, json or markdown; raises `InputError` where no SAE was evaluated."""
    evaluations = [(run.name, run.evaluation) for run in runs if run.evaluation]
    if not evaluations:
        raise InputError("None of these SAEs was evaluated; run `fastcache evaluate` first.")
    if form == "markdown":
        return _markdown(evaluations)
    rows = [row for name, evaluation in evaluations for row in _rows(name, evaluation)]
    if form == "json":
        return json.dumps(rows, indent=1, allow_nan=False) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(name: str, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """One for each set of tokens that has any."""
    shared = {
        "sae": name,
        "architecture": evaluation["architecture"],
        "hook_point": evaluation["hook_point"],
        "trained_on": evaluation["trained_on"],
        **{key: evaluation[key] for key in ("d_sae", "dead_latents", "dead_share")},
    }
    with_model = evaluation.get("with_model", {}).get("splits", {})
    for tokens, figures in evaluation["splits"].items():
        if figures["n_tokens"]:
            spliced = {key: value for key, value in with_model.get(tokens, {}).items() if key != "n_tokens"}
            yield {**shared, "tokens": tokens, **_flat(figures), **_flat(spliced)}


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in figures.items() if key not in NOT_FLAT}
    flat |= {f"l0_q{share}": value for share, value in figures.get("l0_quantiles", {}).items()}
    for key, (low, high) in figures.get("intervals", {}).items():
        flat |= {f"{key}_low": low, f"{key}_high": high}
    return flat


def _markdown(evaluations: list[tuple[str, Evaluation]]) -> str:
    has_model = any("with_model" in evaluation for _, evaluation in evaluations)
    names = ["SAE", "layer", "architecture", "trained on", "L0", "FVU", "dead"]
    names += [f"log2 MSE, {title}" for title in SPLIT_TITLES.values()]
    names += ["LM loss added", "LM loss recovered"] if has_model else []
    lines = [names, ["---"] * 4 + ["---:"] * (len(names) - 4)]
    for name, evaluation in evaluations:
        layer = evaluation["hook_point"].rpartition(".")[2]
        described = [name.replace("|", "\\|"), layer, evaluation["architecture"], evaluation["trained_on"]]
        lines.append([*described, *main_figures(evaluation, has_model)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main_figures(evaluation: Evaluation, has_model: bool) -> list[str]:
    """L0, FVU, dead latents, log2 MSE by set of tokens and, with `has_model`, the LM loss added and recovered."""
    splits = evaluation["splits"]
    spliced = evaluation.get("with_model", {}).get("splits", {}).get("all", {})
    return [
        figure(splits["all"]["l0"], 1),
        figure(splits["all"]["fvu"], 4),
        f"{evaluation['dead_share']:.1%}",
        *(figure(splits[split].get("log2_mse"), 3) for split in SPLIT_TITLES),
        *(figure(spliced.get(key), 4) for key in ("delta_loss", "loss_recovered") if has_model),
    ]


def figure(value: float | None, places: int = 3) -> str:
    """A number in a table; a dash where there is none."""
    return "-" if value is None else f"{value:,.{places}f}"
