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
  fastcache prepare --source chats.jsonl --model Qwen/Qwen2.5-7B-Instruct --show 3
  fastcache prepare --recipe fast-paper
"""


@click.command(cls=Command, help=HELP)
@output_options
@click.option(
    "--show",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="First print the first N rows of each source as they are read and, with --model, as its chat template renders them.",
)
@settings_options(PrepareConfig)
def command(out: Path | None, fresh: bool, show: int, **given: Any) -> None:
    """Run the prepare stage."""
    config = resolve(PrepareConfig, given)
    from fastcache.pipeline.show import show_corpus
    from fastcache.stages.prepare.run import prepare

    console = make_console()
    if show:
        from fastcache.pipeline.show_rows import show_rows

        show_rows(console, config, show)
    names = (config.recipe, *config.source) if config.recipe else config.source
    place = out or corpus_place(*names)
    info = prepare(config, place, RichProgress(console), fresh)
    show_corpus(console, place, info)
