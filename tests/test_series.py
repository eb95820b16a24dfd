"""Comparison at the same L0, and beside the paper's values."""

import csv
import io
import json
import re

import pytest
from browser import needs_chromium, watched_page
from evaluated_runs import write_run

from fastcache.errors import InputError
from fastcache.stages.report.config import ReportConfig
from fastcache.stages.report.paper import paper_values
from fastcache.stages.report.run import report_table, write_report
from fastcache.stages.report.runs import read_runs
from fastcache.stages.report.series import LOSS_RECOVERED, at_equal_l0, best, fvu, panels

FVU = fvu("all", "FVU")


def power_law(folder, method, scale, exponents=(0.5, 0.5), coefficients=(1, 2, 3), **settings):
    """Runs with FVU = scale / L0^exponent at L0 64, 16 and 4, an exponent for each seed."""
    return [
        write_run(
            folder / f"{method}-{seed}-{coefficient}", scale / l0**exponent, l0, method=method, coefficient=coefficient,
            seed=seed, recovered=1 - scale / l0, **settings,
        )
        for seed, exponent in enumerate(exponents)
        for coefficient, l0 in zip(coefficients, (64.0, 16.0, 4.0), strict=False)
    ]  # fmt: skip


def page_of(folders, path, **settings):
    write_report(ReportConfig(sae=tuple(folders), html=str(path), **settings))
    return path.read_text()


def test_curves_are_compared_in_the_middle_of_what_all_cover(tmp_path):
    folders = power_law(tmp_path, "fast", 1.0) + power_law(tmp_path, "bt-f", 2.0, coefficients=(1, 2))
    (panel,) = panels(read_runs(tuple(folders)))
    assert [series.label for series in panel.series] == ["fast", "bt-f"]
    assert panel.l0 == pytest.approx(32)  # between 16 and 64
    rows = at_equal_l0(panel)
    assert [points[0].value for _, _, points in rows] == pytest.approx([32**-0.5, 2 * 32**-0.5])
    assert best(rows, panel.l0, 0) == pytest.approx(32**-0.5)


def test_each_seed_is_interpolated_by_itself(tmp_path):
    folders = power_law(tmp_path, "fast", 1.0, exponents=(0.5, 1.0)) + power_law(tmp_path, "bt-f", 1.0)
    (panel,) = panels(read_runs(tuple(folders)))
    point = panel.series[0].at(panel.l0, FVU)
    assert (point.low, point.high) == pytest.approx((16**-1.0, 16**-0.5))
    assert point.value == pytest.approx((16**-1.0 + 16**-0.5) / 2)


def test_loss_recovered_is_interpolated_as_it_is_and_the_highest_is_best(tmp_path):
    folders = power_law(tmp_path, "fast", 1.0, coefficients=(1, 2)) + power_law(
        tmp_path, "bt-f", 2.0, coefficients=(1, 2)
    )
    (panel,) = panels(read_runs(tuple(folders)))
    assert panel.series[0].at(32, LOSS_RECOVERED).value == pytest.approx((1 - 1 / 64 + 1 - 1 / 16) / 2)
    rows = at_equal_l0(panel)
    assert best(rows, panel.l0, -1) == rows[0][2][-1].value


def test_nothing_is_extrapolated(tmp_path):
    (panel,) = panels(read_runs(tuple(power_law(tmp_path, "fast", 1.0))))
    assert panel.series[0].at(65, FVU) is None
    assert panel.series[0].at(3.9, FVU) is None
    assert panel.l0 is None  # one curve is compared with nothing


def test_curves_without_a_common_l0_are_not_compared(tmp_path):
    dense = [
        write_run(tmp_path / f"dense{n}", 0.1, l0, method="bt-p", coefficient=n) for n, l0 in enumerate((500.0, 900.0))
    ]
    (panel,) = panels(read_runs((*power_law(tmp_path, "fast", 1.0), *dense)))
    assert panel.l0 is None
    assert 'id="matched"' not in page_of((*power_law(tmp_path / "again", "fast", 1.0), *dense), tmp_path / "page.html")


def test_a_setting_that_differs_makes_another_series_and_names_it(tmp_path):
    folders = power_law(tmp_path, "fast", 1.0, skip_first_position=False) + power_law(tmp_path, "bt-f", 1.0)
    folders += [write_run(tmp_path / "skips", 0.5, 17.0, coefficient=2, seed=0, skip_first_position=True)]
    (panel,) = panels(read_runs(tuple(folders)))
    assert [series.label for series in panel.series] == ["fast", "fast, skip first position", "bt-f"]
    l0 = {series.label: l0 for series, l0, _ in at_equal_l0(panel)}
    assert l0 == {"fast": 16.0, "bt-f": 16.0, "fast, skip first position": 17.0}


def test_figures_that_only_some_saes_have_are_missing_for_the_others(tmp_path):
    folders = power_law(tmp_path, "fast", 1.0) + power_law(tmp_path, "bt-f", 1.0)
    filtered = {"norm_filter": "3x-median"}  # of equal L0: two sparsities, and no curve
    folders += [write_run(tmp_path / "one", 0.5, 17.0, coefficient=1, recovered=0.5, **filtered)]
    folders += [write_run(tmp_path / "two", 0.5, 17.0, coefficient=2, **filtered)]
    (panel,) = panels(read_runs(tuple(folders)))
    rows = {series.label: (l0, points) for series, l0, points in at_equal_l0(panel)}
    l0, points = rows["fast, norm filter 3x-median"]
    assert (l0, points[0].value, points[-1]) == (17.0, 0.5, None)


def test_architectures_layers_and_models_are_never_compared_with_each_other(tmp_path):
    folders = [
        write_run(tmp_path / f"{arch}-{layer}-{model}", arch=arch, layer=layer, model=model)
        for arch in ("standard", "jumprelu")
        for layer in (4, 12)
        for model in ("a/one", "b/two")
    ]
    assert len(panels(read_runs(tuple(folders)))) == 8


def test_every_cell_of_the_paper_is_found_and_subtracted(tmp_path):
    cells = [(cell, values) for cell, values in paper_values().items() if cell.model == "Qwen2.5-0.5B-Instruct"]
    folders = [
        write_run(
            tmp_path / str(n), method=cell.method, arch=cell.architecture, layer=cell.layer, expansion=cell.expansion
        )
        for n, (cell, _) in enumerate(cells)
    ]
    rows = list(
        csv.DictReader(io.StringIO(report_table(ReportConfig(sae=tuple(folders), format="csv", compare="paper"))))
    )
    by_name = {(row["sae"], row["tokens"]): row["paper_log2_mse"] for row in rows}
    for n, (_, values) in enumerate(cells):
        assert (float(by_name[str(n), "all"]), float(by_name[str(n), "special"])) == tuple(values)
        assert by_name[str(n), "content"] == ""
    page = page_of(folders, tmp_path / "page.html", compare="paper")
    assert page.count(f"<td>{-1.8:.3f}</td><td>{cells[0][1].all:.3f}</td><td>{-1.8 - cells[0][1].all:.3f}</td>") == 1


def test_the_paper_has_240_cells_and_the_value_of_its_abstract():
    values = paper_values()
    assert len(values) == 240
    assert ("Qwen2.5-7B-Instruct", 18, 8, "fast", "standard") in values
    assert values["Qwen2.5-7B-Instruct", 18, 8, "fast", "standard"].special == pytest.approx(0.6468)


def test_saes_that_the_paper_does_not_have_are_refused_with_what_it_has(tmp_path):
    folder = write_run(tmp_path / "sae", layer=5)
    with pytest.raises(
        InputError, match=r"none of these SAEs.*'Qwen2\.5-0\.5B-Instruct', 5, 8.*Llama-3\.1-8B-Instruct"
    ):
        report_table(ReportConfig(sae=(folder,), format="csv", compare="paper"))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """The report of 240 SAEs: the paper's whole matrix."""
    folder = tmp_path_factory.mktemp("matrix")
    folders = [
        write_run(
            folder / f"{cell.model}-{cell.layer}" / f"{cell.architecture}-{cell.method}-{cell.expansion}", 0.1 + 0.001 * n,
            10.0 + n, method=cell.method, arch=cell.architecture, layer=cell.layer, model=f"x/{cell.model}",
            expansion=cell.expansion, recovered=0.9,
        )
        for n, cell in enumerate(paper_values())
    ]  # fmt: skip
    return folders, page_of(folders, folder / "page.html", compare="paper"), folder / "page.html"


def test_240_saes_make_one_page_of_a_few_megabytes(matrix):
    _, page, _ = matrix
    assert len(page) < 8_000_000
    assert (
        len(re.findall(r"<tr>", page[page.index('id="paper"') : page.index("</table>", page.index('id="paper"'))]))
        == 241
    )
    for heading in ("Error against sparsity", "Error by kind of token", "FVU by kind of token", "Latent densities"):
        assert f"<h2>{heading}</h2>" in page


@needs_chromium
def test_a_browser_prints_240_saes_without_complaint(matrix, browser):
    with watched_page(browser) as page:
        page.goto(matrix[2].as_uri())
        printed = page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) > 10


def test_settings_that_are_not_the_usual_ones_are_marked(tmp_path):
    folders = [write_run(tmp_path / str(n), seed=n, lr=0.1 if n < 3 else 0.5) for n in range(4)]
    page = page_of(folders, tmp_path / "page.html")
    assert page.count('<td class="best">0.5</td>') == 1
    assert '<td class="best">0.1</td>' not in page


def test_intervals_stand_in_the_plots(tmp_path):
    page = page_of(power_law(tmp_path, "fast", 1.0), tmp_path / "page.html")
    narrow = json.loads((tmp_path / "fast-0-1" / "evaluation.json").read_text())
    for split in narrow["splits"].values():
        split["intervals"] = {name: [split[name], split[name]] for name in split["intervals"]}
    for file in tmp_path.glob("*/evaluation.json"):
        file.write_text(json.dumps(narrow))
    assert page_of([str(folder.parent) for folder in tmp_path.glob("*/run.json")], tmp_path / "narrow.html") != page


def test_the_lowest_error_is_marked_in_each_model_by_itself(tmp_path):
    folders = [
        write_run(tmp_path / f"{n}", 0.1 * n, method=method, model=model)
        for n, (model, method) in enumerate((m, method) for m in ("a/one", "b/two") for method in ("fast", "bt-f"))
    ]
    page = page_of(folders, tmp_path / "page.html")
    summary = page[page.index('id="summary"') : page.index("</table>")]
    assert summary.count(f'class="best">{-2.0:.3f}') == 4
    assert summary.count(f'class="best">{-1.8:.3f}') == 4


def test_a_dead_sae_in_one_seed_does_not_stop_the_comparison(tmp_path):
    folders = power_law(tmp_path, "fast", 1.0) + power_law(tmp_path, "bt-f", 2.0)
    dead = write_run(tmp_path / "dead", 1.0, 0.0, method="fast", coefficient=9, seed=0, recovered=0.0)
    (panel,) = panels(read_runs((*folders, dead)))
    series = next(series for series in panel.series if series.label == "fast")
    assert series.l0_range == (4, 64)
    assert series.at(16.0, FVU).value == pytest.approx(16**-0.5)
