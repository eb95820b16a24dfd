"""`fastcache report`."""

import os
from pathlib import Path
from typing import Any

import click

from fastcache.errors import InputError
from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.options import resolve, settings_options
from fastcache.stages.report.config import ReportConfig

HELP = """Write one self-contained HTML page about SAEs: held-out figures of those evaluated, training curves of all.

--sae also takes runs that are still in training, and a whole sweep. With --watch the page follows them.

\b
Examples:
  fastcache report --sae A --sae B --html report.html
  fastcache report --sae SWEEP --watch 30
  fastcache report --sae A --cache CACHE --corpus CORPUS
  fastcache report --sae SWEEP --format csv > table.csv
  fastcache report --sae SWEEP --compare paper
"""


@click.command(cls=Command, help=HELP)
@settings_options(ReportConfig)
def command(**given: Any) -> None:
    """Run the report stage."""
    config = resolve(ReportConfig, given)
    from fastcache.stages.report.run import report_table, watch_report, write_report
    from fastcache.stages.report.runs import not_evaluated, read_runs

    if config.format != "html":
        if config.watch is not None:
            raise InputError(f"--watch writes a page; it doesn't go with --format {config.format}. Leave one out.")
        click.echo(report_table(config), nl=False)
        if note := not_evaluated(read_runs(config.sae)):
            click.echo(note, err=True)  # standard output is the table alone
        return
    progress, html = RichProgress(make_console()), Path(os.path.realpath(config.html))
    if config.watch is None:
        write_report(config)
    else:
        progress.say(f"Watching: {html.as_uri()}, until all runs are done")
        watch_report(config, config.watch)
    if note := not_evaluated(read_runs(config.sae)):
        progress.say(note)
    progress.say(f"Report: {html}")
