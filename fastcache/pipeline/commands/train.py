"""`fastcache train`."""

import shlex
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fastcache.pipeline.console import RichProgress
from fastcache.pipeline.options import output_options, resolve, settings_options
from fastcache.pipeline.places import RUNS, slug
from fastcache.stages.train.config import TrainConfig

HELP = """Train a sparse autoencoder from a cache.

The defaults are the paper's, with its schedules scaled to the length of the run. Run again with the same settings, it
resumes from the last checkpoint, bit for bit.

\b
Examples:
  fastcache train --cache fastcache-runs/cache-demo-fast-train-layer-2 --arch jumprelu
  fastcache train --cache DIR --arch standard --layer 18 --coefficient 5 --batch-size 4096
"""


@click.command(help=HELP)
@output_options
@settings_options(TrainConfig)
def command(out: Path | None, fresh: bool, **given: Any) -> None:
    """Run the train stage."""
    config = resolve(TrainConfig, given)
    from fastcache.pipeline.show import show_sae
    from fastcache.stages.train.run import train

    console = Console()
    progress = RichProgress(console)
    layer = "" if config.layer is None else f"-layer-{config.layer}"
    place = out or RUNS / f"sae-{slug(Path(config.cache).resolve().name)}-{config.arch}{layer}"
    progress.say(f"SAE: {place}")
    train(config, place, progress, fresh)
    show_sae(console, place)
    progress.say(f"Next: fastcache evaluate --sae {shlex.quote(str(place))} --cache HELD_OUT_CACHE")
