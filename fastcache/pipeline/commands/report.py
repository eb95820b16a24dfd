"""`fastcache report`."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fastcache.pipeline.options import resolve, settings_options
from fastcache.stages.report.config import ReportConfig

HELP = """Write one self-contained HTML page with the tables and plots of evaluated SAEs.

\b
Examples:
  fastcache report --sae A --sae B --html report.html
  fastcache report --sae A --cache CACHE --corpus CORPUS
"""


@click.command(help=HELP)
@settings_options(ReportConfig)
def command(**given: Any) -> None:
    """Run the report stage."""
    config = resolve(ReportConfig, given)
    from fastcache.stages.report.run import write_report

    write_report(config)
    Console().print(f"Report: {Path(config.html).resolve()}", markup=False, highlight=False, soft_wrap=True)
