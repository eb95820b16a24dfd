"""`fastcache demo`."""

from pathlib import Path

import click

from fastcache.config import parse_number
from fastcache.pipeline.command import Command
from fastcache.pipeline.options import LocalPath

HELP = """Run the whole pipeline on a small embedded chat model, offline: three data methods, two layers, two
architectures, held-out figures and an HTML report. Takes minutes; interrupted, it resumes.

\b
Examples:
  fastcache demo
  fastcache demo --out my-demo --tokens 40_000
"""

MOST_TOKENS = 10**12


@click.command(cls=Command, help=HELP)
@click.option(
    "--out", type=LocalPath(path_type=Path), default=Path("fastcache-runs/demo"), show_default=True, metavar="DIR"
)
@click.option("--tokens", default="160_000", show_default=True, metavar="N", help="Tokens to cache for each method.")
@click.option("--fresh", is_flag=True, help="Start over: remove what an earlier demo left in DIR.")
def command(out: Path, tokens: str, fresh: bool) -> None:
    """Run the demo."""
    n_tokens = parse_number("--tokens", tokens, 1, MOST_TOKENS)
    from fastcache.pipeline.console import make_console
    from fastcache.pipeline.demo import run_demo

    run_demo(out, n_tokens, fresh, make_console())
