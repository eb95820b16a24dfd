"""Plots of evaluated SAEs, by place and architecture. Intervals are those of the evaluations, of 95 % over dialogues."""

from matplotlib.axes import Axes

from fastcache.cache_format.schema import SPLIT_TITLES
from fastcache.stages.report.curves import distinct_colours
from fastcache.stages.report.runs import Evaluation
from fastcache.stages.report.series import LOSS_RECOVERED, Measure, Panel, Series, fvu
from fastcache.svg import GREY, METHOD_COLOURS, legend_above, page_style, panels, plain_ticks, to_svg

MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
"""Of the series of one method, in turn."""
FVU = fvu("all", "FVU")


def against_l0(found: list[Panel]) -> str:
    """FVU, and where it was measured the LM loss recovered, against L0: a line for each series, a bar over its seeds."""
    measures = [FVU]
    if any(series.points(LOSS_RECOVERED) for panel in found for series in panel.series):
        measures.append(LOSS_RECOVERED)
    with page_style():
        figure, axes = panels(len(found) * len(measures), 2, 4.2, 2.9)
        places = [(panel, measure) for panel in found for measure in measures]
        for ax, (panel, measure) in zip(axes, places, strict=True):
            _curves(ax, panel, measure)
        legend_above(figure, axes)
        return to_svg(figure)


def _curves(ax: Axes, panel: Panel, measure: Measure) -> None:
    for series, colour, number in _looks(panel):
        points = series.points(measure)
        if not points:
            continue
        l0, values = [point.l0 for point in points], [point.value for point in points]
        # Never below 0, where the mean of equal numbers was rounded.
        seeds = [[max(0.0, p.value - p.low) for p in points], [max(0.0, p.high - p.value) for p in points]]
        style = {
            "color": colour,
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 5,
            "linewidth": 1.2,
            "alpha": 0.9,
        }
        ax.errorbar(l0, values, seeds, label=series.label, elinewidth=1, **style)
    if panel.l0:
        ax.axvline(panel.l0, color=GREY, linewidth=0.8, linestyle=":")
    if all(point.l0 > 0 for series in panel.series for point in series.points(measure)):
        ax.set_xscale("log")
        plain_ticks(ax.xaxis)
    if measure.logarithmic:
        ax.set_yscale("log")
        plain_ticks(ax.yaxis)
    ax.set_title(panel.title)
    ax.set_xlabel("L0 (active latents per token)")
    ax.set_ylabel(measure.title)


def _looks(panel: Panel) -> list[tuple[Series, str, int]]:
    """Each series with the colour of its method, and its number among those of the method, which marks it."""
    others = sorted({each.method for each in panel.series} - set(METHOD_COLOURS))
    colours = {**dict(zip(others, distinct_colours(len(others)), strict=True)), **METHOD_COLOURS}
    methods = [each.method for each in panel.series]
    return [(each, colours[each.method], methods[:i].count(each.method)) for i, each in enumerate(panel.series)]


def error_by_tokens(found: list[Panel]) -> str:
    """log2 MSE of every SAE by set of tokens, with its interval, in its method's colour."""
    with page_style():
        figure, axes = panels(len(found), 2, 4.2, 2.7)
        for ax, panel in zip(axes, found, strict=True):
            members = [(series, colour, number, run) for series, colour, number in _looks(panel) for run in series.runs]
            for i, (series, colour, number, run) in enumerate(members):
                shift = 0.6 * ((i + 0.5) / len(members) - 0.5)
                places, values, errors = _with_errors(run.evaluated, "log2_mse", shift)
                style = {"fmt": MARKERS[number % len(MARKERS)], "markersize": 4, "elinewidth": 0.9}
                # Points, not bars: a logarithm has no zero for a bar to stand on.
                ax.errorbar(places, values, errors, color=colour, label=series.label, **style)
            _sets_of_tokens(ax, panel, "log2 MSE")
        legend_above(figure, axes)
        return to_svg(figure)


def _with_errors(evaluation: Evaluation, name: str, shift: float) -> tuple[list[float], list[float], list[list[float]]]:
    """Places of the sets that have the figure, its values, and how far its interval goes below and above."""
    known = [
        (place + shift, split[name], [end if end is not None else split[name] for end in split["intervals"][name]])
        for place, split in enumerate(evaluation["splits"][tokens] for tokens in SPLIT_TITLES)
        if split.get(name) is not None
    ]
    below = [max(0.0, value - low) for _, value, (low, _) in known]
    above = [max(0.0, high - value) for _, value, (_, high) in known]
    return [place for place, _, _ in known], [value for _, value, _ in known], [below, above]


def _sets_of_tokens(ax: Axes, panel: Panel, label: str) -> None:
    ax.set_xticks(range(len(SPLIT_TITLES)), [title.replace(", ", ",\n") for title in SPLIT_TITLES.values()])
    ax.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlim(-0.5, len(SPLIT_TITLES) - 0.5)
    ax.set_title(panel.title)
    ax.set_ylabel(label)


def fvu_by_tokens(found: list[Panel]) -> str:
    """Bars of FVU by set of tokens, of each series' SAE that is nearest to the panel's L0."""
    with page_style():
        figure, axes = panels(len(found), 2, 4.2, 2.7)
        for ax, panel in zip(axes, found, strict=True):
            width = 0.8 / len(panel.series)
            for i, (series, colour, number) in enumerate(_looks(panel)):
                shift = 0.8 * ((i + 0.5) / len(panel.series) - 0.5)
                places, values, errors = _with_errors(series.nearest(panel.l0).evaluated, "fvu", shift)
                style = {"alpha": max(0.3, 1 - 0.3 * number), "error_kw": {"elinewidth": 0.9}}
                ax.bar(places, values, width, yerr=errors, color=colour, ecolor=GREY, label=series.label, **style)
            _sets_of_tokens(ax, panel, "FVU")
        legend_above(figure, axes)
        return to_svg(figure)


def densities(found: list[Panel]) -> str:
    """How many latents are active on which share of the tokens, of each series' SAE that is nearest to the panel's L0."""
    with page_style():
        figure, axes = panels(len(found), 2, 4.2, 2.4)
        for ax, panel in zip(axes, found, strict=True):
            for series, colour, number in _looks(panel):
                evaluation = series.nearest(panel.l0).evaluated
                if density := evaluation.get("density"):
                    shares = [count / evaluation["d_sae"] for count in density["counts"]]
                    style = {"linewidth": 1.3, "linestyle": LINES[number % len(LINES)], "label": series.label}
                    ax.stairs(shares, density["log10_edges"], color=colour, **style)
            ax.set_title(panel.title)
            ax.set_xlabel("log10 of the share of tokens")
            ax.set_ylabel("share of latents")
        legend_above(figure, axes)
        return to_svg(figure)
