"""`fastcache extract`."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.options import AddressOrPath, output_options, resolve, settings_options
from fastcache.pipeline.places import cache_place, find_corpus
from fastcache.stages.extract.config import AddLayerConfig, ExtractConfig

HELP = """Run the model once over a corpus and write every token's residual activations into a cache.

Run again with the same settings, it resumes. Each dialogue goes through the model on its own (--method fast), or text
is concatenated and cut into blocks (bt-f, bt-p) for comparison.

\b
Examples:
  fastcache extract --model demo --layer 2 --layer 4
  fastcache extract --model Qwen/Qwen2.5-7B-Instruct --layer 18
  fastcache extract --model Qwen/Qwen2.5-7B-Instruct --layer 18 --split eval
  fastcache extract --model Qwen/Qwen2.5-72B-Instruct --layer 40 --backend vllm --tensor-parallel 4
  fastcache extract --model Qwen/Qwen2.5-7B-Instruct --layer 18 --out s3://bucket/cache
  fastcache extract --add-layer 20 --cache fastcache-runs/cache-qwen2.5-7b-instruct-fast-train-layer-18
"""


@click.command(cls=Command, help=HELP)
@partial(output_options, remote=True)
@click.option("--force", is_flag=True, help="Begin even if disk or memory seem not to be enough.")
@click.option(
    "--add-layer",
    multiple=True,
    metavar="N",
    help="Add this layer to the complete cache --cache, with its model and tokens. Repeatable.",
)
@click.option("--cache", type=AddressOrPath(path_type=Path), metavar="DIR", help="The cache that --add-layer is for.")
@settings_options(ExtractConfig)
def command(
    out: Path | str | None, fresh: bool, force: bool, add_layer: tuple[str, ...], cache: Path | str | None, **given: Any
) -> None:
    """Run the extract stage."""
    if add_layer or cache:
        given |= {"out": out, "fresh": fresh or None, "add_layer": add_layer}
        _add_layers(cache, given, force)
        return
    config = resolve(ExtractConfig, given)
    console = make_console()
    progress = RichProgress(console)
    place = out or cache_place(config)
    progress.say(f"Cache: {place}")
    from fastcache.pipeline.next_steps import after_extract
    from fastcache.pipeline.show import show_cache
    from fastcache.stages.extract.run import extract

    made = extract(config, lambda: find_corpus(config, progress), place, progress, fresh, force)
    show_cache(console, made)
    progress.say_commands("Next:", after_extract(made))


def _add_layers(cache: Path | str | None, given: dict[str, Any], force: bool) -> None:
    """Add layers to a cache; what is `given` besides may only say how it is run."""
    from fastcache.config import from_mapping
    from fastcache.errors import InputError

    values = {name: value for name, value in given.items() if value is not None and value != ()}
    if cache is None or "add_layer" not in values:
        raise InputError(
            "--add-layer and --cache go together: fastcache extract --add-layer 20 --cache DIR. A new cache takes --out."
        )
    allowed = [field.name for field in fields(AddLayerConfig)]
    if others := sorted(
        f"--{name.strip('_').replace('_', '-').removesuffix('-file')}" for name in values.keys() - allowed
    ):
        raise InputError(
            f"With --add-layer, everything else is as the cache was made: leave out {', '.join(others)}. Of the options of "
            f"extract, only {', '.join(f'--{name}' for name in allowed[1:])} and --force may be given."
        )
    progress = RichProgress(make_console())
    from fastcache.pipeline.next_steps import after_add_layer
    from fastcache.pipeline.show import show_cache
    from fastcache.stages.extract.add_layer import add_layers

    config = from_mapping(AddLayerConfig, values, "options")
    made = add_layers(cache, config, progress, force)
    show_cache(progress.console, made)
    progress.say_commands("Next:", after_add_layer(made, config.add_layer))
