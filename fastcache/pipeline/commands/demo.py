"""`fastcache demo`."""

from pathlib import Path

import click

HELP = """Run the whole pipeline on a small embedded chat model, offline: three data methods, two layers, two
architectures, held-out figures and an HTML report. Takes minutes; interrupted, it resumes.

\b
Examples:
  fastcache demo
  fastcache demo --out my-demo --tokens 40_000
"""


@click.command(help=HELP)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("fastcache-runs/demo"), show_default=True, metavar="DIR"
)
@click.option("--tokens", default="160_000", show_default=True, metavar="N", help="Tokens to cache for each method.")
@click.option("--fresh", is_flag=True, help="Start over: remove what an earlier demo left in DIR.")
def command(out: Path, tokens: str, fresh: bool) -> None:
    """Run the demo."""
    from fastcache.errors import InputError
    from fastcache.pipeline.console import make_console
    from fastcache.pipeline.demo import run_demo

    try:
        n_tokens = int(tokens.replace(",", ""))
    except ValueError as error:
        raise InputError(f"--tokens {tokens}: expected a whole number.") from error
    run_demo(out, n_tokens, fresh, make_console())
