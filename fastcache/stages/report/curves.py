"""Training curves of all runs."""

from math import nan

from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.ticker import EngFormatter

from fastcache.stages.report.runs import Run
from fastcache.svg import page_style, panels, plain_ticks, to_svg

COLOURS = ("#d9480f", "#1c7ed6", "#5c940d", "#ae3ec9", "#e0a100", "#0ca678", "#868e96", "#e64980")
TITLES = {"loss": "loss", "fvu": "FVU of the batch", "l0": "L0", "dead_latents": "dead latents, share"}
MOST_ROWS = 8
MOST_SPIKES = 20
"""Of a run, in its plot; the largest."""


def run_colours(runs: list[Run]) -> list[str]:
    """A colour for each run; those of a panel differ."""
    return [colour for panel in _panels(runs).values() for colour in distinct_colours(len(panel))]


def distinct_colours(n: int) -> tuple[str, ...]:
    """`n` colours that differ."""
    if n <= len(COLOURS):
        return COLOURS[:n]
    return tuple(to_hex(hsv_to_rgb((0.85 * i / n, 0.75, 0.82))) for i in range(n))  # from red to magenta


def _panels(runs: list[Run]) -> dict[str, list[int]]:
    """Numbers of the runs of one architecture and place; all together where that would be too many panels."""
    found: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        found.setdefault(f"{run.arch}, {run.place}", []).append(number)
    return found if len(found) <= MOST_ROWS else {f"{len(runs)} SAEs": list(range(len(runs)))}


def training_curves(runs: list[Run]) -> str:
    """Curves of the training batches: a row for each architecture and place, a column for each figure, spikes crossed."""
    colours = run_colours(runs)
    rows = {title: [n for n in numbers if runs[n].lines] for title, numbers in _panels(runs).items()}
    rows = {title: numbers for title, numbers in rows.items() if numbers}
    with page_style():
        figure, axes = panels(len(rows) * len(TITLES), len(TITLES), 3.1, 2.4)
        for place, (title, numbers) in enumerate(rows.items()):
            width = 1.4 if len(numbers) <= len(COLOURS) else 0.7
            in_row = axes[place * len(TITLES) : (place + 1) * len(TITLES)]
            for ax, (name, label) in zip(in_row, TITLES.items(), strict=True):
                for number in numbers:
                    _curve(ax, name, runs[number], colours[number], width, f"{name}-r{number}")
                if name != "dead_latents":
                    ax.set_yscale("log")
                    plain_ticks(ax.yaxis)
                ax.xaxis.set_major_formatter(EngFormatter(sep=""))
                ax.set_title(label)
            in_row[0].set_ylabel(title)
        for ax in axes[-len(TITLES) :]:
            ax.set_xlabel("training tokens")
        return to_svg(figure)


def _curve(ax: Axes, name: str, run: Run, colour: str, width: float, gid: str) -> None:
    scale = 1 / run.settings["d_sae"] if name == "dead_latents" and run.settings.get("d_sae") else 1
    # None, and 0 on a logarithmic axis, are gaps.
    values = [
        line[name] * scale if line[name] or (line[name] == 0 and name == "dead_latents") else nan for line in run.lines
    ]
    ax.plot([line["step"] * run.batch_size for line in run.lines], values, color=colour, linewidth=width, gid=gid)
    if name == "loss" and run.spikes:
        shown = sorted(run.spikes, key=lambda spike: -spike["loss"])[:MOST_SPIKES]
        ax.scatter(
            [spike["step"] * run.batch_size for spike in shown], [spike["loss"] for spike in shown], s=22, color=colour,
            marker="x", linewidth=1, gid=f"spikes-r{gid.rpartition('-r')[2]}",
        )  # fmt: skip
