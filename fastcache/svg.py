"""Plots as SVG text that takes the page's colours, so that dark and light both work.

matplotlib, which not every installation has, is imported when something is drawn.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK = "#010203"  # replaced by the page's text colour
GREY = "#868e96"
METHOD_COLOURS = {"fast": "#d9480f", "bt-f": "#1c7ed6", "bt-p": "#5c940d"}
SPACE = 0.75
LEFT, RIGHT, TOP, BOTTOM = 0.65, 0.1, 0.3, 0.55
"""Inches between axes, and around all of them. Fixed: nothing has to be drawn to find them, and pages have hundreds of axes."""
LEGEND_MARK, LEGEND_LETTER = 0.55, 0.07
"""Inches of a legend's entry: its mark, and a letter of its label."""


@contextmanager
def page_style() -> Iterator[None]:
    """Draw in the page's style within the block."""
    import matplotlib as mpl

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


def panels(n: int, columns: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    """A figure with `n` axes of this size in inches, in rows of `columns`."""
    from matplotlib.figure import Figure  # not pyplot: no state left behind

    columns = min(n, columns)
    rows = -(-n // columns)
    figure = Figure(figsize=(columns * width - SPACE + LEFT + RIGHT, rows * height - SPACE + TOP + BOTTOM))
    spacing = {"wspace": SPACE / (width - SPACE), "hspace": SPACE / (height - SPACE)}
    flat = list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=spacing).flat)
    _fit(figure, TOP)
    for unused in flat[n:]:
        unused.set_visible(False)
    return figure, flat[:n]


def _fit(figure: "Figure", top: float) -> None:
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left=LEFT / width, right=1 - RIGHT / width, bottom=BOTTOM / height, top=1 - top / height)


def to_svg(figure: "Figure") -> str:
    """The figure, as wide as its place in the page; paths are rounded to hundredths of a point, which halves them."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg [^>]*?)height="[^"]*" ', r"\1\2", text, count=1)
    return re.sub(r' d="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)


def plain_ticks(axis: "Axis") -> None:
    """0.05 instead of 5 x 10^-2, and a few of them, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def legend_above(figure: "Figure", axes: "list[Axes]") -> None:
    """One legend for all axes, each label once."""
    found = [ax.get_legend_handles_labels() for ax in axes]
    handles = dict(pair for some, labels in found for pair in zip(labels, some, strict=True))
    widest = LEGEND_MARK + LEGEND_LETTER * max(map(len, handles), default=0)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / widest)))
    lines = -(-len(handles) // columns)
    room = 0.1 + 0.2 * lines
    figure.set_figheight(figure.get_figheight() + room)
    _fit(figure, TOP + room)
    figure.legend(list(handles.values()), list(handles), ncols=columns, loc="upper center", bbox_to_anchor=(0.5, 1))
