"""The command line: every command has an example, errors are one paragraph and exit code 2."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from fastcache.config import from_mapping
from fastcache.errors import InputError
from fastcache.pipeline.cli import COMMANDS, cli, main
from fastcache.stages.train.config import TrainConfig


def fails(capsys, *arguments):
    """Run the command line, expect exit code 2, return what it printed to stderr."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def run_to_the_end(*arguments):
    """Run the command line; returns the exit code. A traceback is no exit."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code
    return 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_in_its_help(name):
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert f"fastcache {name}" in result.output.partition("Example")[2]


@pytest.mark.parametrize("name", ["--help", *(f"{name} --help" for name in COMMANDS)])
def test_help_loads_nothing_heavy(name):
    code = (
        "import sys; sys.argv[1:] = sys.argv[1].split()\n"
        "from fastcache.pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(str({'torch', 'transformers', 'datasets', 'zarr', 'matplotlib', 'pyarrow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == "set()"


def test_help_lists_every_command():
    output = CliRunner().invoke(cli, ["--help"]).output
    assert all(name in output for name in COMMANDS)


def test_an_unknown_model_folder_is_named(capsys, tmp_path):
    assert "There is no folder" in fails(
        capsys, "extract", "--model", "/no/where", "--layer", 1, "--out", tmp_path / "c"
    )
    assert not (tmp_path / "c").exists()


def test_a_folder_that_is_no_model_is_named(capsys, tmp_path):
    text = fails(capsys, "extract", "--model", tmp_path, "--layer", 1, "--out", tmp_path / "c")
    assert "can't be loaded" in text
    assert "Traceback" not in text


def test_a_layer_out_of_range_says_the_range(capsys, tmp_path):
    text = fails(capsys, "extract", "--model", "demo", "--layer", 6, "--out", tmp_path / "c")
    assert "--layer goes from 0 to 5" in text


def test_a_needed_option_is_asked_for(capsys):
    assert "--model is needed" in fails(capsys, "extract", "--layer", 1)


def test_an_unknown_setting_gets_the_nearest_name(capsys):
    text = fails(capsys, "train", "--cache", "x", "--arch", "standard", "--set", "expanson=4")
    assert "Did you mean 'expansion'?" in text


def test_a_wrong_type_is_told(capsys):
    assert "expected int, found str" in fails(
        capsys, "train", "--cache", "x", "--arch", "standard", "--batch-size", "many"
    )


def test_no_cache_says_what_a_cache_is(capsys, tmp_path):
    assert "it has no manifest.json" in fails(capsys, "train", "--cache", tmp_path, "--arch", "standard")


def test_inspect_of_a_stranger_is_refused(capsys, tmp_path):
    assert "is no corpus, cache or trained SAE" in fails(capsys, "inspect", tmp_path)


def test_a_config_file_gives_way_to_set_and_set_to_options(tmp_path, small_cache):
    path = tmp_path / "train.yaml"
    path.write_text("expansion: 2\nseed: 1\nbatch-size: 32\nlayer: 1\ntokens: 640\n")
    arguments = ["train", "--cache", str(small_cache), "--arch", "standard", "--config", str(path)]
    main([*arguments, "--set", "seed=2", "--set", "batch_size=16", "--batch-size", "8", "--out", str(tmp_path / "sae")])
    settings = json.loads((tmp_path / "sae/run.json").read_text())["settings"]
    assert (settings["expansion"], settings["seed"], settings["batch_size"]) == (2, 2, 8)


def test_a_config_file_that_is_no_mapping_is_refused(capsys, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("- 1\n")
    assert "should map option names" in fails(capsys, "train", "--cache", "x", "--arch", "standard", "--config", path)


@pytest.mark.parametrize(("text", "number"), [("40_960_000", 40_960_000), ("40,960,000", 40_960_000), ("7", 7)])
def test_numbers_may_have_separators(text, number):
    assert from_mapping(TrainConfig, {"cache": "x", "arch": "standard", "tokens": text}, "here").tokens == number


@pytest.mark.parametrize("value", [True, 1.5, None, [1], "1.5"])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(InputError, match="expected int"):
        from_mapping(TrainConfig, {"cache": "x", "arch": "standard", "seed": value}, "here")


def test_the_two_commands_of_the_readme_work(tiny_qwen, chat_corpus, tmp_path, capsys):
    cache, sae = tmp_path / "cache", tmp_path / "sae"
    main(["extract", "--model", str(tiny_qwen), "--layer", "2", "--corpus", str(chat_corpus), "--out", str(cache)])
    main(["train", "--cache", str(cache), "--arch", "jumprelu", "--out", str(sae)])
    printed = capsys.readouterr().out
    assert f"Next: fastcache train --cache {cache} --arch jumprelu" in printed
    assert (sae / "sae.safetensors").exists()
    main(["inspect", str(cache)])
    main(["inspect", str(sae)])
    printed = capsys.readouterr().out
    assert "resid_post.2" in printed
    assert "d_sae 256" in printed


def test_inspect_shows_the_ledger_and_the_parity(small_cache, capsys):
    main(["inspect", str(small_cache)])
    printed = capsys.readouterr().out
    assert "ledger" in printed
    assert "parity resid_post.3" in printed


def test_missing_disk_space_while_writing_is_one_paragraph(capsys, tmp_path, chat_file, monkeypatch):
    import errno

    def full(*_arguments, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device", "corpus")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    text = fails(capsys, "prepare", "--source", chat_file, "--out", tmp_path / "corpus")
    assert "No space left on device (corpus)" in text


TRAIN = ("train", "--cache", "CACHE", "--arch", "standard", "--layer", "1")


@pytest.mark.parametrize(
    "option",
    ["--batch-size 0", "--expansion 0", "--lr nan", "--log-every 0", "--checkpoint-every 0", "--threshold 0", "--seed -1",
     "--tokens 0", "--lr-warm-up 3", "--lr-decay -1", "--dead-window 0", "--layer -1", "--device tpu9", "--set seed=["],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(option, capsys, small_cache, tmp_path):
    arguments = [str(small_cache) if argument == "CACHE" else argument for argument in TRAIN]
    text = fails(capsys, *arguments, *option.split(" ", 1), "--out", tmp_path / "sae")
    assert option.split(" ")[0].strip("-").replace("-", "_").split("=")[0] in text.replace("-", "_")
    assert not (tmp_path / "sae/run.json").exists()


@pytest.mark.parametrize("text", ["0,3", "0,001", "1,8", "1,2,3"])
def test_commas_that_separate_no_thousands_are_refused(text):
    with pytest.raises(InputError, match="expected"):
        from_mapping(TrainConfig, {"cache": "x", "arch": "standard", "tokens": text}, "here")


def train_small(cache, out, *more):
    main(["train", "--cache", str(cache), "--arch", "standard", "--tokens", "640", "--out", str(out), *more])
    return out


@pytest.fixture
def sae(small_cache, tmp_path):
    return train_small(small_cache, tmp_path / "sae", "--layer", "1")


@pytest.mark.parametrize("data", [b"", b"{}", b"[1", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["sae.safetensors", "sae.json", "run.json", "metrics.jsonl"])
def test_damaged_files_are_one_paragraph(sae, held_out_cache, capsys, name, data):
    (sae / name).write_bytes(data)
    for arguments in (("inspect", sae), ("evaluate", "--sae", sae, "--cache", held_out_cache)):
        code = run_to_the_end(*arguments)
        printed = capsys.readouterr().err
        assert code == 0 or (code == 2 and printed.startswith("Error:"))


def test_an_sae_that_is_a_file_is_named(sae, held_out_cache, capsys):
    assert "can't be read" in fails(capsys, "evaluate", "--sae", sae / "sae.json", "--cache", held_out_cache)


def test_fresh_removes_only_what_the_command_wrote(sae, small_cache):
    (sae / "my notes").mkdir()
    (sae / "my notes/a.txt").write_text("mine")
    train_small(small_cache, sae, "--layer", "3", "--fresh")
    assert (sae / "my notes/a.txt").read_text() == "mine"
    assert json.loads((sae / "sae.json").read_text())["hook_point"] == "resid_post.3"


def test_a_changed_corpus_file_is_not_mistaken_for_the_old_one(tiny_qwen, tmp_path, monkeypatch, capsys, chat_file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_bytes(chat_file.read_bytes())
    extract = ["extract", "--model", tiny_qwen, "--layer", 1, "--corpus", "chats.jsonl", "--parity", 0, "--out"]
    main([str(argument) for argument in [*extract, "a"]])
    main([str(argument) for argument in [*extract, "b"]])
    (tmp_path / "chats.jsonl").write_bytes(b"".join(chat_file.read_bytes().splitlines(keepends=True)[:30]))
    assert "has changed since" in fails(capsys, *extract, "c")


def test_inspect_tells_an_unfinished_preparation(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"command": "prepare", "settings": {}}')
    main(["inspect", str(tmp_path)])
    assert "Unfinished output of `fastcache prepare`" in capsys.readouterr().out
