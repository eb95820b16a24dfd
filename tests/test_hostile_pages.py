"""Markup in names, titles and answers is text in every page; the dashboard's are in test_dashboard."""

import pytest
from browser import needs_chromium, watched_page
from evaluated_runs import write_run
from judge_server import serve
from latents import make_results

from fastcache.config import from_mapping
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.stages.interpret.config import JudgeConfig
from fastcache.stages.interpret.judge.run import judge

HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
IN_A_FOLDER = HOSTILE.replace("/", "-")  # a folder can be called so


def assert_harmless(browser, path):
    with watched_page(browser) as page:
        page.goto(path.as_uri())
        assert page.evaluate("window.hacked") is None
        assert page.locator("img, script").count() == 0
        return page.inner_text("body")


@needs_chromium
def test_the_report(browser, tmp_path):
    folders = [
        write_run(
            tmp_path / f"{n} {IN_A_FOLDER}", 0.2 + n / 10, 20.0 + n, method=HOSTILE, model=HOSTILE, seed=n, note=HOSTILE
        )
        for n in range(3)
    ]
    given = [argument for folder in folders for argument in ("--sae", folder)]
    main(["report", *given, "--title", HOSTILE, "--note", HOSTILE, "--html", str(tmp_path / "page.html")])
    text = assert_harmless(browser, tmp_path / "page.html")
    assert text.count(HOSTILE) >= 4
    assert IN_A_FOLDER in text


@pytest.fixture(scope="module", autouse=True)  # before the browser, whose event loop would be in the judge's way
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    results = make_results(folder / "latents", 20, word=HOSTILE, trained_on=HOSTILE)
    with serve(lambda _: f"{HOSTILE} [[4]] [[{HOSTILE}]]") as server:
        given = {"latents": str(results), "judge_url": server.url, "judge_model": HOSTILE}
        judge(from_mapping(JudgeConfig, given, "test"), folder / "judge", Silent())
    return folder / "judge"


@needs_chromium
def test_the_page_of_scores(judged, browser, tmp_path):
    pages = ["--html", str(tmp_path / "page.html"), "--csv", str(tmp_path / "scores.csv")]
    main(["interpret", "scores", "--judged", str(judged), *pages])
    assert assert_harmless(browser, tmp_path / "page.html").count(HOSTILE) >= 2
