"""The demo with smaller numbers, by its own command; its report in a real browser where there is one."""

import json
import re
import shutil
import subprocess

import pytest

from fastcache.cache_format.schema import METHODS, SPLITS
from fastcache.pipeline.cli import main
from fastcache.pipeline.demo import ARCHES, LAYERS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


def test_a_finished_demo_does_nothing_again(demo, capsys):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("sae.safetensors")}
    main(["demo", "--out", str(demo), "--tokens", "12_000"])
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("sae.safetensors")} == before
    assert "nothing to do" in capsys.readouterr().out


def test_the_report_escapes_what_it_is_given(demo):
    sae, html = next(demo.glob("sae-*")), demo / "attack.html"
    main(["report", "--sae", str(sae), "--title", "<script>alert(1)</script>", "--html", str(html)])
    assert "<script" not in html.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_report_without_complaint(demo, tmp_path, scheme):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path}/profile",
        "--enable-logging=stderr",
    ]
    flags += ["--window-size=1200,2400", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    picture = tmp_path / "page.png"
    url = (demo / "report.html").as_uri()
    result = subprocess.run(
        [CHROMIUM, *flags, f"--screenshot={picture}", url], capture_output=True, text=True, timeout=120, check=True
    )
    assert picture.stat().st_size > 50_000
    assert "CONSOLE" not in result.stderr
