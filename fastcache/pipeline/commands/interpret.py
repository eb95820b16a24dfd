"""`fastcache interpret`."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fastcache.pipeline.console import RichProgress
from fastcache.pipeline.options import output_options, resolve, settings_options
from fastcache.pipeline.places import RUNS, slug
from fastcache.stages.interpret.config import InterpretConfig

HELP = """Say what every latent of an SAE is active on, in one pass over a held-out cache.

Writes contexts.parquet (the highest activations of each latent, each of another dialogue, and one drawn from about each
quantile of its activations) and latents.parquet (how often and how strongly it is active, by kind of token and turn;
similar latents).

\b
Examples:
  fastcache extract --model demo --layer 2 --split interpret
  fastcache interpret --sae DIR --cache fastcache-runs/cache-demo-fast-interpret-layer-2
  fastcache interpret --sae DIR --cache DIR --unembedding
"""


@click.command(help=HELP)
@output_options
@settings_options(InterpretConfig)
def command(out: Path | None, fresh: bool, **given: Any) -> None:
    """Run the interpret stage."""
    config = resolve(InterpretConfig, given)
    from fastcache.pipeline.show import show_latents
    from fastcache.stages.interpret.run import interpret

    place = out or RUNS / f"latents-{slug(Path(config.sae).resolve().name)}"
    console = Console()
    progress = RichProgress(console)
    interpret(config, place, progress, fresh)
    show_latents(console, place)
    progress.say(f"Latents: {place}")
