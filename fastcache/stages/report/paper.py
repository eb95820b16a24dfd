"""The values that the FAST paper published, beside ours: log2 MSE of its 240 SAEs, of all tokens and of special ones."""

import csv
from typing import NamedTuple

from fastcache.assets import PAPER_MSE
from fastcache.cache_format.schema import layer_of
from fastcache.errors import InputError
from fastcache.stages.report.runs import Run


class Cell(NamedTuple):
    """What the paper's matrix is made of."""

    model: str
    layer: int
    expansion: int
    method: str
    architecture: str


class Published(NamedTuple):
    """log2 of equation 7's MSE."""

    all: float
    special: float


def paper_values() -> dict[Cell, Published]:
    """The paper's table; its source stands in the first line of the file."""
    with PAPER_MSE.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            Cell(row["model"], int(row["layer"]), int(row["expansion"]), row["method"], row["architecture"]): Published(
                float(row["log2_mse"]), float(row["log2_mse_special"])
            )
            for row in rows
        }


def compared(runs: list[Run]) -> list[tuple[Run, Published]]:
    """The evaluated runs that the paper has too, with its values; raises `InputError` where there is none."""
    values = paper_values()
    found = [(run, values[cell]) for run in runs if run.evaluation and (cell := _cell(run)) in values]
    if not found:
        models = ", ".join(sorted({cell.model for cell in values}))
        ours = ", ".join(sorted({str(tuple(_cell(run))) for run in runs if run.evaluation})[:3]) or "nothing evaluated"
        raise InputError(
            f"--compare paper: none of these SAEs is in the paper's matrix of model, layer, expansion, method and "
            f"architecture. Found {ours}; the paper's models are {models}."
        )
    return found


def _cell(run: Run) -> Cell:
    evaluation = run.evaluated
    layer, expansion = layer_of(evaluation["hook_point"]), int(run.settings.get("expansion", 0))
    return Cell(run.model, layer, expansion, evaluation["trained_on"], evaluation["architecture"])
