"""Studies: the file that describes one, its costs, and a small one run, resumed and scaled."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from fastcache.cache_format.reader import open_cache
from fastcache.corpus import Corpus
from fastcache.errors import InputError, NonFiniteError
from fastcache.pipeline.cli import cli, main
from fastcache.pipeline.costs import costs
from fastcache.pipeline.options import read_config
from fastcache.pipeline.show import show_evaluations
from fastcache.pipeline.study import read_study, with_settings
from fastcache.stages.report.config import ReportConfig
from fastcache.stages.report.paper import Cell, paper_values
from fastcache.stages.report.run import report_table
from fastcache.stages.train.member import Member

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = {
    "corpora": {"chat": {"source": ["demo"], "max_rows": 300}, "text": {"source": ["demo-text"], "max_rows": 60}},
    "extract": {"model": "demo", "layer": [1, 2], "tokens": 6000, "parity": 0},
    "train": {
        "base": {"batch_size": 64, "expansion": 2, "buffer_tokens": 1024},
        "runs": [{"arch": "topk", "k": 4}, {"arch": "topk", "k": 16}],
    },
    "evaluate": {"max_instances": 20},
}


def write_study(folder, **changes):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    path = write_study(folder)
    main(["sweep", "--config", str(path), "--out", str(folder / "out")])
    return path, folder / "out"


def evaluations(out):
    return {path.parent: json.loads(path.read_text()) for path in out.glob("sae-*/*/evaluation.json")}


def test_every_method_layer_and_run_is_trained_and_evaluated_on_the_same_dialogues(studied):
    found = evaluations(studied[1]).values()
    assert {(e["trained_on"], e["hook_point"]) for e in found} == {
        (method, f"resid_post.{layer}") for method in ("fast", "bt-f", "bt-p") for layer in (1, 2)
    }
    assert len(found) == 3 * 2 * 2
    assert {(e["held_out"]["split"], e["held_out"]["fingerprint"], e["held_out"]["dialogues"]) for e in found} == {
        ("eval", next(iter(found))["held_out"]["fingerprint"], 20)
    }


def test_all_methods_are_trained_on_equally_many_tokens(studied):
    smallest = min(open_cache(studied[1] / f"cache-{method}-train").n_tokens for method in ("fast", "bt-f", "bt-p"))
    assert {e["training"]["tokens"] for e in evaluations(studied[1]).values()} == {smallest // 64 * 64}


def test_a_finished_study_trains_and_evaluates_nothing_again(studied):
    path, out = studied
    before = {file: file.stat().st_mtime_ns for file in [*out.rglob("sae.safetensors"), *out.rglob("evaluation.json")]}
    main(["sweep", "--config", str(path), "--out", str(out)])
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_other_settings_of_the_evaluation_are_evaluated_anew(studied, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(studied[1], out)
    main(["sweep", "--config", str(studied[0]), "--out", str(out), "--set", "evaluate.max_instances=3"])
    assert {e["held_out"]["dialogues"] for e in evaluations(out).values()} == {3}


def test_a_study_that_was_stopped_goes_on(studied, tmp_path, monkeypatch):
    from fastcache.stages.train import sweep as sweep_module

    train_pass, calls = sweep_module._train_pass, []

    def stopping(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        train_pass(*given)

    monkeypatch.setattr(sweep_module, "_train_pass", stopping)
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "--config", str(studied[0]), "--out", str(tmp_path / "out")])
    monkeypatch.undo()
    assert stopped.value.code == 130
    trained = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("sae.safetensors")}
    assert 0 < len(trained) < 12
    main(["sweep", "--config", str(studied[0]), "--out", str(tmp_path / "out")])
    assert {file: file.stat().st_mtime_ns for file in trained} == trained
    for folder in evaluations(studied[1]):
        name = folder.relative_to(studied[1])
        assert (folder / "sae.safetensors").read_bytes() == (tmp_path / "out" / name / "sae.safetensors").read_bytes()


def test_the_report_compares_at_the_same_l0(studied):
    page = (studied[1] / "report.html").read_text()
    assert 'id="matched"' in page
    assert 'id="density"' in page


def test_a_report_takes_the_folder_of_a_study(studied):
    rows = csv.DictReader(io.StringIO(report_table(ReportConfig(sae=(str(studied[1]),), format="csv"))))
    assert len({row["sae"] for row in rows}) == 12


def test_a_table_in_a_pipe_is_whole(studied, capsys):
    show_evaluations(Console(width=40), list(evaluations(studied[1]).values()))
    lines = capsys.readouterr().out.splitlines()
    assert all("…" not in line for line in lines)
    assert sum("topk-k-16-layer-2" in line for line in lines) == 3


def test_a_corpus_that_is_not_there_is_told_before_the_first_cache(tmp_path):
    path = write_study(tmp_path, corpora={"chat": str(tmp_path / "none"), "text": str(tmp_path / "none")})
    done = CliRunner().invoke(cli, ["sweep", "--config", str(path), "--out", str(tmp_path / "out")])
    assert "corpus.json" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_scale_shrinks_tokens_of_the_command_line_too():
    study = read_study("tiny", with_settings(SMALL, {}, {"tokens": ["640", "1_280"]}), scale=0.5)
    assert {member.tokens for member in study.members(Path("cache"), None).members.values()} == {320, 640}


def test_a_study_of_which_nothing_was_trained_says_so(tmp_path, monkeypatch):
    def failing(member, *_given):
        raise NonFiniteError("Training became NaN.")

    monkeypatch.setattr(Member, "step", failing)
    path = write_study(tmp_path, methods=["fast"])
    done = CliRunner().invoke(cli, ["sweep", "--config", str(path), "--out", str(tmp_path / "out")])
    assert "None of the SAEs was trained" in str(done.exception)


def test_scale_shrinks_every_stage():
    study = read_study("tiny", {**SMALL, "train": {**SMALL["train"], "base": {"tokens": 5000}}}, scale=0.1)
    assert study.extract.tokens == 600
    assert study.corpora["chat"].max_rows == 30
    assert study.evaluate["max_instances"] == 2
    assert {member.tokens for member in study.members(Path("cache"), None).members.values()} == {500}


def test_settings_of_the_command_line_reach_their_sections():
    study = read_study("tiny", with_settings(SMALL, {"extract.layer": "[3]", "lr": "0.5"}, {"seed": ["1", "2"]}))
    assert study.extract.layer == (3,)
    assert {(member.lr, member.seed) for member in study.members(Path("c"), 640).members.values()} == {
        (0.5, 1),
        (0.5, 2),
    }


def test_the_recipes_are_the_papers_matrix():
    cells = []
    for path in sorted((RECIPES / "fast-paper").glob("*.yaml")):
        study = read_study(path.stem, read_config(path))
        model = study.extract.model.rpartition("/")[2]
        assert path.stem == model.lower()
        assert study.extract.tokens == 40_960_000
        assert study.evaluate["max_instances"] == 5000
        for member in study.members(Path("cache"), None).members.values():
            assert (member.recipe, member.tokens, member.seed) == ("fast-paper", 40_960_000, 42)
            layers = study.extract.layer if member.layer is None else (member.layer,)
            cells += [
                Cell(model, layer, member.expansion, method, member.arch)
                for layer in layers
                for method in study.methods
            ]
    assert len(cells) == 240
    assert set(cells) == set(paper_values())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_runs_small_by_its_own_file(path):
    study = read_study(path.stem, read_config(path), scale=0.01)
    assert study.extract.tokens <= 409_600
    assert study.members(Path("cache"), 1000).members


def test_costs_are_those_of_the_arithmetic():
    size = {"d_in": 100, "n_layers": 10, "parameters": 1000}
    values = {
        **SMALL,
        "size": size,
        "extract": {"model": "x/y", "layer": [1, 4], "tokens": 6000},
        "train": {"base": {"expansion": 8, "tokens": 2000}, "grid": {"arch": ["standard", "jumprelu"]}},
    }
    found = costs(read_study("tiny", values))
    tokens = 3 * 6000 + 6000  # the held-out cache has as many as the others, at most
    assert (found.n_saes, found.n_caches) == (12, 4)
    assert found.cache_bytes == tokens * (2 * 100 * 2 + 3)
    assert found.extract_flop == 2 * 1000 * 5 / 10 * tokens
    assert found.train_flop == 12 * 2000 * 5 * 2 * 100 * 800
    assert found.hours(1e6) == pytest.approx((found.extract_flop + found.train_flop) / 3.6e9)


def test_the_size_of_a_model_that_is_there_is_read_from_it():
    found = costs(read_study("tiny", SMALL))
    assert 0 < found.extract_flop < 2 * 2_410_016 * (3 * 6000 + 20 * 500)


def test_the_held_out_dialogues_are_counted_where_there_are_some_and_else_assumed_aloud(studied, tmp_path):
    corpora = {"chat": str(studied[1] / "corpus-chat"), "text": str(studied[1] / "corpus-text")}
    values = {**SMALL, "extract": {**SMALL["extract"], "tokens": 10**6}}
    n_rows = Corpus(studied[1] / "corpus-chat").n_rows("eval")
    known, assumed = (costs(read_study("tiny", {**values, **changes})) for changes in ({"corpora": corpora}, {}))
    row_bytes = 2 * 2 * 160 + 3
    assert known.cache_bytes == (3 * 10**6 + n_rows * 500) * row_bytes
    assert assumed.cache_bytes == (3 * 10**6 + 30 * 500) * row_bytes  # a tenth of --max-rows
    assert f"{n_rows} (as in the corpus" in known.held_out
    path = write_study(tmp_path, extract=values["extract"])
    done = CliRunner().invoke(cli, ["plan", str(path), "--tflops", "1"])
    assert "30 (an assumption: the corpus is not prepared yet) of about 500 tokens" in done.output


def test_plan_adds_studies_up(tmp_path):
    recipes = [str(path) for path in sorted((RECIPES / "fast-paper").glob("*.yaml"))]
    done = CliRunner().invoke(cli, ["plan", *recipes, "--tflops", "400"])
    assert done.exit_code == 0, done.output
    assert "all                     240      28" in done.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extarct": {}}, "no key 'extarct'.*Did you mean 'extract'"),
        ({"methods": ["bt-x"]}, "methods should be a list of some of fast, bt-f, bt-p"),
        ({"corpora": {"chat": {"source": ["demo"]}}}, "corpora should have chat and text"),
        ({"corpora": {"chat": 3, "text": "x"}}, "corpora: chat should be a folder or settings"),
        ({"extract": {**SMALL["extract"], "method": "fast"}}, "extract: method is given by the study itself"),
        ({"extract": {**SMALL["extract"], "layers": 3}}, "no option 'layers'.*Did you mean 'layer'"),
        ({"train": {"grid": {"arch": ["topk"]}, "run": []}}, "train: there is no key 'run'"),
        ({"train": {"grid": {"arch": ["top"]}}}, "arch = 'top' is not one of"),
        ({"evaluate": {"instances": 5}}, "evaluate: there is no option 'instances'"),
        ({"size": {"d_in": "wide"}}, "size: d_in"),
        ({"evaluate": [1]}, "evaluate should be a mapping, found list"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        read_study("tiny", {**SMALL, **changes})


def test_what_a_study_does_not_take_is_told(tmp_path):
    path = str(write_study(tmp_path))
    for words, message in (
        (["sweep", "--config", path, "--scale", "0"], "--scale = 0.0: expected a number from 1e-09"),
        (["sweep", "--config", path, "--cache", "somewhere"], "there is no key 'cache'"),
        (["sweep", "--cache", "somewhere", "--grid", "seed=1,2", "--scale", "0.5"], "--scale is for a study"),
        (["plan", path, "--tflops", "-1"], "--tflops = -1.0: expected a number from 1e-06"),
    ):
        assert message in str(CliRunner().invoke(cli, words).exception)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("base: {arch: topk}\n")
    assert "is no study: it has no `extract`" in str(CliRunner().invoke(cli, ["plan", str(sweep)]).exception)
