"""Evaluated SAEs as CSV, JSON and Markdown."""

import csv
import io
import json

import pytest
from click.testing import CliRunner
from test_metrics import provenance, trained_like

from fastcache.pipeline.cli import cli, main
from fastcache.progress import Silent
from fastcache.sae.storage import save_sae
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.evaluate.run import evaluate


def as_trained(cache):
    return {**provenance(cache), "training": {"arch": "standard", "batch_size": 1}}


@pytest.fixture
def evaluated(tmp_path, small_cache, held_out_cache):
    """Two SAEs, one of them measured with the model too; and what was found."""
    folders = [str(tmp_path / name) for name in ("one", "pipe|in|name")]
    for folder in folders:
        save_sae(tmp_path / folder, trained_like(), as_trained(small_cache))
    cache = str(held_out_cache)
    plain = evaluate(EvaluateConfig(sae=(folders[0],), cache=cache), Silent())
    with_model = EvaluateConfig(sae=(folders[1],), cache=cache, with_model=True, model_instances=3)
    return folders, plain + evaluate(with_model, Silent())


def printed(folders, form):
    done = CliRunner().invoke(cli, ["report", *(word for one in folders for word in ("--sae", one)), "--format", form])
    assert done.exit_code == 0, done.output
    return done.output


def test_csv_has_every_figure_of_every_set(evaluated):
    folders, found = evaluated
    rows = list(csv.DictReader(io.StringIO(printed(folders, "csv"))))
    assert {(row["sae"], row["tokens"]) for row in rows} == {
        (name, tokens)
        for name, result in zip(("one", "pipe|in|name"), found, strict=True)
        for tokens, figures in result["splits"].items()
        if figures["n_tokens"]
    }
    for row in rows:
        result = found[row["sae"] != "one"]
        figures = result["splits"][row["tokens"]]
        assert float(row["fvu"]) == figures["fvu"] if figures["fvu"] is not None else row["fvu"] == ""
        assert float(row["mse_low"]) == figures["intervals"]["mse"][0]
        assert int(row["l0_q0.5"]) == figures["l0_quantiles"]["0.5"]
        assert (row["kl"] != "") == (row["sae"] != "one")


def test_json_has_the_same_rows_as_csv(evaluated):
    folders, _ = evaluated
    rows = json.loads(printed(folders, "json"))
    of_csv = list(csv.DictReader(io.StringIO(printed(folders, "csv"))))
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows] == [
        {key: value for key, value in row.items() if key in rows[number]} for number, row in enumerate(of_csv)
    ]


def test_markdown_has_a_line_for_each_sae_and_no_broken_columns(evaluated):
    folders, found = evaluated
    lines = printed(folders, "markdown").splitlines()
    assert len(lines) == 4
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert f"{found[0]['splits']['all']['l0']:,.1f}" in lines[2]
    assert lines[2].endswith("| - | - |")


def test_saes_that_were_not_evaluated_make_no_table(tmp_path, small_cache):
    save_sae(tmp_path / "sae", trained_like(), as_trained(small_cache))
    done = CliRunner().invoke(cli, ["report", "--sae", str(tmp_path / "sae"), "--format", "csv"])
    assert "run `fastcache evaluate` first" in str(done.exception)


def test_watching_and_a_table_do_not_go_together(tmp_path):
    done = CliRunner().invoke(cli, ["report", "--sae", str(tmp_path), "--format", "csv", "--watch", "5"])
    assert "--watch writes a page; it doesn't go with --format csv" in str(done.exception)


def test_saes_that_were_left_out_are_named_on_screen_and_page(evaluated, small_cache, tmp_path, capsys):
    folders, _ = evaluated
    save_sae(tmp_path / "later", trained_like(), as_trained(small_cache))
    words = ["report", *(word for one in [*folders, tmp_path / "later"] for word in ("--sae", str(one)))]
    main([*words, "--html", str(tmp_path / "page.html")])
    note = "2 of 3 SAEs are evaluated, and only these have held-out figures. Not evaluated: later."
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "page.html").read_text()
    main([*words, "--format", "csv"])
    output = capsys.readouterr()
    assert note in output.err
    assert note not in output.out
