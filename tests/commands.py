"""Every command that writes, in a few lines each: how it is started in a folder, and which files it leaves there.

The tests of commits, of full disks and of kills go through all of them.
"""

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

UNLIKE = ("run.json", "*/run.json", "*status.json", "*.lock")
"""Files that differ between two runs that are the same: they hold paths, times or nothing."""


class Inputs(NamedTuple):
    """What the commands read, made once."""

    chats: Path
    model: Path
    corpus: Path
    cache: Path
    held_out: Path
    sae: Path
    latents: Path
    judge_url: str


class Command(NamedTuple):
    """One command; `folder` is an empty one, in which it may write anything."""

    words: Callable[[Inputs, Path], list[Any]]
    before: Callable[[Inputs, Path], Any] = lambda _inputs, _folder: None
    """Puts into the folder what the command changes in place."""
    unlike: tuple[str, ...] = ()
    """Names of more files that differ between two runs."""
    says_when_done: str | None = None
    """What a command that refuses to be repeated says once all is done; others have nothing to do then."""


EXTRACT = ("--layer", 1, "--dtype", "float32", "--unit-tokens", 1000, "--parity", 0)
TRAIN = ("--layer", 1, "--expansion", 2, "--batch-size", 16, "--buffer-tokens", 300, "--checkpoint-every", 20)
STUDY = {
    "corpora": {"chat": {"source": ["CHATS"], "workers": 1}},
    "methods": ["fast"],
    "extract": {"layer": [1], "parity": 0, "unit_tokens": 1500},
    "train": {
        "base": {"batch_size": 16, "expansion": 2, "buffer_tokens": 300, "checkpoint_every": 40, "log_every": 10},
        "runs": [{"arch": "topk", "k": 4}],
    },
    "evaluate": {"max_instances": 3},
}


def extract(inputs, *options):
    return ["extract", "--model", inputs.model, "--corpus", inputs.corpus, *EXTRACT, *options]


def copy_cache(inputs, folder):
    shutil.copytree(inputs.cache, folder / "cache")


def damage_cache(inputs, folder):
    copy_cache(inputs, folder)
    for part in (0, 1):
        shard = folder / f"cache/parts/{part:08d}/resid_post.1/c/0/0"
        shard.write_bytes(bytes(shard.stat().st_size))


def copy_sae(inputs, folder):
    shutil.copytree(inputs.sae, folder / "sae")


def write_study(inputs, folder):
    study = json.loads(json.dumps(STUDY).replace("CHATS", str(inputs.chats)))
    study["extract"]["model"] = str(inputs.model)
    (folder / "study.yaml").write_text(yaml.safe_dump(study))


def judge(inputs, folder):
    place = ["--latents", inputs.latents, "--out", folder / "out", "--judge-url", inputs.judge_url]
    return ["interpret", "judge", *place, "--judge-model", "scripted", "--count", 5, "--concurrency", 1, "--detection"]


COMMANDS = {
    "prepare": Command(
        lambda inputs, folder: ["prepare", "--source", inputs.chats, "--workers", 1, "--out", folder / "out"]
    ),
    "extract": Command(lambda inputs, folder: extract(inputs, "--out", folder / "out")),
    "extract, 3 workers": Command(lambda inputs, folder: extract(inputs, "--workers", 3, "--out", folder / "out")),
    "add-layer": Command(
        lambda _, folder: ["extract", "--add-layer", 0, "--cache", folder / "cache", "--parity", 0], copy_cache,
        says_when_done="has this layer already",
    ),
    "repair": Command(lambda _, folder: ["repair", folder / "cache"], damage_cache),
    "train": Command(
        lambda inputs, folder: [
            "train", "--cache", inputs.cache, "--arch", "jumprelu", *TRAIN, "--tokens", 1600, "--log-every", 5,
            "--out", folder / "out",
        ]
    ),
    "sweep": Command(
        lambda inputs, folder: [
            "sweep", "--cache", inputs.cache, "--set", "layer=1", "--set", "batch_size=16", "--set", "tokens=960",
            "--set", "buffer_tokens=300", "--set", "checkpoint_every=20", "--set", "arch=topk", "--set", "expansion=2",
            "--grid", "k=2,4", "--out", folder / "out",
        ]
    ),
    "study": Command(
        lambda _, folder: ["sweep", "--config", folder / "study.yaml", "--out", folder / "out"],
        write_study,
        ("out/report.html",),
    ),
    "evaluate": Command(
        lambda inputs, folder: ["evaluate", "--sae", folder / "sae", "--cache", inputs.held_out], copy_sae
    ),
    "interpret": Command(
        lambda inputs, folder: [
            "interpret", "--sae", inputs.sae, "--cache", inputs.held_out, "--top", 3, "--window", 3,
            "--out", folder / "out",
        ]
    ),
    "judge": Command(judge, unlike=("out/answers.jsonl", "out/summary.json")),  # a kill may cost one more request
    "judge scores": Command(
        lambda inputs, folder: [
            "interpret", "scores", "--judged", inputs.latents / "judge", "--csv", folder / "out/scores.csv",
            "--html", folder / "out/scores.html",
        ]
    ),
    "steer": Command(
        lambda inputs, folder: [
            "steer", "--sae", inputs.sae, "--latent", 3, "--alpha", "0,20", "--max-new-tokens", 4,
            "--prompt", "the cat sat", "--prompt", "seven grey owls", "--out", folder / "out",
        ]
    ),
    "steer find": Command(
        lambda inputs, folder: [
            "steer", "find", "--sae", inputs.sae, "--cache", inputs.held_out, "--out", folder / "found.csv",
        ]
    ),
    "export": Command(lambda inputs, folder: ["export", "--sae", inputs.sae, "--out", folder / "out"]),
    "dashboard": Command(
        lambda inputs, folder: ["dashboard", "--latents", inputs.latents, "--no-serve", "--out", folder / "out"]
    ),
    "report": Command(
        lambda inputs, folder: ["report", "--sae", inputs.sae, "--html", folder / "out/report.html"],
        unlike=("out/report.html",),
    ),
}  # fmt: skip


def files_of(folder, command):
    """Bytes of what a command left, by name; no temporary files may be among them."""
    unlike = (*UNLIKE, *command.unlike)
    names = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {}
    for name, path in names.items():
        data = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        if path.name == "parts.jsonl":  # workers end their parts in any order
            data = b"".join(sorted(data.splitlines(keepends=True)))
        files[name] = b"" if any(fnmatch.fnmatch(name, pattern) for pattern in unlike) else data
    return files


def sizes_of(folder):
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


class Undisturbed(NamedTuple):
    """What a command leaves that nobody disturbs."""

    files: dict[str, bytes]
    sizes: dict[str, int]
    """Bytes of the files that it wrote."""
    recorder: Any
    seconds: float
