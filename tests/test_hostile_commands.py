"""What nobody should type: options given twice, numbers out of range, files that are none, limits of the system.

Each is one paragraph and exit code 2, quickly; a bug stays visible as one.
"""

import dataclasses
import os
import re
import resource
import subprocess
import sys
import typing
from pathlib import Path

import click
import pytest
from processes import run_to_its_end
from test_cli import fails, run_to_the_end

import fastcache.__main__ as program
from fastcache.config import LARGEST_INT, limits_of, parse_number
from fastcache.devices import choose_device
from fastcache.errors import InputError, first_line, quoted, shortened
from fastcache.memory import free_memory
from fastcache.pipeline.cli import COMMANDS, cli
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.extract.config import AddLayerConfig, ExtractConfig
from fastcache.stages.interpret.config import DashboardConfig, InterpretConfig, JudgeConfig
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.report.config import ReportConfig
from fastcache.stages.steer.config import FindConfig, SteerConfig
from fastcache.stages.train.config import ShuffleConfig, TrainConfig

NEEDED = {
    "extract": (["extract", "--model", "demo", "--layer", "1"], ExtractConfig),
    "train": (["train", "--cache", "c", "--arch", "topk"], TrainConfig),
    "evaluate": (["evaluate", "--sae", "s", "--cache", "c"], EvaluateConfig),
    "interpret": (["interpret", "--sae", "s", "--cache", "c"], InterpretConfig),
    "judge": (["interpret", "judge", "--latents", "l"], JudgeConfig),
    "dashboard": (["dashboard", "--latents", "l"], DashboardConfig),
    "steer": (["steer", "--sae", "s", "--latent", "1"], SteerConfig),
    "find": (["steer", "find", "--sae", "s", "--cache", "c"], FindConfig),
    "report": (["report", "--sae", "s"], ReportConfig),
    "prepare": (["prepare", "--source", "demo"], PrepareConfig),
    "inspect": (["inspect", "p", "--shuffle"], ShuffleConfig),
    "add-layer": (["extract", "--cache", "c", "--add-layer", "1"], AddLayerConfig),
}


def numeric_options():
    for name, (words, config) in NEEDED.items():
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if limits := limits_of(field, hints[field.name]):
                yield pytest.param(words, field.name, limits, id=f"{name} {field.name}")


@pytest.mark.parametrize(("words", "name", "limits"), list(numeric_options()))
def test_every_number_has_a_range(words, name, limits, capsys, tmp_path, monkeypatch):
    """Every option of every command refuses values out of range, and what is no number, before any file is opened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/manifest.json").touch()  # inspect looks at the kind of the folder first
    flag = f"--{name.replace('_', '-')}"
    if flag in words and flag != "--add-layer":
        at = words.index(flag)
        words = words[:at] + words[at + 2 :]
    below = limits[0] - 1 if isinstance(limits[0], int) else limits[0] - max(1, abs(limits[0]))
    for value in (
        below,
        limits[1] * 10 + 10,
        10**23 if limits[1] < 10**23 else 1e300,
        "nan",
        "1e400",
        "1,2,3",
        "",
        "x" * 10**5,
    ):
        if name == "alpha" and value == "1,2,3":
            continue  # it takes several, between commas
        text = fails(capsys, *words, f"{flag}={value}")
        assert f"{name} = " in text
        assert "expected" in text
        assert len(text) < 600
    assert {path.name for path in tmp_path.iterdir()} == {"p"}


def options_of(command, path):
    for option in command.params:
        if isinstance(option, click.Option) and not option.multiple and not option.is_eager:
            yield pytest.param(path, option, id=f"{' '.join(path)} {option.opts[0]}")
    for name, below in getattr(command, "commands", {}).items():
        yield from options_of(below, [*path, name])


def every_option():
    for name in COMMANDS:
        yield from options_of(cli.get_command(None, name), [name])


@pytest.mark.parametrize(("path", "option"), list(every_option()))
def test_no_option_with_one_value_can_be_given_twice(path, option, capsys):
    given = [option.opts[0]] if option.is_flag else [option.opts[0], "1"]
    choices = getattr(option.type, "choices", None)
    given = [given[0], choices[0]] if choices and not option.is_flag else given
    arguments = ["x"] if path[0] in ("plan", "verify", "repair", "inspect") else []
    assert "is given 2 times" in fails(capsys, *path, *arguments, *given, *given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "Did you mean 'train'?"),
        ("interpret jugde", "Did you mean 'judge'?"),
        ("steer fnid", "Did you mean 'find'?"),
        ("zzz", "Commands are demo, prepare"),
        ("steer --sae x find --cache c", "Put the options behind 'find'"),
        ("train --arhc topk", "--arch"),
        ("train --cache c --arch topk --set seed=1 --set seed=2", "--set seed is given twice"),
        ("train --cache c --arch topk --set batch-size=1 --set batch_size=2", "--set batch_size is given twice"),
        ("train --cache c --arch topk --set seed", "expected KEY=VALUE"),
        ("train --cache c --arch topk --set =7", "expected KEY=VALUE"),
        ("sweep --cache c --set arch=topk --grid k=1 --grid k=2", "--grid k is given twice"),
        ("sweep --cache c --set k=1 --grid k=1,2", "contradict"),
        ("sweep --cache c --set arch=topk --grid k=1,[", "--grid k is not valid YAML"),
        ("sweep --cache c --set arch=topk --grid k=1 --memory many", "expected a size such as 16GB"),
        ("sweep --config demo-studdy", "Did you mean 'demo-study'?"),
        ("plan nothing", "Studies that come with fastcache are"),
        ("plan demo-study --scale 0", "scale = 0.0: expected a number from"),
        ("plan demo-study --scale nan", "scale = nan"),
        ("plan demo-study --devices 0", "devices = 0"),
        ("plan demo-study --tflops -1", "tflops = -1"),
        ("demo --tokens 1,2,3", "--tokens = '1,2,3': expected int"),
        ("demo --tokens 0", "--tokens = 0"),
        ("demo --tokens 1e5", "expected int"),
        ("verify c --workers 0", "--workers = 0"),
        ("verify c --workers 1000000", "--workers = 1000000"),
        ("train --cache c --arch topk --out s3://bucket/sae", "is an address"),
        ("train --cache c --arch topk --out=", "It is empty"),
        ("steer find --sae s --cache c --out .", "is no name of a file"),
        ("report --sae s --html /", "is no name of a file"),
        ("report --sae s --html s3://bucket/x.html", "is an address"),
        ("extract --model demo --layer 1 --out memory:///x", "is lost"),
        ("verify nowhere", "is no cache"),
    ],
)
def test_command_lines_that_make_no_sense(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *words.split(" "))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["meta", "cuda:99", "tpu9", "", "cpu ", "x" * 10**5, "vulkan", "cuda:-1", "lazy"])
def test_devices_that_hold_no_numbers_are_refused(device):
    with pytest.raises(InputError, match=r"^--device .* can't be used here") as caught:
        choose_device(device)
    assert len(str(caught.value)) < 700


# Files


@pytest.fixture(scope="module")
def sae(small_cache, tmp_path_factory):
    from fastcache.pipeline.cli import main

    out = tmp_path_factory.mktemp("saes") / "sae"
    main(
        [
            "train",
            "--cache",
            str(small_cache),
            "--arch",
            "topk",
            "--k",
            "4",
            "--layer",
            "1",
            "--tokens",
            "640",
            "--out",
            str(out),
        ]
    )
    return out


FILES = {
    "nothing": "there is no such file", "folder": "is a directory", "pipe": "is a pipe", "/dev/zero": "is a device",
    "loop": "Too many levels of symbolic links", "/bin/sh": "not UTF-8 text", "latin": "not UTF-8 text .line 2",
    "nul": "holds a NUL character .line 2", "huge": "larger than", "x" * 300: "File name too long",
}  # fmt: skip


@pytest.fixture
def hostile_file(tmp_path, request):
    name = request.param
    if name == "folder":
        (tmp_path / name).mkdir()
    elif name == "pipe":
        os.mkfifo(tmp_path / name)
    elif name == "loop":
        (tmp_path / name).symlink_to(tmp_path / name)
    elif name in ("latin", "nul"):
        (tmp_path / name).write_bytes({"latin": b"a\ncaf\xe9\n", "nul": b"a\nb\0c\n"}[name])
    elif name == "huge":
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2**40)
    return tmp_path / name, FILES[name]


@pytest.mark.parametrize("hostile_file", FILES, indirect=True)
@pytest.mark.parametrize(
    "words",
    [
        "train --cache c --arch topk --config FILE",
        "steer --sae SAE --latent 1 --prompts FILE",
        "sweep --config FILE",
        "plan FILE",
    ],
)
def test_text_files_are_looked_at_before_they_are_read(words, hostile_file, capsys, sae):
    path, message = hostile_file
    text = fails(capsys, *words.replace("SAE", str(sae)).replace("FILE", str(path)).split(" "))
    assert re.search(message, text)
    assert "Error: --prompts" in text or "Error: --config" in text or "Error: STUDY" in text


def test_a_file_of_answers_that_is_a_pipe_is_not_waited_for(latents, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    judge = [
        "interpret",
        "judge",
        "--latents",
        latents,
        "--judge",
        "none",
        "--judge-model",
        "m",
        "--out",
        tmp_path / "out",
    ]
    assert "--answers" in fails(capsys, *judge, "--answers", tmp_path / "pipe")


FOLDERS = [
    "evaluate --sae X --cache CACHE", "evaluate --sae SAE --cache X", "train --cache X --arch topk", "inspect X", "verify X",
    "repair X", "export --sae X", "report --sae X", "steer --sae X --latent 1 --prompt hi", "interpret --sae X --cache CACHE",
    "interpret judge --latents X --judge none --judge-model m", "interpret scores --judged X",
    "dashboard --latents X --no-serve",
    "extract --add-layer 2 --cache X", "sweep --cache X --set arch=topk --grid k=1,2",
]  # fmt: skip


@pytest.mark.parametrize("words", FOLDERS)
@pytest.mark.parametrize("kind", ["/dev/zero", "pipe", "file", "empty folder", "pipes", "junk", "objects"])
def test_folders_that_are_none_are_refused(words, kind, capsys, sae, held_out_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "x" if kind != "/dev/zero" else kind
    names = ("run.json", "sae.json", "sae.safetensors", "manifest.json", "parts.jsonl", "corpus.json", "latents.parquet",
             "contexts.parquet", "summary.json", "evaluation.json", "metrics.jsonl")  # fmt: skip
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "file":
        place.write_text("text\n")
    elif kind != "/dev/zero":
        place.mkdir()
    for name in names if kind in ("pipes", "junk", "objects") else ():
        if kind == "pipes":
            os.mkfifo(place / name)
        else:
            (place / name).write_bytes(b"{}" if kind == "objects" else b"\0\xffjunk")
    values = {"X": str(place), "SAE": str(sae), "CACHE": str(held_out_cache)}
    code = run_to_the_end(*(values.get(word, word) for word in words.split(" ")))
    said = capsys.readouterr()
    assert code == (1 if words == "verify X" and kind in ("pipes", "junk", "objects") else 2)
    assert code == 1 or said.err.startswith("Error:")


# Messages


def test_a_long_value_is_quoted_without_its_middle():
    text = quoted("a" * 50_000 + "b" * 50_000)
    assert len(text) < 150
    assert text.startswith("'aaa")
    assert text.endswith("bbb'")
    assert len(quoted([["x" * 1000] * 1000] * 1000)) < 150
    assert quoted("\x1b[31m\n") == r"'\x1b[31m\n'"
    assert shortened("abc") == "abc"


def test_other_peoples_errors_are_one_clean_line():
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(ValueError("what is wrong:\n  this\nmore")) == "what is wrong: this"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("\x1b[31mred\x07")) == "\ufffd[31mred\ufffd"
    assert len(first_line(ValueError("x" * 10**6))) <= 300


@pytest.mark.parametrize(
    "words",
    ["train --cache c --arch LONG", "train --cache LONG --arch topk", "train --cache c --arch topk --set LONG", "LONG",
     "train --cache c --arch topk --LONG", "inspect LONG", "plan LONG", "extract --model LONG --layer 1"],
)  # fmt: skip
def test_errors_about_long_values_are_short(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(fails(capsys, *words.replace("LONG", "x" * 100_000).split(" "))) < 3000


@pytest.mark.parametrize("text", ["\udcff", "a\0b"])
def test_arguments_that_no_file_can_hold_are_refused(text, capsys):
    assert "is not UTF-8 text" in fails(capsys, "train", "--cache", text)


def test_numbers_are_read_alike_everywhere():
    assert (
        parse_number("x", "40,960,000", 1, LARGEST_INT) == parse_number("x", "40_960_000", 1, LARGEST_INT) == 40_960_000
    )
    for text in ("1__0", "_1", "1_", "0x10", "1e3", "١٢,٣", True, None, [], 1.5):
        with pytest.raises(InputError, match="expected int"):
            parse_number("x", text, 1, LARGEST_INT)


# Exit codes


def raise_in_inspect(monkeypatch, error):
    def broken(*_given, **_named):
        raise error

    monkeypatch.setattr("fastcache.pipeline.cli.cli.main", broken)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("1234 requested and 0 written"), "1234 requested and 0 written."),
        (OSError(), "OSError."),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (OSError(30, "Read-only file system", "/x"), "Read-only file system (/x)"),
        (PermissionError(13, "Permission denied", "/x"), "permission"),
        (OSError(36, "File name too long", "x" * 10**5), "File name too long"),
        (OSError(122, "Disk quota exceeded"), "quota"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "not enough memory"),
        (RuntimeError("can't start new thread"), "not enough memory"),
        (click.ClickException("whatever"), "whatever"),
    ],
)
def test_what_the_system_refuses_is_one_paragraph(error, message, capsys, monkeypatch):
    raise_in_inspect(monkeypatch, error)
    text = fails(capsys, "inspect", "x")
    assert message in text
    assert len(text) < 1000


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ZeroDivisionError(), RecursionError(), ImportError("a bug"), KeyError(1)]
)
def test_bugs_stay_visible_and_have_an_exit_code_of_their_own(error, capsys, monkeypatch):
    raise_in_inspect(monkeypatch, error)
    monkeypatch.setattr("sys.argv", ["fastcache", "inspect", "x"])
    with pytest.raises(SystemExit) as caught:
        program.run()
    printed = capsys.readouterr().err
    assert caught.value.code == 70
    assert "Traceback" in printed
    assert "This is a bug in fastcache" in printed


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_ctrl_c_has_its_own_exit_code(error, capsys, monkeypatch):
    raise_in_inspect(monkeypatch, error)
    assert run_to_the_end("inspect", "x") == 130
    assert "to resume, run" in capsys.readouterr().err


def test_ctrl_c_is_understood_while_modules_are_imported():
    code = (
        "import sys, importlib.abc\n"
        "class Stopping(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fastcache.pipeline.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stopping())\n"
        "from fastcache.__main__ import run\n"
        "run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.strip() == "Interrupted."


def test_an_sae_that_memory_can_not_hold_is_refused_before_it_is_allocated(small_cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastcache.stages.train.plan.free_memory", lambda: 10**6)
    train = ["train", "--cache", small_cache, "--layer", 1, "--arch", "standard", "--expansion", 2**10]
    for more in (["--out", tmp_path / "sae"], ["--dry-run"]):
        assert "of memory, and 1.00 MB are free. Lower --expansion" in fails(capsys, *train, *more)
    assert not (tmp_path / "sae").exists()


def limited(kind, amount):
    resource.setrlimit(kind, (amount, amount))


def test_files_that_can_not_be_opened_are_one_paragraph(small_cache, tmp_path):
    limit = (resource.RLIMIT_NOFILE, len(list(Path("/proc/self/fd").iterdir())) + 3)
    code, said = run_to_its_end(["verify", small_cache], limited, *limit)
    assert "Traceback" not in said
    assert code in (0, 2)


def test_free_memory_knows_of_ulimit():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = free_memory()
    resource.setrlimit(resource.RLIMIT_AS, (2**36, hard))
    try:
        assert before is None or free_memory() <= 2**36
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
