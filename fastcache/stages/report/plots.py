"""The report's plots, as SVG text that takes the page's colours, so that dark and light both work."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import nan

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from fastcache.stages.report.runs import Evaluation, Run

METHOD_COLOURS = {"fast": "#d9480f", "bt-f": "#1c7ed6", "bt-p": "#5c940d"}
OTHER_COLOUR = "#868e96"
MARKERS = {"standard": "o", "jumprelu": "^"}
INK = "#010203"  # replaced by the page's text colour

COLOURS = ("#d9480f", "#1c7ed6", "#5c940d", "#ae3ec9", "#e0a100", "#0ca678", "#868e96", "#e64980")
CURVE_TITLES = {"loss": "loss", "fvu": "FVU of the batch", "l0": "L0", "dead_latents": "dead latents, share"}
MOST_ROWS = 8
MOST_SPIKES = 20
"""Of a run, in its plot; the largest."""


@contextmanager
def _style() -> Iterator[None]:
    settings = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a name may hold a dollar
        "svg.hashsalt": "fastcache",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
    with mpl.rc_context(settings):
        yield


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg [^>]*?)height="[^"]*" ', r"\1\2", text, count=1)


def _grid(n: int, width: float = 4.2, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    columns = min(n, 2)
    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    flat = list(axes.flat)
    for unused in flat[n:]:
        unused.set_visible(False)
    return figure, flat


def _panels(evaluations: list[Evaluation]) -> list[tuple[str, str]]:
    return sorted({(e["architecture"], e["hook_point"]) for e in evaluations}, key=lambda panel: (panel[1], panel[0]))


def _plain_ticks(axis: Axis) -> None:
    """0.05 instead of 5 x 10^-2, and a few of them, on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    labels, handles = zip(*dict(zip(labels, handles, strict=True)).items(), strict=True)  # each label once
    above = 1 + 0.3 / figure.get_figheight()  # inches, so that it clears the titles whatever the number of rows
    figure.legend(handles, labels, loc="upper center", ncols=max(1, len(labels)), bbox_to_anchor=(0.5, above))


def error_by_tokens(evaluations: list[Evaluation], titles: dict[str, str]) -> str:
    """log2 MSE by set of tokens, a panel for each architecture and layer, a colour for each method."""
    with _style():
        panels = _panels(evaluations)
        figure, axes = _grid(len(panels))
        for ax, (architecture, hook) in zip(axes, panels, strict=False):
            members = [e for e in evaluations if (e["architecture"], e["hook_point"]) == (architecture, hook)]
            width = 0.5 / len(members)
            for i, evaluation in enumerate(members):
                method = evaluation["trained_on"]
                points = [
                    (x + (i - (len(members) - 1) / 2) * width, evaluation["splits"][split]["log2_mse"])
                    for x, split in enumerate(titles)
                    if evaluation["splits"][split].get("log2_mse") is not None
                ]
                # Points, not bars: a logarithm has no zero for a bar to stand on.
                ax.scatter(
                    *zip(*points, strict=True), s=38, color=METHOD_COLOURS.get(method, OTHER_COLOUR), label=method
                )
            ax.set_xticks(range(len(titles)), [title.replace(", ", ",\n") for title in titles.values()])
            ax.grid(axis="y", color=OTHER_COLOUR, alpha=0.25, linewidth=0.6)
            ax.set_xlim(-0.5, len(titles) - 0.5)
            ax.set_title(f"{architecture}, {hook}")
            ax.set_ylabel("log2 MSE")
        _legend(figure, axes[0])
        figure.tight_layout()
        return _svg(figure)


def error_against_l0(evaluations: list[Evaluation]) -> str:
    """Scatter of FVU against L0, a panel a layer: what an SAE's error costs in active latents."""
    with _style():
        hooks = sorted({e["hook_point"] for e in evaluations})
        figure, axes = _grid(len(hooks))
        for ax, hook in zip(axes, hooks, strict=False):
            for evaluation in (e for e in evaluations if e["hook_point"] == hook):
                method, architecture, figures = (
                    evaluation["trained_on"],
                    evaluation["architecture"],
                    evaluation["splits"]["all"],
                )
                colour = METHOD_COLOURS.get(method, OTHER_COLOUR)
                ax.scatter(
                    figures["l0"], figures["fvu"], s=46, color=colour, marker=MARKERS.get(architecture, "s"),
                    alpha=0.85, label=f"{method} {architecture}",
                )  # fmt: skip
            ax.set_title(hook)
            ax.set_xscale("log")
            _plain_ticks(ax.xaxis)
            ax.set_yscale("log")
            _plain_ticks(ax.yaxis)
            ax.set_xlabel("L0 (active latents per token)")
            ax.set_ylabel("FVU")
        _legend(figure, axes[0])
        figure.tight_layout()
        return _svg(figure)


def run_colours(runs: list[Run]) -> list[str]:
    """A colour for each run; those of a panel differ."""
    return [colour for panel in _run_panels(runs).values() for colour in _colours(len(panel))]


def _colours(n: int) -> tuple[str, ...]:
    if n <= len(COLOURS):
        return COLOURS[:n]
    return tuple(to_hex(hsv_to_rgb((0.85 * i / n, 0.75, 0.82))) for i in range(n))  # from red to magenta


def _run_panels(runs: list[Run]) -> dict[str, list[int]]:
    """Numbers of the runs of one architecture and place; all together where that would be too many panels."""
    panels: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        panels.setdefault(f"{run.arch}, {run.place}", []).append(number)
    return panels if len(panels) <= MOST_ROWS else {f"{len(runs)} SAEs": list(range(len(runs)))}


def training_curves(runs: list[Run]) -> str:
    """Curves of the training batches: a row for each architecture and place, a column for each figure, spikes crossed."""
    colours = run_colours(runs)
    panels = {title: [n for n in numbers if runs[n].lines] for title, numbers in _run_panels(runs).items()}
    panels = {title: numbers for title, numbers in panels.items() if numbers}
    with _style():
        figure, rows = plt.subplots(
            len(panels), len(CURVE_TITLES), figsize=(3.1 * len(CURVE_TITLES), 2.3 * len(panels) + 0.3), squeeze=False
        )
        for axes, (title, numbers) in zip(rows, panels.items(), strict=True):
            width = 1.4 if len(numbers) <= len(COLOURS) else 0.7
            for ax, (name, label) in zip(axes, CURVE_TITLES.items(), strict=True):
                for number in numbers:
                    _curve(ax, name, runs[number], colours[number], width, f"{name}-r{number}")
                if name != "dead_latents":
                    ax.set_yscale("log")
                    _plain_ticks(ax.yaxis)
                ax.xaxis.set_major_formatter(EngFormatter(sep=""))
                ax.set_title(label)
            axes[0].set_ylabel(title)
        for ax in rows[-1]:
            ax.set_xlabel("training tokens")
        figure.tight_layout()
        return _rounded(_svg(figure))


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


def _rounded(svg: str) -> str:
    """With hundredths of a point in paths: curves take half the bytes."""
    return re.sub(r' d="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
