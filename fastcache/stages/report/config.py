"""Settings of `fastcache report`."""

from dataclasses import dataclass

from fastcache.config import Settings, option

FORMATS = ("html", "csv", "json", "markdown")


@dataclass(frozen=True)
class ReportConfig(Settings):
    """What the page shows."""

    sae: tuple[str, ...] = option(
        help="Output of `train`, or of `sweep` or a study for all of its SAEs; finished or not. Repeatable."
    )
    cache: tuple[str, ...] = option((), help="Cache to describe. Repeatable.")
    corpus: tuple[str, ...] = option((), help="Corpus to describe. Repeatable.")
    title: str = option("fastcache report", help="Title of the page.")
    note: str = option("", help="A paragraph to stand under the title.")
    html: str = option("report.html", help="File to write.")
    format: str = option(
        "html",
        choices=FORMATS,
        help="html: the page. csv, json: every figure, a line for each SAE and set of tokens; markdown: a short table. "
        "These are printed.",
    )
    compare: str | None = option(
        None, choices=("paper",), help="paper: put the values that the FAST paper published beside those of its SAEs."
    )
    watch: float | None = option(
        None,
        help="Write the page anew every so many seconds, and let it reload itself, until all runs are done.",
        at_least=1,
        at_most=1e6,
    )
