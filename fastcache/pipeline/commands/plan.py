"""`fastcache plan`."""

from typing import TYPE_CHECKING

import click

from fastcache.config import parse_number
from fastcache.errors import InputError
from fastcache.figures import count, figure, size
from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.names import study_name
from fastcache.pipeline.options import read_config
from fastcache.pipeline.study import LARGEST_SCALE, SMALLEST_SCALE, Study, is_study, read_study
from fastcache.pipeline.study_files import find_study_file
from fastcache.pipeline.tables import FullTable, figure_columns, name_columns, print_table

if TYPE_CHECKING:
    from fastcache.pipeline.costs import Costs

HELP = """Say what studies cost before they are run: SAEs, disk, arithmetic, hours.

Arithmetic is that of the matrix products: of the model's layers up to the deepest one that is captured, and of the five
products of every training step. Hours are at the speed of such products measured on this machine, or at --tflops of each
device, times --devices: the least that they can take. Disk is that of the caches, with a held-out one of the corpus's
dialogues where that is prepared, and else of an assumed number of them, which is printed. For one cache, `train` and
`sweep` have --dry-run.

\b
Examples:
  fastcache plan demo-study
  fastcache plan qwen2.5-0.5b-instruct llama-3.1-8b-instruct --tflops 400 --devices 8
  fastcache plan my-study.yaml --scale 0.01
"""

SMALLEST_TFLOPS, LARGEST_TFLOPS = 1e-6, 1e9
MOST_DEVICES = 1_000_000


@click.command(cls=Command, help=HELP)
@click.argument("studies", nargs=-1, required=True, metavar="STUDY...")
@click.option("--scale", metavar="X", default="1", show_default=True, help="Plan so many times the study's tokens.")
@click.option("--tflops", metavar="X", help="TFLOP/s of a device.  [default: measured here]")
@click.option("--devices", metavar="N", default="1", show_default=True, help="Devices side by side.")
def command(studies: tuple[str, ...], scale: str, tflops: str | None, devices: str) -> None:
    """Print the costs of studies."""
    times = parse_number("--scale", scale, SMALLEST_SCALE, LARGEST_SCALE)
    speed = None if tflops is None else parse_number("--tflops", tflops, SMALLEST_TFLOPS, LARGEST_TFLOPS)
    n_devices = parse_number("--devices", devices, 1, MOST_DEVICES)
    found = []
    for text in studies:
        path = find_study_file(text, "STUDY")
        values = read_config(path, "STUDY")
        if not is_study(values):
            raise InputError(f"{path} is no study: it has no `extract`. For a sweep: fastcache sweep --dry-run.")
        found.append(read_study(study_name(path), values, times))
    show_costs(found, speed, n_devices, RichProgress(make_console()))


def show_costs(studies: list[Study], tflops: float | None, devices: int, progress: RichProgress) -> None:
    """Print a line for each study, and one for all; speed is measured where `tflops` isn't given."""
    from fastcache.pipeline.costs import costs, measured_speed

    found = [costs(study) for study in studies]
    speed = tflops * 1e12 if tflops else measured_speed()
    columns = [
        *name_columns("study"),
        *figure_columns("SAEs", "caches", "disk", "extraction,\nPFLOP", "training,\nPFLOP", "hours"),
    ]
    values: list[tuple[float, ...]] = [
        (one.n_saes, one.n_caches, one.cache_bytes, one.extract_flop / 1e15, one.train_flop / 1e15,
         one.hours(speed * devices))
        for one in found
    ]  # fmt: skip
    names = [one.name for one in found]
    if len(found) > 1:
        names.append("all")
        values.append(tuple(map(sum, zip(*values, strict=True))))
    rows = [[name, *_cells(*each)] for name, each in zip(names, values, strict=True)]
    print_table(progress.console, FullTable(columns, rows))
    for text, studies_of_it in _assumptions(found).items():
        of = "" if len(studies_of_it) == len(found) else f" ({', '.join(studies_of_it)})"
        progress.say(f"Held-out dialogues{of}: {text}.")
    measured = "" if tflops else ", measured here"
    progress.say(
        f"Hours at {figure(speed / 1e12)} TFLOP/s{measured}, {devices} device{'s' if devices > 1 else ''}. "
        "Nothing was written."
    )


def _cells(n_saes: float, n_caches: float, n_bytes: float, *flop_and_hours: float) -> list[str]:
    return [count(int(n_saes)), count(int(n_caches)), size(n_bytes), *map(figure, flop_and_hours)]


def _assumptions(found: "list[Costs]") -> dict[str, list[str]]:
    """The names of the studies by what was assumed for them."""
    texts: dict[str, list[str]] = {}
    for one in found:
        texts.setdefault(one.held_out, []).append(one.name)
    return texts
