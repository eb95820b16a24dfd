"""Judged SAEs beside each other: the paper's figures (shares of the scores, their distribution by data method) as a page."""

import math
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fastcache import __version__
from fastcache.cache_format.schema import METHODS, layer_of
from fastcache.errors import InputError, MismatchError
from fastcache.extras import page_template, require_packages
from fastcache.files import make_directory, read_json, require_fields, write_named_file
from fastcache.stages.interpret.config import ScoresConfig
from fastcache.stages.interpret.judge.tables import CSV_FILE, SCORES, SCORES_FILE, SUMMARY_FILE, to_csv
from fastcache.text_files import PAGE_BEGINS, require_output_file

CONFIDENCE_Z = 1.96
COLOURS = ("#ced4da", "#a5d8ff", "#4dabf7", "#1c7ed6", "#0b4a8a")
"""From 1 to 5."""
COLUMNS = ("model", "hook_point", "architecture", "d_sae", "trained_on", "latent", "score", "name", "detection")
"""The columns of the table of all scores."""
Summary = dict[str, Any]


def compare(config: ScoresConfig) -> list[Summary]:
    """Write the page and the table of all scores; returns the summaries, in the order of the page.

    Raises `InputError` for a folder that holds no scores, `MismatchError` for scores of different judges.
    """
    require_packages("The page of scores", "report", "matplotlib", "jinja2")
    require_output_file(Path(config.html), "--html", PAGE_BEGINS)
    require_output_file(Path(config.csv), "--csv", ",".join(COLUMNS))
    if os.path.realpath(config.html) == os.path.realpath(config.csv):
        raise InputError(f"--html and --csv both name {config.html}. Give them different names.")
    found = sorted(((_read(Path(folder)), Path(folder)) for folder in config.judged), key=lambda each: _rank(each[0]))
    if len({summary["judge"] for summary, _ in found}) > 1:
        judges = ", ".join(sorted({str(summary["judge"]) for summary, _ in found}))
        raise MismatchError(f"These scores are of different judges ({judges}): they can't be compared.")
    summaries = [summary for summary, _ in found]
    tables = [
        pq.read_table(folder / SCORES_FILE, columns=["latent", "score", "name", "detection"]) for _, folder in found
    ]
    rows = [
        [*_place(summary), summary["sae"]["trained_on"], *row.values()]
        for summary, table in zip(summaries, tables, strict=True)
        for row in table.to_pylist()
    ]
    _write(Path(config.csv), to_csv(COLUMNS, rows))
    _write(Path(config.html), _page(summaries).encode())
    return summaries


def _write(path: Path, data: bytes) -> None:
    make_directory(path.parent)
    write_named_file(path, data)


def _read(folder: Path) -> Summary:
    path = folder / SUMMARY_FILE
    if not path.is_file() or not (folder / SCORES_FILE).is_file():
        raise InputError(f"{folder} holds no {SUMMARY_FILE}: it should be the output of `fastcache interpret judge`.")
    summary = read_json(path)
    require_fields(summary, {"sae": dict, "shares": dict, "scored": int}, path)
    return summary


def _place(summary: Summary) -> tuple[str, str, str, int]:
    sae = summary["sae"]
    return sae["model"], sae["hook_point"], sae["architecture"], sae["d_sae"]


def _rank(summary: Summary) -> tuple[Any, ...]:
    method = summary["sae"]["trained_on"]
    return (*_place(summary), METHODS.index(method) if method in METHODS else len(METHODS), method)


def interval(share: float, n: int, z: float = CONFIDENCE_Z) -> tuple[float, float]:
    """Wilson's interval, of 95 %, of a share of n (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def by_method(summaries: list[Summary]) -> dict[str, dict[int, float]]:
    """For each data method the share of all its scores that are at most so much: the scores' distribution function."""
    found: dict[str, dict[int, float]] = {}
    for method in dict.fromkeys(summary["sae"]["trained_on"] for summary in summaries):
        of_method = [summary for summary in summaries if summary["sae"]["trained_on"] == method]
        total = sum(summary["scored"] for summary in of_method)
        counts = {score: sum(s["scored"] * s["shares"][str(score)] for s in of_method) for score in SCORES}
        if total:
            found[method] = {score: sum(counts[each] for each in SCORES if each <= score) / total for score in SCORES}
    return found


def _page(summaries: list[Summary]) -> str:
    scored = [summary for summary in summaries if summary["scored"]]
    places = {method: {_place(s) for s in scored if s["sae"]["trained_on"] == method} for method in by_method(scored)}
    return page_template(Path(__file__).parent / "scores.html.j2").render(
        version=__version__,
        summaries=summaries,
        interval=interval,
        same_saes=len({frozenset(each) for each in places.values()}) < 2,
        figures=[_shares(scored), _distributions(scored)] if scored else [],
        csv=CSV_FILE,
    )


def _labels(summaries: list[Summary]) -> list[str]:
    """Method and layer of each, and of model, architecture and size what they differ in."""
    differ = [name for name in ("model", "architecture", "d_sae") if len({s["sae"][name] for s in summaries}) > 1]
    return [
        "\n".join(
            [s["sae"]["trained_on"], f"layer {layer_of(s['sae']['hook_point'])}", *(str(s["sae"][n]) for n in differ)]
        )
        for s in summaries
    ]


def _shares(summaries: list[Summary]) -> str:
    """A bar for each SAE, of the shares of its scores, 5 at the bottom."""
    from fastcache.svg import legend_above, page_style, panels, to_svg

    with page_style():
        figure, (ax,) = panels(1, 1, max(5.0, 0.55 * len(summaries) + 1.5), 3.6)
        bottoms = [0.0] * len(summaries)
        for score, colour in reversed(list(zip(SCORES, COLOURS, strict=True))):
            shares = [summary["shares"][str(score)] for summary in summaries]
            ax.bar(range(len(summaries)), shares, 0.75, bottoms, color=colour, label=str(score))
            bottoms = [bottom + share for bottom, share in zip(bottoms, shares, strict=True)]
        ax.set_xticks(range(len(summaries)), _labels(summaries))
        ax.set_ylabel("share of latents")
        legend_above(figure, [ax])
        return to_svg(figure)


def _distributions(summaries: list[Summary]) -> str:
    """A line for each data method, apart for each architecture."""
    from fastcache.svg import METHOD_COLOURS, legend_above, page_style, panels, to_svg

    architectures = list(dict.fromkeys(summary["sae"]["architecture"] for summary in summaries))
    with page_style():
        figure, axes = panels(len(architectures), 2, 5.0, 3.4)
        for ax, architecture in zip(axes, architectures, strict=True):
            methods = by_method([each for each in summaries if each["sae"]["architecture"] == architecture])
            for method, shares in methods.items():
                ax.step(shares.keys(), shares.values(), where="post", label=method, color=METHOD_COLOURS.get(method))
            ax.set(xlim=(SCORES[0], SCORES[-1]), ylim=(0, 1.02), xticks=SCORES, title=architecture, xlabel="score")
            ax.set_ylabel("share of latents with at most this score")
        legend_above(figure, axes)
        return to_svg(figure)
