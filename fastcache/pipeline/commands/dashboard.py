"""`fastcache dashboard`."""

from pathlib import Path
from typing import Any

import click

from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.options import LocalPath, resolve, settings_options
from fastcache.stages.interpret.config import DashboardConfig

HELP = """Show the latents that `fastcache interpret` described, with their scores, in the browser.

Writes index.html with its data beside it, by default to dashboard/ below the latents, and shows it to this machine only.
The page needs no server: index.html opens as a file too, and the folder can be copied anywhere.

\b
Examples:
  fastcache dashboard --latents DIR
  fastcache dashboard --latents DIR --port 9000
  fastcache dashboard --latents DIR --out pages/layer-18 --no-serve
"""


@click.command(cls=Command, help=HELP)
@click.option(
    "--out", type=LocalPath(path_type=Path), metavar="DIR", help="Folder to write.  [default: below the latents]"
)
@settings_options(DashboardConfig)
def command(out: Path | None, **given: Any) -> None:
    """Write and show the dashboard."""
    config = resolve(DashboardConfig, given)
    from fastcache.stages.interpret.dashboard.build import build
    from fastcache.stages.interpret.dashboard.serve import make_server

    progress = RichProgress(make_console())
    folder = out or Path(config.latents) / "dashboard"
    page = build(Path(config.latents), Path(config.judged) if config.judged else None, folder, progress)
    progress.say(f"Page: {page.resolve().as_uri()}")
    if config.serve:
        with make_server(folder, config.port) as server:
            progress.say(f"Showing it at http://localhost:{server.server_port}/ until Ctrl-C")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                progress.say("Stopped.")
