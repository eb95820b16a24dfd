"""`fastcache extract`."""

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fastcache.pipeline.console import RichProgress
from fastcache.pipeline.options import output_options, resolve, settings_options
from fastcache.pipeline.places import cache_place, find_corpus
from fastcache.stages.extract.config import ExtractConfig

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
"""


@click.command(help=HELP)
@partial(output_options, remote=True)
@click.option("--force", is_flag=True, help="Begin even if disk or memory seem not to be enough.")
@settings_options(ExtractConfig)
def command(out: Path | str | None, fresh: bool, force: bool, **given: Any) -> None:
    """Run the extract stage."""
    config = resolve(ExtractConfig, given)
    console = Console()
    progress = RichProgress(console)
    place = out or cache_place(config)
    progress.say(f"Cache: {place}")
    from fastcache.pipeline.show import show_cache
    from fastcache.stages.extract.run import extract

    cache = extract(config, lambda: find_corpus(config, progress), place, progress, fresh, force)
    show_cache(console, cache)
    if config.split == "train":
        layer = f" --layer {config.layer[0]}" if len(cache.hook_points) > 1 else ""
        progress.say(f"Next: fastcache train --cache {shlex.quote(str(place))} --arch jumprelu{layer}")
