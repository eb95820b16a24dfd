"""`fastcache export`."""

from pathlib import Path
from typing import Any

import click

from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.names import RUNS, output_name
from fastcache.pipeline.options import output_options, resolve, settings_options
from fastcache.stages.export.config import ExportConfig

HELP = """Write a trained SAE as another library loads it.

saelens: the folder that SAE.load_from_disk of SAELens 6 takes, with the same reconstructions.

\b
Examples:
  fastcache export --sae fastcache-runs/sae-x-jumprelu --format saelens
  fastcache export --sae DIR --format saelens --out my-sae
"""


@click.command(cls=Command, help=HELP)
@output_options
@settings_options(ExportConfig)
def command(out: Path | None, fresh: bool, **given: Any) -> None:
    """Run the export stage."""
    config = resolve(ExportConfig, given)
    from fastcache.stages.export.run import export

    place = out or RUNS / f"{config.format}-{output_name(str(config.sae))}"
    progress = RichProgress(make_console())
    export(config, place, progress, fresh)
    progress.say_commands("Next:", [["fastcache", "inspect", str(place)]])
