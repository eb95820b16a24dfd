"""Evaluated runs in series that differ in sparsity and seed alone: curves over L0, and a comparison at one L0.

An SAE with more active latents has less error whatever it was trained on, so SAEs are compared at the same L0, to which
each series is interpolated: linearly between neighbouring sparsities, over log L0, and in log FVU.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, log
from typing import Any, NamedTuple

import numpy as np

from fastcache.cache_format.schema import METHODS, SPLIT_TITLES
from fastcache.stages.report.runs import Evaluation, Run

SPARSITY = ("coefficient", "target_l0", "k")
SEEDS = ("seed", "shuffle_seed")
OF_THE_DATA = ("cache", "threshold")
"""Other settings in which runs of one series may differ: where the data are, and what was found from them."""
TOLD_FIRST = ("expansion", "recipe", "tokens_of", "skip_first_position", "norm_filter", "tokens")
"""Settings that name a series before those that follow from them."""


class Measure(NamedTuple):
    """A figure of an evaluation that is looked at over L0."""

    title: str
    of: Callable[[Evaluation], float | None]
    logarithmic: bool

    def interpolated(self, l0: float, points: Sequence[tuple[float, float | None]]) -> float | None:
        """The value at `l0`, from values by rising L0; None where one is missing, or has no logarithm."""
        values = [value for _, value in points if value is not None and (value > 0 or not self.logarithmic)]
        if len(values) < len(points):
            return None
        scaled = np.log(values) if self.logarithmic else values
        places = [log(max(at, 1e-9)) for at, _ in points]  # of a dead SAE L0 is 0
        found = float(np.interp(log(l0), places, scaled))
        return exp(found) if self.logarithmic else found


def fvu(tokens: str, title: str) -> Measure:
    """FVU on a set of tokens."""
    return Measure(title, lambda evaluation: evaluation["splits"][tokens].get("fvu"), logarithmic=True)


def _recovered(evaluation: Evaluation) -> float | None:
    found = evaluation.get("with_model", {}).get("splits", {}).get("all", {}).get("loss_recovered")
    return None if found is None else float(found)


LOSS_RECOVERED = Measure("LM loss recovered", _recovered, logarithmic=False)
"""Of all tokens, from zero ablation; None where the model wasn't run."""


class Point(NamedTuple):
    """Means over the seeds, and the smallest and largest value."""

    l0: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Runs of one place, architecture and data method, with the same settings but for sparsity and seed."""

    label: str
    method: str
    runs: tuple[Run, ...]

    @cached_property
    def _by_seed(self) -> dict[Any, list[Run]]:
        seeds: dict[Any, list[Run]] = {}
        for run in sorted(self.runs, key=l0_of):
            seeds.setdefault(tuple(run.settings.get(name) for name in SEEDS), []).append(run)
        return seeds

    def points(self, measure: Measure) -> list[Point]:
        """By sparsity, in the order of L0; sparsities without a value are left out."""
        groups: dict[Any, list[tuple[float, float]]] = {}
        for run in self.runs:
            value = measure.of(run.evaluated)
            if value is not None:
                groups.setdefault(_sparsity(run), []).append((l0_of(run), value))
        return sorted(_point(found) for found in groups.values())

    @property
    def l0_range(self) -> tuple[float, float] | None:
        """What every seed's curve covers; None where one has no two different sparsities."""
        ends = [(l0_of(runs[0]), l0_of(runs[-1])) for runs in self._by_seed.values()]
        low, high = max(low for low, _ in ends), min(high for _, high in ends)
        return (low, high) if 0 < low < high else None

    def at(self, l0: float, measure: Measure) -> Point | None:
        """Interpolated to `l0`, each seed by itself; None outside of its range or where a value is missing."""
        inside = self.l0_range
        if inside is None or not inside[0] <= l0 <= inside[1]:
            return None
        found = [
            measure.interpolated(l0, [(l0_of(run), measure.of(run.evaluated)) for run in runs])
            for runs in self._by_seed.values()
        ]
        values = [value for value in found if value is not None]
        return _point([(l0, value) for value in values]) if len(values) == len(found) else None

    @property
    def in_the_middle(self) -> "Series":
        """Its runs of the sparsity in the middle."""
        sparsity = _sparsity(self.nearest(None))
        return Series(self.label, self.method, tuple(run for run in self.runs if _sparsity(run) == sparsity))

    def nearest(self, l0: float | None) -> Run:
        """The run with the nearest L0, or without one the run in the middle."""
        runs = sorted(self.runs, key=l0_of)
        return runs[len(runs) // 2] if l0 is None else min(runs, key=lambda run: abs(log(max(l0_of(run), 1e-9) / l0)))


@dataclass(frozen=True)
class Panel:
    """All series of one place in a model and architecture: what can be compared."""

    place: str
    architecture: str
    series: tuple[Series, ...]

    @property
    def title(self) -> str:
        """Architecture and place."""
        return f"{self.architecture}, {self.place}"

    @property
    def runs(self) -> list[Run]:
        """Of all series."""
        return [run for series in self.series for run in series.runs]

    def lowest(self, tokens: str) -> float | None:
        """The lowest log2 MSE on a set of tokens."""
        values = [run.evaluated["splits"][tokens].get("log2_mse") for run in self.runs]
        return min((value for value in values if value is not None), default=None)

    @cached_property
    def l0(self) -> float | None:
        """The middle, by logarithm, of the L0 that all curves cover; None where they have none in common."""
        ranges = [found for series in self.series if (found := series.l0_range)]
        if len(ranges) < 2:
            return None
        low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
        return (low * high) ** 0.5 if low <= high else None


Row = tuple[Series, float, list[Point | None]]


def at_equal_l0(panel: Panel) -> list[Row]:
    """Of each series of a panel its L0, and there FVU on the sets of tokens that tables have and the LM loss recovered.

    Curves are taken at the panel's L0; a series of one sparsity as it is, which its own L0 shows.
    """
    measures = [*(fvu(tokens, title) for tokens, title in SPLIT_TITLES.items()), LOSS_RECOVERED]
    rows: list[Row] = []
    for series in panel.series:
        if panel.l0 and series.l0_range:
            rows.append((series, panel.l0, [series.at(panel.l0, measure) for measure in measures]))
        else:
            lone = series.in_the_middle
            found = [lone.points(measure) for measure in measures]
            rows.append(
                (series, sum(map(l0_of, lone.runs)) / len(lone.runs), [each[0] if each else None for each in found])
            )
    return rows


def best(rows: list[Row], l0: float, column: int) -> float | None:
    """The best value of a column of `at_equal_l0`, of those at `l0`: the highest of the last column, else the lowest."""
    values = [point.value for _, at, points in rows if at == l0 and (point := points[column])]
    last = column in (-1, len(rows[0][2]) - 1)
    return (max if last else min)(values, default=None)


def panels(runs: list[Run]) -> list[Panel]:
    """The evaluated ones of `runs`, by place and architecture."""
    several = len({run.model for run in runs if run.evaluation}) > 1
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in (run for run in runs if run.evaluation):
        hook = run.evaluated["hook_point"]
        groups.setdefault((f"{run.model}, {hook}" if several else hook, run.evaluated["architecture"]), []).append(run)
    ordered = sorted(groups.items(), key=lambda each: (len(each[0][0]), each[0]))
    return [
        Panel(place, architecture, tuple(sorted(_series(members), key=_rank)))
        for (place, architecture), members in ordered
    ]


def _rank(series: Series) -> tuple[int, int, str]:
    """Methods in the paper's order, and of each first what has the shortest name: the plainest settings."""
    return METHODS.index(series.method) if series.method in METHODS else len(METHODS), len(series.label), series.label


def l0_of(run: Run) -> float:
    """Active latents a token, on all tokens."""
    return float(run.evaluated["splits"]["all"]["l0"])


def _sparsity(run: Run) -> tuple[Any, ...]:
    return tuple(run.settings.get(name) for name in SPARSITY)


def _point(found: list[tuple[float, float]]) -> Point:
    values = [value for _, value in found]
    return Point(sum(l0 for l0, _ in found) / len(found), sum(values) / len(values), min(values), max(values))


def _series(runs: list[Run]) -> Iterator[Series]:
    """Those of one place and architecture; the label says in which settings they differ from each other."""
    left_out = {*SPARSITY, *SEEDS, *OF_THE_DATA}
    settings = [{name: repr(value) for name, value in run.settings.items() if name not in left_out} for run in runs]
    groups: dict[Any, list[Run]] = {}
    for run, each in zip(runs, settings, strict=True):
        groups.setdefault((run.evaluated["trained_on"], *sorted(each.items())), []).append(run)
    naming = _naming([key[1:] for key in groups])
    for (method, *_), members in groups.items():
        yield Series(_label(method, members[0].settings, naming), method, tuple(members))


def _naming(groups: list[tuple[tuple[str, str], ...]]) -> list[str]:
    """As few settings as tell the groups apart: many follow from others."""
    settings = [dict(group) for group in groups]
    names = sorted({name for each in settings for name in each}, key=lambda name: (name not in TOLD_FIRST, name))
    chosen: list[str] = []
    for name in names:
        if len(_values(settings, [*chosen, name])) > len(_values(settings, chosen)):
            chosen.append(name)
    return chosen


def _values(settings: list[dict[str, str]], names: list[str]) -> set[tuple[str | None, ...]]:
    return {tuple(each.get(name) for name in names) for each in settings}


def _label(method: str, settings: dict[str, Any], naming: list[str]) -> str:
    words = [method]
    for name in naming:
        value, shown = settings.get(name), name.replace("_", " ")
        if value is True:
            words.append(shown)
        elif value not in (None, False):
            words.append(f"{shown} {value}")
    return ", ".join(words)
