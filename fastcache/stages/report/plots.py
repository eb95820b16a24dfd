"""Plots of evaluated SAEs, by place and architecture. Intervals are those of the evaluations, of 95 % over dialogues."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from fastcache.stages.report.curves import distinct_colours
from fastcache.stages.report.runs import Evaluation
from fastcache.stages.report.series import LOSS_RECOVERED, Measure, Panel, Series, fvu
from fastcache.svg import GREY, legend_above, page_style, panels, plain_ticks, to_svg

METHOD_COLOURS = {"fast": "#d9480f", "bt-f": "#1c7ed6", "bt-p": "#5c940d"}
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
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
        figure.tight_layout()
        return to_svg(figure)


def _curves(ax: Axes, panel: Panel, measure: Measure) -> None:
    for (colour, marker), series in zip(_looks(panel.series), panel.series, strict=True):
        points = series.points(measure)
        if not points:
            continue
        l0, values, low, high = zip(*points, strict=True)
        seeds = [[v - a for v, a in zip(values, low, strict=True)], [b - v for v, b in zip(values, high, strict=True)]]
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.2, "alpha": 0.9}
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


def _looks(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Colour and marker of each: the colour is the method's, the marker tells series of one method apart."""
    others = [each.method for each in series if each.method not in METHOD_COLOURS]
    colours = {**dict(zip(others, distinct_colours(len(others)), strict=True)), **METHOD_COLOURS}
    seen: dict[str, int] = {}
    looks = []
    for each in series:
        number = seen.setdefault(each.method, 0)
        seen[each.method] += 1
        looks.append((colours[each.method], MARKERS[number % len(MARKERS)]))
    return looks


def error_by_tokens(found: list[Panel], titles: dict[str, str]) -> str:
    """log2 MSE of every SAE by set of tokens, with its interval, in its method's colour."""
    with page_style():
        figure, axes = panels(len(found), 2, 4.2, 2.7)
        for ax, panel in zip(axes, found, strict=True):
            members = [(look, series, run) for look, series in zip(_looks(panel.series), panel.series, strict=True)
                       for run in series.runs]  # fmt: skip
            width = 0.6 / len(members)
            for i, ((colour, marker), series, run) in enumerate(members):
                shift = (i - (len(members) - 1) / 2) * width
                _intervals(ax, run.evaluated, "log2_mse", titles, shift, series.label, colour, marker)
            _sets_of_tokens(ax, panel, titles, "log2 MSE")
        legend_above(figure, axes)
        figure.tight_layout()
        return to_svg(figure)


def _intervals(
    ax: Axes, evaluation: Evaluation, name: str, titles: dict[str, str], shift: float, label: str, colour: str, marker: str
) -> None:  # fmt: skip
    """Points, not bars: a logarithm has no zero for a bar to stand on."""
    places, values, errors = _with_errors(evaluation, name, titles)
    places = [place + shift for place in places]
    ax.errorbar(places, values, errors, fmt=marker, markersize=4, color=colour, elinewidth=0.9, label=label)


def _with_errors(
    evaluation: Evaluation, name: str, titles: dict[str, str]
) -> tuple[list[float], list[float], list[list[float]]]:
    """Places of the sets that have the figure, its values, and how far its interval goes below and above."""
    known = [
        (float(place), split[name], [end if end is not None else split[name] for end in split["intervals"][name]])
        for place, split in enumerate(evaluation["splits"][tokens] for tokens in titles)
        if split.get(name) is not None
    ]
    below = [max(0.0, value - low) for _, value, (low, _) in known]
    above = [max(0.0, high - value) for _, value, (_, high) in known]
    return [place for place, _, _ in known], [value for _, value, _ in known], [below, above]


def _sets_of_tokens(ax: Axes, panel: Panel, titles: dict[str, str], label: str) -> None:
    ax.set_xticks(range(len(titles)), [title.replace(", ", ",\n") for title in titles.values()])
    ax.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlim(-0.5, len(titles) - 0.5)
    ax.set_title(panel.title)
    ax.set_ylabel(label)


def fvu_by_tokens(found: list[Panel], titles: dict[str, str]) -> str:
    """Bars of FVU by set of tokens, of each series' SAE that is nearest to the panel's L0."""
    with page_style():
        figure, axes = panels(len(found), 2, 4.2, 2.7)
        for ax, panel in zip(axes, found, strict=True):
            width = 0.8 / len(panel.series)
            for i, ((colour, _), series) in enumerate(zip(_looks(panel.series), panel.series, strict=True)):
                places, values, errors = _with_errors(series.nearest(panel.l0).evaluated, "fvu", titles)
                shift = (i - (len(panel.series) - 1) / 2) * width
                places = [place + shift for place in places]
                fade = 1 - 0.6 * [each.label for each in panel.series if each.method == series.method].index(
                    series.label
                ) / len(panel.series)
                bars = {"color": colour, "alpha": fade, "label": series.label, "error_kw": {"elinewidth": 0.9}}
                ax.bar(places, values, width, yerr=errors, ecolor=GREY, **bars)
            _sets_of_tokens(ax, panel, titles, "FVU")
        legend_above(figure, axes)
        figure.tight_layout()
        return to_svg(figure)


def densities(found: list[Panel]) -> str:
    """How many latents are active on which share of the tokens, of each series' SAE that is nearest to the panel's L0."""
    with page_style():
        figure, axes = panels(len(found), 2, 4.2, 2.4)
        for ax, panel in zip(axes, found, strict=True):
            for i, ((colour, _), series) in enumerate(zip(_looks(panel.series), panel.series, strict=True)):
                evaluation = series.nearest(panel.l0).evaluated
                density, style = evaluation.get("density"), ("-", "--", ":", "-.")
                if density:
                    same = sum(each.method == series.method for each in panel.series[:i])
                    ax.stairs(
                        [count / evaluation["d_sae"] for count in density["counts"]], density["log10_edges"],
                        color=colour, linewidth=1.3, linestyle=style[same % len(style)], label=series.label,
                    )  # fmt: skip
            ax.set_title(panel.title)
            ax.set_xlabel("log10 of the share of tokens")
            ax.set_ylabel("share of latents")
        legend_above(figure, axes)
        figure.tight_layout()
        return to_svg(figure)
