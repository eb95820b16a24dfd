"""What `fastcache interpret` and its subcommands print at the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fastcache.figures import count, figure, percent
from fastcache.pipeline.console import print_text, printable
from fastcache.pipeline.tables import Column, FullTable, figure_columns, print_table

MOST_LATENTS, AROUND = 10, 6
"""Latents that are shown, and tokens on each side."""


def show_latents(console: Console, path: Path) -> None:
    """How many latents are active, and of the strongest the context with the highest activation."""
    import pyarrow.compute as pc

    from fastcache.stages.interpret.results import Results

    results = Results(path)
    latents = results.latents(["latent", "n_active", "density_all", "max_activation"])
    n_dead = pc.sum(pc.equal(latents["n_active"], 0)).as_py()
    indices = pc.select_k_unstable(latents, MOST_LATENTS, [("max_activation", "descending")])
    print_text(
        console, f"{len(latents):,} latents, {n_dead:,} of them never active. The strongest, and where they are so:"
    )
    chosen = latents.take(indices).to_pylist()
    contexts = results.contexts_of([row["latent"] for row in chosen])
    rows: list[list[str | Text]] = []
    for row in chosen:
        strongest = [_marked(context) for context in contexts[row["latent"]][:1]] or [Text()]
        measured = [percent(row["density_all"]), figure(row["max_activation"])]
        rows.append([str(row["latent"]), *measured, *strongest])
    print_table(console, FullTable([*figure_columns("latent", "density", "highest"), Column("context", "text")], rows))


def _marked(context: dict[str, Any]) -> Text:
    """A few tokens around that of the context, which is marked."""
    text, at = Text(), context["position"] - context["start"]
    for place in range(max(0, at - AROUND), min(len(context["tokens"]), at + AROUND + 1)):
        piece = context["tokens"][place].replace("\n", "\u23ce")
        text.append_text(printable(piece, "reverse" if place == at else ""))
    return text


def show_scores(console: Console, summaries: Sequence[dict[str, Any]]) -> None:
    """A line for each judged SAE, and what could not be read of the judge's answers."""
    columns = [Column("SAE", "text"), *figure_columns("scored", "mean", "4 or 5", "detection", "requests", "cost")]
    rows: list[list[str | Text]] = []
    for summary in summaries:
        sae = summary["sae"]
        rows.append(
            [
                printable(f"{sae['model']} {sae['hook_point']}, {sae['architecture']}, {sae['trained_on']}"),
                f"{summary['scored']:,} of {summary['chosen']:,}",
                figure(summary["mean"]),
                percent(summary["share_4_5"]),
                figure(summary["detection"]["mean"]),
                count(summary["requests"]),
                figure(summary["cost"]),
            ]
        )
    print_table(console, FullTable(columns, rows))
    for summary in summaries:
        for kind, failures in (("scores", summary["failures"]), ("detection", summary["detection"]["failures"])):
            if failures:
                reasons = ", ".join(f"{reason} {count(n)}" for reason, n in failures.items())
                print_text(console, printable(f"{summary['sae']['name']}: without {kind}: {reasons}").plain)
