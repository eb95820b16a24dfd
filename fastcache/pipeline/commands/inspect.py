"""`fastcache inspect`."""

from pathlib import Path
from typing import Any

import click

from fastcache.pipeline.command import Command
from fastcache.pipeline.options import AddressOrPath, LocalPath, field_options
from fastcache.stages.train.config import ShuffleConfig

HELP = """Show what is in a corpus, a cache, a trained SAE, or any other output of fastcache, finished or not.

With --shuffle: how well training would mix a cache. Distinct instances in a batch, variance inflation of a batch mean
and drift over the cache, beside a global permutation and sequential reading. No residual is read.

\b
Examples:
  fastcache inspect fastcache-runs/corpus-demo
  fastcache inspect fastcache-runs/cache-demo-fast-train-layer-2
  fastcache inspect fastcache-runs/cache-demo-fast-train-layer-2 --shuffle --buffer-tokens 50,000
  fastcache inspect fastcache-runs/demo/sae-fast
  fastcache inspect s3://bucket/cache
"""


@click.command(cls=Command, help=HELP)
@click.argument("path", type=AddressOrPath(path_type=Path))
@click.option("--shuffle", is_flag=True, help="Measure how well training would mix this cache.")
@field_options(ShuffleConfig)
@click.option(
    "--corpus", type=LocalPath(path_type=Path), metavar="DIR",
    help="With --shuffle: the cache's corpus, to measure drift by source too.",
)  # fmt: skip
def command(path: Path | str, shuffle: bool, corpus: Path | None, **given: Any) -> None:
    """Tell the kind of `path` by its files, and show it."""
    from fastcache.cache_format.reader import open_cache
    from fastcache.cache_format.schema import MANIFEST_FILE
    from fastcache.config import from_mapping
    from fastcache.corpus import CORPUS_FILE, Corpus
    from fastcache.errors import InputError
    from fastcache.pipeline import show
    from fastcache.pipeline.console import RichProgress, make_console
    from fastcache.pipeline.show_runs import show_run

    settings = {name: value for name, value in given.items() if value is not None}
    if not shuffle and (settings or corpus):
        raise InputError("--batch-size, --buffer-tokens, --seed and --corpus go with --shuffle only.")
    console = make_console()
    is_cache = isinstance(path, str) or (path / MANIFEST_FILE).exists()  # only caches lie in buckets
    if is_cache and shuffle:
        config = from_mapping(ShuffleConfig, settings, "options")
        show.show_shuffle(console, open_cache(path), config, Corpus(corpus) if corpus else None, RichProgress(console))
    elif isinstance(path, str) or is_cache:
        show.show_cache(console, open_cache(path))
    elif shuffle:
        raise InputError(f"{path} is no cache: it has no manifest.json. --shuffle measures a cache made by `extract`.")
    elif (path / CORPUS_FILE).exists():
        show.show_corpus(console, path, Corpus(path).info)
    elif not show_run(console, path):
        raise InputError(
            f"{path} is no corpus, cache or trained SAE: it has no run.json, corpus.json or manifest.json."
        )
