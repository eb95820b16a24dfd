"""`fastcache steer` and `fastcache steer find`."""

from itertools import groupby
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from fastcache.figures import count, figure, percent, setting
from fastcache.pipeline.command import Group
from fastcache.pipeline.console import RichProgress, make_console, printable
from fastcache.pipeline.names import RUNS, output_name
from fastcache.pipeline.options import LocalPath, output_options, resolve, settings_options
from fastcache.pipeline.tables import Column, FullTable, figure_columns, name_columns, print_table
from fastcache.stages.steer.config import FindConfig, SteerConfig

HELP = """Generate with latents turned up, clamped or ablated at the SAE's layer, beside what the model says by itself.

Adds alpha times the latent's decoder row to the residual stream, at every position, and decodes greedily. `steer find`
says which latents are most active on special tokens.

\b
Examples:
  fastcache steer --sae DIR --latent 13794 --alpha 0,25,50,100 --prompt "Tell me about the sea."
  fastcache steer --sae DIR --latent 7 --latent 9 --together --positions generated --prompts prompts.txt
  fastcache steer --sae DIR --latent 7 --mode ablate --prompt "Tell me about the sea."
  fastcache steer --sae DIR --latent 7 --backend vllm --prompts prompts.txt
  fastcache steer find --sae DIR --cache STEER_CACHE
"""

FIND_HELP = """Find the latents that are most active on each special token: the mean, over dialogues, of their maximum there.

\b
Examples:
  fastcache extract --model demo --layer 2 --split steer
  fastcache steer find --sae DIR --cache fastcache-runs/cache-demo-fast-steer-layer-2
"""


@click.group(cls=Group, help=HELP, invoke_without_command=True)
@output_options
@settings_options(SteerConfig)
@click.pass_context
def command(context: click.Context, /, out: Path | None, fresh: bool, **given: Any) -> None:
    """Run the steer stage."""
    if context.invoked_subcommand:
        return
    given["alpha"] = tuple(part for text in given["alpha"] for part in text.split(","))
    config = resolve(SteerConfig, given)
    from fastcache.stages.steer.run import STEERING_FILE, steer

    latents = "-".join(map(str, config.latent))
    place = out or RUNS / f"steer-{output_name(str(config.sae))}-{config.mode}-{latents}"
    console = make_console()
    progress = RichProgress(console)
    progress.say(f"Steering: {place}")
    rows = steer(config, place, progress, fresh)
    for prompt, group in groupby(rows, lambda row: row["prompt"]):
        _show(console, prompt, list(group))
    progress.say(f"\nAll of it: {place / STEERING_FILE}")


def _show(console: Console, prompt: str, rows: list[dict[str, Any]]) -> None:
    columns = [*figure_columns("latents", "alpha", "tokens", "repeated", "KL"), Column("said", "text")]
    shown: list[list[str | Text]] = []
    for row in rows:
        latents = ", ".join(map(str, row["latents"])) or "none"
        length = f"{row['n_tokens']}{'' if row['ended'] else '+'}"
        measured = [length, percent(row["repetition"], 2), figure(row["kl"])]
        shown.append([latents, setting(row["alpha"]), *measured, printable(row["text"].strip())])
    print_table(console, FullTable(columns, shown, printable(f"\n{prompt}").plain))


@command.command(name="find", help=FIND_HELP)
@click.option("--out", type=LocalPath(path_type=Path), metavar="FILE", help="CSV to write.  [default: beside the SAE]")
@settings_options(FindConfig)
def find_command(out: Path | None, **given: Any) -> None:
    """Find latents of special tokens."""
    config = resolve(FindConfig, given)
    from fastcache.stages.steer.find import find

    console = make_console()
    progress = RichProgress(console)
    place = out or Path(config.sae) / "special_tokens.csv"
    rows: list[list[str | Text]] = []
    best = None
    for found in find(config, place, progress):
        best = best or found.latents[0][0]
        shown = "  ".join(f"{latent}:{figure(value)}" for latent, value in found.latents)
        rows.append([printable(f"{found.token} ({found.token_id})"), count(found.n_dialogues), shown])
    columns = [*name_columns("token"), *figure_columns("dialogues"), Column("latent:mean of maxima", "text")]
    print_table(console, FullTable(columns, rows))
    progress.say(f"Table: {place}")
    if best is not None:
        prompt = "Tell me about the sea."
        words = ["fastcache", "steer", "--sae", config.sae, "--latent", str(best), "--prompt", prompt]
        progress.say_commands("Next:", [words])
