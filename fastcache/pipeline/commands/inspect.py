"""`fastcache inspect`."""

from pathlib import Path

import click
from rich.console import Console

HELP = """Show what is in a corpus, a cache or a trained SAE.

\b
Examples:
  fastcache inspect fastcache-runs/corpus-demo
  fastcache inspect fastcache-runs/cache-demo-fast-train-layer-2
"""


@click.command(help=HELP)
@click.argument("path", type=click.Path(path_type=Path))
def command(path: Path) -> None:
    """Tell the kind of `path` by its files, and show it."""
    from fastcache.cache_format.reader import open_cache
    from fastcache.cache_format.schema import MANIFEST_FILE
    from fastcache.corpus import CORPUS_FILE, Corpus
    from fastcache.errors import InputError
    from fastcache.pipeline import show

    console = Console()
    if (path / MANIFEST_FILE).exists():
        show.show_cache(console, open_cache(path))
    elif (path / CORPUS_FILE).exists():
        show.show_corpus(console, path, Corpus(path).info)
    elif (path / "run.json").exists():
        show.show_sae(console, path)
    else:
        raise InputError(
            f"{path} is no corpus, cache or trained SAE: it has no run.json, corpus.json or manifest.json."
        )
