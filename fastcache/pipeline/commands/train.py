"""`fastcache train`."""

from pathlib import Path
from typing import Any

import click

from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.names import RUNS, output_name
from fastcache.pipeline.options import output_options, resolve, settings_options
from fastcache.stages.train.config import TrainConfig

HELP = """Train a sparse autoencoder from a cache.

Two recipes say what an option is where it is left out. modern is the default, because with it --arch alone gives a
sparse SAE that reconstructs well; fast-paper trains as the FAST paper did, which is meant for 320,000 steps and leaves
JumpReLU nearly dense. docs/train.md has both. Run again with the same settings, training resumes from the last
checkpoint, bit for bit.

\b
Examples:
  fastcache train --cache fastcache-runs/cache-demo-fast-train-layer-2 --arch jumprelu
  fastcache train --cache DIR --arch jumprelu --layer 18 --target-l0 50 --tokens-of content
  fastcache train --cache DIR --arch standard --recipe fast-paper --coefficient 5
  fastcache train --cache DIR --arch batchtopk --k 64 --norm-filter 10x-median --dry-run
"""


@click.command(cls=Command, help=HELP)
@click.option("--dry-run", is_flag=True, help="Print steps, memory, disk reads and time; train nothing.")
@output_options
@settings_options(TrainConfig)
def command(out: Path | None, fresh: bool, dry_run: bool, **given: Any) -> None:
    """Run the train stage."""
    config = resolve(TrainConfig, given)
    from fastcache.pipeline.next_steps import after_training, watch
    from fastcache.pipeline.show_runs import show_sae
    from fastcache.stages.train.run import train

    console = make_console()
    progress = RichProgress(console)
    if dry_run:
        from fastcache.stages.train.plan import make_plan

        for line in make_plan(config).lines():
            progress.say(line)
        return
    layer = "" if config.layer is None else f"-layer-{config.layer}"
    place = out or RUNS / f"sae-{output_name(str(config.cache))}-{config.arch}{layer}"
    progress.say(f"SAE: {place}")
    progress.say_commands("Watch:", watch(place))
    train(config, place, progress, fresh)
    show_sae(console, place)
    progress.say_commands("Next:", after_training([place]))
