"""Settings of `fastcache report`."""

from dataclasses import dataclass

from fastcache.config import option


@dataclass(frozen=True)
class ReportConfig:
    """What the page shows."""

    sae: tuple[str, ...] = option(help="Folder of an evaluated SAE. Repeatable.")
    cache: tuple[str, ...] = option((), help="Cache to describe. Repeatable.")
    corpus: tuple[str, ...] = option((), help="Corpus to describe. Repeatable.")
    title: str = option("fastcache report", help="Title of the page.")
    note: str = option("", help="A paragraph to stand under the title.")
    html: str = option("report.html", help="File to write.")
