"""`fastcache prepare`."""

from pathlib import Path
from typing import Any

import click

from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.options import output_options, resolve, settings_options
from fastcache.pipeline.places import corpus_place
from fastcache.stages.prepare.config import PrepareConfig

HELP = """Make a corpus: one schema, the paper's deduplication, a seeded permutation, a train/eval split by dialogue.

\b
Examples:
  fastcache prepare --source demo
  fastcache prepare --source chats.jsonl --source more.parquet --out corpus
  fastcache prepare --source tulu-3 --max-rows 100_000
  fastcache prepare --recipe fast-paper
"""


@click.command(cls=Command, help=HELP)
@output_options
@settings_options(PrepareConfig)
def command(out: Path | None, fresh: bool, **given: Any) -> None:
    """Run the prepare stage."""
    config = resolve(PrepareConfig, given)
    from fastcache.pipeline.show import show_corpus
    from fastcache.stages.prepare.run import prepare

    console = make_console()
    names = (config.recipe, *config.source) if config.recipe else config.source
    place = out or corpus_place(*names)
    info = prepare(config, place, RichProgress(console), fresh)
    show_corpus(console, place, info)
