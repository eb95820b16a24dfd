"""What `fastcache interpret` and its subcommands print at the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastcache.pipeline.console import printable

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
    console.print(f"{len(latents):,} latents, {n_dead:,} of them never active. The strongest, and where they are so:")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("latent", "density", "highest"):  # a long context would take their room
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    table.add_column("context", no_wrap=True, overflow="ellipsis")
    chosen = latents.take(indices).to_pylist()
    contexts = results.contexts_of([row["latent"] for row in chosen])
    for row in chosen:
        figures = (str(row["latent"]), f"{row['density_all']:.2%}", f"{row['max_activation']:.2f}")
        table.add_row(*figures, *(_marked(context) for context in contexts[row["latent"]][:1]))
    console.print(table)


def _marked(context: dict[str, Any]) -> Text:
    """A few tokens around that of the context, which is marked."""
    text, at = Text(), context["position"] - context["start"]
    for place in range(max(0, at - AROUND), min(len(context["tokens"]), at + AROUND + 1)):
        piece = context["tokens"][place].replace("\n", "\u23ce")
        text.append_text(printable(piece, "reverse" if place == at else ""))
    return text


def show_scores(console: Console, summaries: Sequence[dict[str, Any]]) -> None:
    """A line for each judged SAE, and what could not be read of the judge's answers."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("SAE")
    for name in ("scored", "mean", "4 or 5", "detection", "requests", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    for summary in summaries:
        sae = summary["sae"]
        table.add_row(
            printable(f"{sae['model']} {sae['hook_point']}, {sae['architecture']}, {sae['trained_on']}"),
            f"{summary['scored']:,} of {summary['chosen']:,}",
            _figure(summary["mean"], ".2f"),
            _figure(summary["share_4_5"], ".1%"),
            _figure(summary["detection"]["mean"], ".3f"),
            f"{summary['requests']:,}",
            _figure(summary["cost"], ".4g"),
        )
    console.print(table)
    for summary in summaries:
        for kind, failures in (("scores", summary["failures"]), ("detection", summary["detection"]["failures"])):
            if failures:
                told = ", ".join(f"{reason} {count:,}" for reason, count in failures.items())
                console.print(printable(f"{summary['sae']['name']}: without {kind}: {told}"))


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
