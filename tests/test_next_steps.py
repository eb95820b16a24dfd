"""What a command prints as the next one can be pasted as it stands, and works."""

import shlex

import pytest

from fastcache.pipeline.cli import main
from fastcache.pipeline.console import command_lines


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory with a blank in its name."""
    place = tmp_path / "my runs"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def run(capsys, *words):
    """Run a command line; returns the commands that it says come next."""
    capsys.readouterr()
    main([str(word) for word in words])
    _, lead, rest = capsys.readouterr().out.partition("Next:")
    lines = [line.strip() for line in rest.splitlines() if line.strip().startswith("fastcache ")]
    assert bool(lead) == bool(lines)
    return [shlex.split(line)[1:] for line in lines]


def test_from_a_model_to_a_report_by_the_next_commands_alone(tiny_qwen, chat_corpus, folder, capsys):
    options = ("--model", tiny_qwen, "--corpus", chat_corpus, "--parity", "0", "--layer", "1")
    (train,) = run(capsys, "extract", *options, "--layer", "3")
    assert train[0] == "train"
    extract, evaluate = run(capsys, *train, "--tokens", "1280", "--batch-size", "64")
    assert (extract[0], evaluate[0]) == ("extract", "evaluate")
    assert run(capsys, *extract) == [evaluate]  # which knows the SAE that is there
    (report,) = run(capsys, *evaluate)
    assert run(capsys, *report) == []
    assert (folder / "report.html").is_file()
    (interpret,) = run(capsys, "extract", *options, "--split", "interpret")
    (dashboard,) = run(capsys, *interpret)
    main([*dashboard, "--no-serve"])
    (find,) = run(capsys, "extract", *options, "--split", "steer")
    (steer,) = run(capsys, *find)
    main([*steer, "--max-new-tokens", "1", "--alpha", "0"])
    (inspect,) = run(capsys, "export", "--sae", evaluate[2])
    main(inspect)
    assert "Export" in capsys.readouterr().out


def test_a_sweep_is_evaluated_whole_and_reported_by_its_folder(small_cache, held_out_cache, folder, capsys):
    words = ["sweep", "--cache", small_cache, "--set", "arch=topk", "--set", "layer=1", "--set", "tokens=640"]
    _, evaluate = run(capsys, *words, "--set", "batch_size=64", "--grid", "k=2,4,6", "--out", "a sweep")
    assert evaluate.count("--sae") == 3
    (report,) = run(capsys, *evaluate[:-1], held_out_cache)
    assert report[:3] == ["report", "--sae", "a sweep"]
    main(["inspect", "a sweep"])
    printed = capsys.readouterr().out
    assert "Unfinished" not in printed
    assert "3: 3 trained, 3 of them evaluated" in printed


def test_without_an_sae_held_out_rows_ask_for_training_first(tiny_qwen, chat_corpus, folder, capsys):
    options = ("--model", tiny_qwen, "--corpus", chat_corpus, "--parity", "0", "--layer", "2", "--split", "eval")
    extract, train = run(capsys, "extract", *options)
    assert run(capsys, *extract) == [train]
    assert run(capsys, "extract", *options) == [train]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_long_command_is_continued_as_a_shell_continues_it(width):
    words = [
        "fastcache",
        "evaluate",
        *(word for n in range(9) for word in ("--sae", f"a b/it's {n}")),
        "--cache",
        "$HOME",
    ]
    lines = command_lines(words, width)
    assert shlex.split(lines.replace("\\\n", " ")) == words
    assert len(lines.splitlines()) == 1 or max(map(len, lines.splitlines())) <= max(width, 40)
