"""docs/method.md points at files that exist and says where each of its points comes from."""

import re
from pathlib import Path

import pytest

import fastcache
from fastcache.sae import init
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.recipe import resolve

PACKAGE = Path(fastcache.__file__).parent
DOCS = PACKAGE.parent / "docs"


def table():
    """Point, what is done, ground, files."""
    lines = (DOCS / "method.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_every_point_has_a_ground():
    assert len(table()) > 20
    for point, _, ground, _ in table():
        assert re.search(r"paper|SAELens|ours", ground), point


@pytest.mark.parametrize("page", ["method.md", "evaluate.md", "train.md"])
def test_the_files_that_are_named_exist(page):
    named = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)`", (DOCS / page).read_text())
    assert [path for path in named if not (PACKAGE / path).is_file()] == []
    assert named or page != "method.md"


def test_docstrings_cite_no_numbered_sections_of_our_pages():
    sources = [path for path in PACKAGE.rglob("*.py") if re.search(r"method\.md,? section", path.read_text())]
    assert sources == []


def test_the_recipe_has_the_figures_of_the_table():
    done = {point: what for point, what, _, _ in table()}
    standard, jumprelu = (
        resolve(TrainConfig(cache="", arch=arch, recipe="fast-paper"), 896, 40_960_000)
        for arch in ("standard", "jumprelu")
    )
    assert f"lambda {standard.coefficient:g}" in done["standard SAE"]
    assert f"lambda {jumprelu.coefficient:g}, bandwidth {jumprelu.bandwidth:g}" in done["JumpReLU SAE"]
    assert done["initial theta"].startswith(f"{jumprelu.threshold:g};")
    assert (init.MEDIAN_EPS, init.MEDIAN_FTOL, init.MEDIAN_MAX_STEPS) == (1e-6, 1e-20, 100)
    assert f"batch {standard.batch_size}" in done["optimiser"]
    assert f"gradient norm of {standard.clip_norm:g}" in done["clipping"]
    assert f"{standard.lr_warm_up:.0%} of the steps up, {standard.lr_decay:.0%} down" in done["learning rate"].replace(
        " %", "%"
    )
    assert f"{standard.coefficient_warm_up:.3%}" in done["lambda"].replace(" %", "%")
    assert f"more than {standard.dead_window:,} steps" in done["dead latents in training"]
