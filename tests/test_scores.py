"""Judged SAEs compared: the paper's figures from scores that are known."""

import csv
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from latents import make_results

from fastcache.errors import InputError, MismatchError
from fastcache.files import write_json_atomic
from fastcache.pipeline.cli import main
from fastcache.stages.interpret.config import ScoresConfig
from fastcache.stages.interpret.judge.compare import by_method, compare, interval
from fastcache.stages.interpret.judge.tables import SCHEMA
from fastcache.stages.interpret.results import Results


def judged(folder, method, scores, judge="a-judge", **sae):
    """As `interpret judge` leaves it, of an SAE of this data method."""
    results = Results(make_results(folder / "latents", 40, trained_on=method))
    out = folder / "judge"
    out.mkdir()
    rows = [{"latent": n, "score": score, "name": f"name {n}"} for n, score in enumerate(scores)]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), out / "scores.parquet")
    shares = {str(each): scores.count(each) / len(scores) for each in range(1, 6)}
    summary = {
        "sae": {**results.about["sae"], **sae}, "judge": judge, "qualifying": 30, "chosen": len(scores), "scored": len(scores),
        "failures": {}, "shares": shares, "mean": sum(scores) / len(scores), "share_4_5": shares["4"] + shares["5"],
        "detection": {"mean": None, "scored": 0, "failures": {}}, "requests": 9, "cost": None,
    }  # fmt: skip
    write_json_atomic(out / "summary.json", summary)
    return str(out)


@pytest.fixture
def three(tmp_path):
    scores = {"bt-p": [1, 1, 2, 3], "fast": [5, 5, 4, 3, 5], "bt-f": [4, 4, 4, 1]}
    return [judged(tmp_path / method, method, each) for method, each in scores.items()]


def config(folders, tmp_path):
    return ScoresConfig(judged=tuple(folders), html=str(tmp_path / "page.html"), csv=str(tmp_path / "scores.csv"))


def test_distributions_are_of_all_scores_of_a_method(tmp_path):
    summaries = [
        {"sae": {"trained_on": method}, "scored": n, "shares": {str(s): float(s == score) for s in range(1, 6)}}
        for method, n, score in (("fast", 30, 5), ("fast", 10, 2), ("bt-p", 20, 1), ("bt-f", 0, 1))
    ]
    found = by_method(summaries)
    assert found["fast"] == {1: 0, 2: 0.25, 3: 0.25, 4: 0.25, 5: 1}
    assert found["bt-p"] == dict.fromkeys(range(1, 6), 1.0)
    assert "bt-f" not in found  # nothing scored


def test_the_table_has_every_score_in_the_papers_order(three, tmp_path):
    compare(config(three, tmp_path))
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["trained_on"] for row in rows] == ["fast"] * 5 + ["bt-f"] * 4 + ["bt-p"] * 4
    assert [row["score"] for row in rows] == list("5543544411123")
    assert rows[0]["name"] == "name 0"


def test_the_page_shows_shares_and_distributions(three, tmp_path, capsys):
    given = [argument for folder in three for argument in ("--judged", folder)]
    main(["interpret", "scores", *given, "--html", str(tmp_path / "page.html"), "--csv", str(tmp_path / "scores.csv")])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    for text in ("80.0%", "75.0%", "0.0%", "share of latents with at most this score"):
        assert text in page
    shown = capsys.readouterr().out
    assert "80.0 %" in shown
    assert "4 of 4" in shown


def test_saes_that_differ_in_more_than_the_method_are_told_apart(three, tmp_path):
    compare(config(three, tmp_path))
    assert "topk" not in (page := (tmp_path / "page.html").read_text())
    assert "of different SAEs" not in page
    compare(config([*three, judged(tmp_path / "more", "fast", [2, 3], architecture="topk")], tmp_path))
    page = (tmp_path / "page.html").read_text()
    assert page.count(">topk<") >= 3  # the table, the bar, the title of its distribution
    assert "of different SAEs" in page


def test_the_interval_is_wilsons():
    low, high = interval(0.8, 128)
    assert (low, high) == pytest.approx((0.7226, 0.8600), abs=2e-4)  # Wilson 1927, by hand
    for n in (1, 5, 128):
        for hits in range(n + 1):
            low, high = interval(hits / n, n)
            # Its ends are where the normal test of the share just doesn't reject.
            for end in (low, high):
                if 0 < end < 1:
                    assert abs(hits / n - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), abs=1e-8)


def test_scores_of_different_judges_are_not_compared(tmp_path):
    folders = [judged(tmp_path / str(n), "fast", [1, 2], judge=f"judge {n}") for n in range(2)]
    with pytest.raises(MismatchError, match="judge 0, judge 1"):
        compare(config(folders, tmp_path))


def test_a_folder_without_scores_is_told(tmp_path):
    with pytest.raises(InputError, match="interpret judge"):
        compare(config([str(tmp_path)], tmp_path))
