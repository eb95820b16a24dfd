"""`fastcache repair`."""

from pathlib import Path

import click

from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.options import AddressOrPath

HELP = """Verify a cache, and compute its damaged parts again. What is whole is left as it is.

The settings are those in its run.json. Model and corpus must be the same as then, and are looked for where they were,
or beside the cache as then. Killed, it goes on when run again.

\b
Examples:
  fastcache repair fastcache-runs/cache-demo-fast-train-layer-2
  fastcache repair CACHE --corpus /moved/corpus --device cuda
"""


@click.command(cls=Command, help=HELP)
@click.argument("cache", type=AddressOrPath(path_type=Path))
@click.option("--corpus", metavar="DIR", help="Where the corpus is now.  [default: where it was]")
@click.option("--model", metavar="DIR", help="Where the model is now.  [default: where it was]")
@click.option("--device", metavar="TEXT", help="Device of the model.  [default: as for extract]")
def command(cache: Path | str, corpus: str | None, model: str | None, device: str | None) -> None:
    """Run the repair."""
    from fastcache.stages.extract.repair import repair

    repair(cache, RichProgress(make_console()), corpus, device, model)
