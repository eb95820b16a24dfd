"""A table of model architectures: whether `extract` gives the residual stream of the plain model, and how it runs it.

    python tools/model_table.py MODELS [NAME ...] [--out docs/models.md] [--tokens 700] [--backend vllm]

MODELS is a folder of checkpoints, or a script that makes one: it is called as `python MODELS FOLDER [NAME ...]`. Every
checkpoint goes through the whole of `extract` with the demo corpus, into float32 caches, twice: cut after the second
layer, and up to the last. The values of each cache are compared with a plain loop over the whole model, which uses
transformers alone. With --out, the table between the two markers of that page is replaced.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import numpy as np
import torch
import transformers

from fastcache.assets import DEMO
from fastcache.cache_format.reader import Cache
from fastcache.errors import FastcacheError
from fastcache.llm.loading import ModelSource
from fastcache.llm.transformers_backend import TransformersBackend
from fastcache.progress import Silent
from fastcache.stages.extract.config import ExtractConfig

MARKERS = {"transformers": "table of models", "vllm": "table of models in vLLM"}
"""Of the tables in the page, by backend."""


@dataclass
class Row:
    """One checkpoint: its type, the result, and how it ran."""

    name: str
    result: str
    how: str

    def __str__(self) -> str:
        cells = (self.name, self.result, self.how)
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def plain_residuals(folder: Path, layers: list[int]) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The residual stream `[n, d_in]` after each of `layers`, by a hook on the whole float32 model; without fastcache."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    caught: dict[int, torch.Tensor] = {}
    for layer in layers:
        modules = [
            module
            for name, module in model.named_modules()
            if name.endswith((f".layers.{layer}", f".h.{layer}", f".blocks.{layer}"))
            and not any(part in name for part in ("vision", "visual", "audio", "experts"))
        ]
        if len(modules) != 1:
            raise AssertionError(f"{len(modules)} modules could be layer {layer}")
        modules[0].register_forward_hook(lambda _m, _i, out, layer=layer: caught.update({layer: out}))

    @torch.no_grad()
    def run(token_ids: np.ndarray) -> list[np.ndarray]:
        model(input_ids=torch.tensor([token_ids.tolist()]), use_cache=False)
        states = [out[0] if isinstance(out, tuple) else out for out in (caught[layer] for layer in layers)]
        # Gemma 3n keeps four versions of the stream; the first is the one that its layers compute with.
        return [(stream[0] if stream.dim() == 4 else stream)[0].numpy() for stream in states]

    return run


def difference(cache: Cache, folder: Path, layers: list[int]) -> tuple[float, float]:
    """Largest absolute difference of the cache's values from the plain model's, and the largest value."""
    plain = plain_residuals(folder, layers)
    largest, scale = 0.0, 0.0
    for number in range(cache.n_instances):
        instance = cache.instance(number)
        expected = plain(np.asarray(instance.token_ids))
        for layer, values in zip(layers, expected, strict=True):
            found = instance.residuals(f"resid_post.{layer}")
            largest = max(largest, float(np.abs(found - values).max()))
            scale = max(scale, float(np.abs(values).max()))
    return largest, scale


def row(folder: Path, corpus: Path, tokens: int, backend: str) -> Row:
    """Extract twice and compare."""
    from fastcache.stages.extract.run import extract

    config = transformers.AutoConfig.from_pretrained(folder)
    last = config.get_text_config(decoder=True).num_hidden_layers - 1
    results, manners = [], []
    for layers in ([0, 1], [last]):
        try:
            with tempfile.TemporaryDirectory() as out:
                settings = ExtractConfig(
                    model=str(folder),
                    layer=tuple(layers),
                    tokens=tokens,
                    dtype="float32",
                    device="cpu",
                    parity=3,
                    backend=backend,
                )
                cache = extract(settings, lambda: corpus, Path(out) / "cache", Silent())
                results.append(difference(cache, folder, layers))
            manners.append(manner(folder, layers) if backend == "transformers" else "chunked prefill")
        except FastcacheError as error:
            return Row(folder.name, "refused", str(error).replace(str(folder), folder.name))
    largest, scale = max(results)
    result = "exact, 0.0" if largest == 0 else f"{largest:.1e} of {scale:.0f}"
    return Row(folder.name, result, "; ".join(dict.fromkeys(manners)))


def manner(folder: Path, layers: list[int]) -> str:
    """How the transformers backend runs a checkpoint."""
    backend = TransformersBackend(
        ModelSource(str(folder)), [f"resid_post.{layer}" for layer in layers], "float32", "cpu"
    )
    reason = (backend.note or "").removeprefix("Sequences go through the model one at a time, not in packs: ")
    return backend.manner + (f" ({reason.rstrip('.')})" if reason else "")


def make_models(models: Path, names: list[str], folder: Path) -> tuple[Path, list[str]]:
    """The folder with the checkpoints, and what the script couldn't make."""
    if models.is_dir():
        return models, []
    command = [sys.executable, models, folder, *names]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  the user's own script
    return folder, [line for line in done.stdout.splitlines() if line.startswith("FAIL")]


def rows(folder: Path, names: list[str], tokens: int, backend: str) -> Iterator[Row]:
    """A row for each checkpoint in `folder`."""
    # Not at the top: vLLM's workers import this file again, and can't stand what compiled loops leave in memory.
    from fastcache.stages.prepare.config import PrepareConfig
    from fastcache.stages.prepare.run import prepare

    with tempfile.TemporaryDirectory() as made:
        corpus = Path(made) / "corpus"
        prepare(PrepareConfig(source=(str(DEMO / "chat.jsonl.gz"),), workers=1), corpus, Silent())
        for path in sorted(folder.iterdir()):
            if (path / "config.json").is_file() and (not names or path.name in names):
                yield row(path, corpus, tokens, backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as made:
        folder, failed = make_models(given.models, given.names, Path(made))
        lines = ["| checkpoint | difference | how it ran |", "|---|---|---|"]
        for made_row in rows(folder, given.names, given.tokens, given.backend):
            lines.append(str(made_row))
            print(made_row, flush=True)
        for line in failed:
            _, name, reason = line.split(" ", 2)
            lines.append(str(Row(name, "not made", f"transformers {transformers.__version__}: {reason}")))
            print(lines[-1])
    if given.out:
        begin, end = (f"<!-- {MARKERS[given.backend]}: {edge} -->" for edge in ("begin", "end"))
        before, _, rest = given.out.read_text().partition(begin)
        after = rest.partition(end)[2]
        given.out.write_text(before + "\n".join([begin, *lines, end]) + after)


if __name__ == "__main__":
    main()
