"""The demo: the stages as a user would run them, on the embedded model and text, ending in a report.

Everything is computed here and now; each stage resumes, so an interrupted demo goes on where it was.
"""

from pathlib import Path
from typing import Any

from rich.console import Console

from fastcache.assets import DEMO
from fastcache.cache_format.schema import METHODS
from fastcache.pipeline.console import RichProgress
from fastcache.pipeline.run_study import REPORT_FILE, cache_folder, run_study, sweep_folder
from fastcache.pipeline.show import show_evaluations
from fastcache.pipeline.study import read_study

LAYERS = (2, 4)

ARCHES = ("standard", "jumprelu")

SHORT_RUN: dict[str, Any] = {"batch_size": 256, "lr": 2e-3}
"""The rest is the modern recipe's, whose learning rate is for longer runs; the demo makes some 600 steps."""

NOTE = (
    "Twelve small SAEs on a toy chat model of 2.4M parameters, trained on at most {tokens:,} tokens each: this page shows what "
    "fastcache measures and how, not how real language models behave. One seed, no repeats: differences between methods "
    "here are no finding. Settings are those of the modern recipe (see Training settings), not the paper's, whose runs are 500 "
    "times as long."
)


def run_demo(out: Path, tokens: int, fresh: bool, console: Console) -> None:
    """Run all stages into `out`, print the table and what to try next."""
    progress = RichProgress(console)
    progress.say(
        f"Demo in {out}: prepare, extract ({len(METHODS)} methods, {len(LAYERS)} layers), "
        f"train ({len(METHODS) * len(LAYERS) * len(ARCHES)} SAEs), evaluate, report."
    )
    study = read_study(
        "fastcache demo",
        {
            "corpora": {"chat": {"source": ["demo"]}, "text": {"source": ["demo-text"]}},
            "extract": {"model": "demo", "layer": LAYERS, "tokens": tokens, "unit_tokens": 65_536},
            "train": {"base": SHORT_RUN, "grid": {"arch": list(ARCHES)}},
            "note": NOTE.format(tokens=tokens),
        },
    )
    show_evaluations(console, run_study(study, out, progress, fresh))
    _say_what_next(out, progress)


def _say_what_next(out: Path, progress: RichProgress) -> None:
    cache, held_out = (str(cache_folder(out, "fast", split)) for split in ("train", "eval"))
    sae = str(min(sweep_folder(out, "fast").glob("jumprelu-*")))
    progress.say(
        f"\nReport: {(out / REPORT_FILE).resolve()}\n"
        f"The model is a toy ({DEMO / 'README.md'}): these figures show the tool, not a finding.\n"
    )
    progress.say_commands(
        "Try next:",
        [
            ["fastcache", "inspect", cache],
            ["fastcache", "interpret", "--sae", sae, "--cache", held_out, "--unembedding"],
            ["fastcache", "train", "--cache", cache, "--layer", "4", "--arch", "jumprelu", "--target-l0", "20"],
            ["fastcache", "extract", "--model", "Qwen/Qwen2.5-0.5B-Instruct", "--layer", "12"],
        ],
    )
