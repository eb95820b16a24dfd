"""The demo with smaller numbers, by its own command; its report in a real browser where there is one."""

import json
import re
import shlex

import pytest
from browser import needs_chromium, watched_page

from fastcache.cache_format.schema import METHODS, SPLITS
from fastcache.pipeline.cli import main
from fastcache.pipeline.demo import ARCHES, LAYERS


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    main(["demo", "--out", str(out), "--tokens", "12_000"])
    return out


def test_every_sae_is_evaluated_on_held_out_dialogues(demo):
    evaluations = [json.loads(path.read_text()) for path in demo.glob("sae-*/*/evaluation.json")]
    assert len(evaluations) == len(METHODS) * len(LAYERS) * len(ARCHES)
    for evaluation in evaluations:
        assert evaluation["held_out"]["split"] == "eval"
        assert 0 < evaluation["splits"]["all"]["l0"] < evaluation["d_sae"]
        assert all(evaluation["splits"][split]["n_tokens"] for split in SPLITS)


def test_all_methods_are_trained_on_the_same_number_of_tokens(demo):
    tokens = {json.loads(path.read_text())["training"]["tokens"] for path in demo.glob("sae-*/*/sae.json")}
    assert len(tokens) == 1


def test_near_duplicates_are_found(demo):
    counts = json.loads((demo / "corpus-chat/corpus.json").read_text())["counts"]["demo"]
    assert counts["dropped"]["n-gram duplicate"] > 100
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["rows"]


def test_the_report_shows_the_evaluated_figures(demo):
    page = (demo / "report.html").read_text()
    for path in demo.glob("sae-*/*/evaluation.json"):
        evaluation = json.loads(path.read_text())
        assert f"<td>{evaluation['splits']['all']['fvu']:.4f}</td>" in page


def test_the_report_needs_nothing_from_elsewhere(demo):
    page = (demo / "report.html").read_text()
    links = re.findall(r'(?:src|href)\s*=\s*"([^"#][^"]*)"', page)
    assert links == []
    assert "<script" not in page


def test_what_to_try_next_can_be_tried(demo, tmp_path, capsys):
    main(["demo", "--out", str(demo), "--tokens", "12_000"])
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("  fastcache interpret ")]
    main([*shlex.split(line)[1:], "--max-instances", "5", "--out", str(tmp_path / "latents")])
    assert (tmp_path / "latents" / "latents.parquet").is_file()


def test_a_finished_demo_does_nothing_again(demo, capsys):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("sae.safetensors")}
    main(["demo", "--out", str(demo), "--tokens", "12_000"])
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("sae.safetensors")} == before
    assert "nothing to do" in capsys.readouterr().out


def test_the_report_escapes_what_it_is_given(demo):
    sae, html = next(demo.glob("sae-*")), demo / "attack.html"
    main(["report", "--sae", str(sae), "--title", "<script>alert(1)</script>", "--html", str(html)])
    assert "<script" not in html.read_text()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_report_without_complaint(demo, browser, scheme):
    with watched_page(browser, viewport={"width": 1200, "height": 2400}, color_scheme=scheme) as page:
        page.goto((demo / "report.html").as_uri())
        assert len(page.screenshot()) > 50_000
