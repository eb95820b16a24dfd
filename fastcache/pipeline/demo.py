"""The demo: the stages as a user would run them, on the embedded model and text, ending in a report.

Everything is computed here and now; each stage resumes, so an interrupted demo goes on where it was.
"""

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fastcache.assets import DEMO
from fastcache.pipeline.console import RichProgress
from fastcache.pipeline.show import show_evaluations
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.report.config import ReportConfig
from fastcache.stages.train.config import TrainConfig

METHODS = ("fast", "bt-f", "bt-p")
LAYERS = (2, 4)
DEFAULT_TOKENS = 160_000

ARCHES = ("standard", "jumprelu")

SHORT_RUN: dict[str, Any] = {"batch_size": 256, "lr": 2e-3}
"""The rest is the modern recipe's, whose learning rate is for longer runs; the demo makes some 600 steps."""

NOTE = (
    "Twelve small SAEs on a toy chat model of 2.4M parameters, trained on {tokens:,} tokens each: this page shows what "
    "fastcache measures and how, not how real language models behave. One seed, no repeats: differences between methods "
    "here are no finding. Settings are those of the modern recipe (see Training settings), not the paper's, whose runs are 500 "
    "times as long."
)


@dataclass(frozen=True)
class _Places:
    """Where the demo's outputs go."""

    out: Path

    def corpus(self, method: str) -> Path:
        return self.out / ("corpus-text" if method == "bt-p" else "corpus-chat")

    def cache(self, method: str, split: str) -> Path:
        return self.out / f"cache-{method}-{split}"

    def sae(self, arch: str, method: str, layer: int) -> Path:
        return self.out / f"sae-{arch}-{method}-layer-{layer}"


def run_demo(out: Path, tokens: int, fresh: bool, console: Console) -> None:
    """Run all stages into `out`, print the table and what to try next."""
    from fastcache.stages.evaluate.run import evaluate
    from fastcache.stages.report.run import require_report_packages, write_report

    require_report_packages()
    progress, places = RichProgress(console), _Places(out)
    progress.say(f"Demo in {out}: prepare, extract (3 methods, 2 layers), train (12 SAEs), evaluate, report.")
    _prepare(places, fresh, progress)
    _extract(places, tokens, fresh, progress)
    saes = _train(places, fresh, progress)
    held_out = str(places.cache("fast", "eval"))
    evaluations = evaluate(EvaluateConfig(sae=tuple(map(str, saes)), cache=held_out), progress)
    report = out / "report.html"
    caches = (*(str(places.cache(method, "train")) for method in METHODS), held_out)
    trained = evaluations[0]["training"]["tokens"]
    write_report(
        ReportConfig(
            sae=tuple(map(str, saes)),
            cache=caches,
            corpus=(str(places.corpus("fast")), str(places.corpus("bt-p"))),
            title="fastcache demo",
            note=NOTE.format(tokens=trained),
            html=str(report),
        )
    )
    show_evaluations(console, evaluations)
    _say_what_next(places, report, progress)


def _prepare(places: _Places, fresh: bool, progress: RichProgress) -> None:
    from fastcache.stages.prepare.run import prepare

    for source, method in (("demo", "fast"), ("demo-text", "bt-p")):
        prepare(PrepareConfig(source=(source,)), places.corpus(method), progress, fresh)


def _extract(places: _Places, tokens: int, fresh: bool, progress: RichProgress) -> None:
    from fastcache.stages.extract.run import extract

    for method, split in (*((method, "train") for method in METHODS), ("fast", "eval")):
        config = ExtractConfig(
            model="demo", layer=LAYERS, method=method, split=split, tokens=tokens, unit_tokens=65_536
        )
        extract(config, partial(places.corpus, method), places.cache(method, split), progress, fresh)


def _train(places: _Places, fresh: bool, progress: RichProgress) -> list[Path]:
    from fastcache.cache_format.reader import open_cache
    from fastcache.stages.train.run import train

    # The same number of tokens for each method, so that none is trained longer.
    common = min(open_cache(places.cache(method, "train")).n_tokens for method in METHODS)
    folders: list[Path] = []
    for layer in LAYERS:
        for arch in ARCHES:
            for method in METHODS:
                folder = places.sae(arch, method, layer)
                cache = str(places.cache(method, "train"))
                config = TrainConfig(cache=cache, arch=arch, layer=layer, tokens=common, **SHORT_RUN)
                progress.say(f"SAE {len(folders) + 1} of 12: {arch}, {method}, layer {layer}")
                train(config, folder, progress, fresh)
                folders.append(folder)
    return folders


def _say_what_next(places: _Places, report: Path, progress: RichProgress) -> None:
    cache = shlex.quote(str(places.cache("fast", "train")))
    progress.say(
        f"\nReport: {report.resolve()}\n"
        f"The model is a toy ({DEMO / 'README.md'}): these figures show the tool, not a finding.\n\n"
        "Try next:\n"
        f"  fastcache inspect {cache}\n"
        f"  fastcache train --cache {cache} --layer 4 --arch jumprelu --target-l0 20\n"
        "  fastcache extract --model Qwen/Qwen2.5-0.5B-Instruct --layer 12"
    )
