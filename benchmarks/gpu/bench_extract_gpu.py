"""Extraction on a CUDA GPU: tokens per second, model FLOP utilisation, overhead of capture and writing.

    python benchmarks/gpu/bench_extract_gpu.py                      # Qwen2.5-7B's shape, bfloat16
    python benchmarks/gpu/bench_extract_gpu.py --shape 0.5b --tokens 2000000
    python benchmarks/gpu/bench_extract_gpu.py --device cpu --tiny  # runs the same code on a CPU; its figures mean nothing

No result is committed yet: this was never run on a GPU.

A randomly initialised model, cut after the captured layer, is built on the device, so that nothing is downloaded. The
yardstick is the same model on dense batches of 2,048 tokens without capture. Utilisation counts products with the
weights of the layers, and causal attention within the instances; dense batches attend further, and that is counted too.
Targets at bfloat16: overhead of packing, capture and writing at most 5 %, utilisation at least 0.55.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoModel, Qwen2Config

from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.schema import hook_point
from fastcache.cache_format.writer import CacheWriter
from fastcache.llm import transformers_backend
from fastcache.llm.backend import Backend
from fastcache.llm.decoder import Decoder
from fastcache.llm.loading import ModelSource
from fastcache.llm.transformers_backend import DTYPES, TransformersBackend

SHAPES = {  # hidden, intermediate, layers, heads, key and value heads, vocabulary
    "7b": (3584, 18944, 28, 28, 4, 152064),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "tiny": (64, 128, 4, 4, 2, 1000),
}
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}
"""Dense bfloat16 products a second, by the makers' figures."""
BLOCK = 2048
OVERHEAD, UTILISATION = 0.05, 0.55


@dataclass
class Run:
    """What is measured on."""

    config: Qwen2Config
    layer: int
    device: str
    dtype: str
    instances: list[np.ndarray]

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.instances))

    def decoder(self, *_given: object) -> Decoder:
        """Takes the place of the backend's loader."""
        model = self.model()
        return Decoder(model, model.layers)

    def model(self) -> torch.nn.Module:
        """Cut after the layer, with random weights."""
        config = Qwen2Config(**{**self.config.to_dict(), "num_hidden_layers": self.layer + 1, "layer_types": None})
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModel.from_config(config, dtype=DTYPES[self.dtype]).eval()

    def flops(self, lengths: list[int]) -> float:
        """Of sequences of these lengths up to the layer: products with weights, and causal attention."""
        c = self.config
        head = c.hidden_size // c.num_attention_heads
        kv = 2 * c.hidden_size * c.num_key_value_heads * head
        weights = 2 * c.hidden_size**2 + kv + 3 * c.hidden_size * c.intermediate_size
        pairs = sum(n * (n + 1) / 2 for n in lengths)  # each costs a product with a key and one with a value
        return (self.layer + 1) * (2.0 * weights * sum(lengths) + 4.0 * c.hidden_size * pairs)


def make_instances(n_tokens: int, n_vocabulary: int) -> list[np.ndarray]:
    """Lognormal lengths, median 545, 40 to 4,096, as in docs/benchmarks/shuffle.md; the last one is cut."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(6.3, 0.7, n_tokens // 40 + 1)), 40, 4096).astype(np.int64)
    sizes = np.diff(np.minimum(np.cumsum(lengths), n_tokens), prepend=0)
    return [rng.integers(0, n_vocabulary, size).astype(np.int32) for size in sizes[sizes > 0].tolist()]


def transformers_engine(run: Run, pack_tokens: int | None) -> Backend:
    with (
        patch.object(transformers_backend, "load_config", lambda _source: run.config),
        patch.object(transformers_backend, "load_decoder", run.decoder),
    ):
        backend = TransformersBackend(
            ModelSource("random"), [hook_point(run.layer)], run.dtype, run.device, pack_tokens
        )
    print("transformers:", backend.note or f"packs of {backend._pack_tokens:,} tokens")
    return backend


ENGINES: dict[str, Callable[[Run, int | None], Backend]] = {"transformers": transformers_engine}
"""Backends by name; vLLM's goes here, where vllm is installed."""


def dense(run: Run, batch: int) -> Callable[[], None]:
    """Batches of whole blocks, without regard to where instances begin, nothing captured."""
    model = run.model()
    tokens = np.concatenate(run.instances).astype(np.int64)
    blocks = torch.from_numpy(tokens[: len(tokens) // BLOCK * BLOCK].reshape(-1, BLOCK))

    @torch.inference_mode()
    def work() -> None:
        for rows in blocks.split(batch):
            model(input_ids=rows.to(run.device), use_cache=False)

    return work


def write(run: Run, backend: Backend, folder: Path) -> None:
    """What `extract` does with a unit."""
    units = [Instance(i, ids, np.ones(len(ids), np.uint8), [(i, 0)]) for i, ids in enumerate(run.instances)]
    identity = {"hook_points": backend.hook_points, "d_in": run.config.hidden_size, "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory(dir=folder) as out, CacheWriter(Path(out) / "cache", Manifest(identity)) as writer:
        part = writer.part(0, units)
        for residuals in backend.residuals(run.instances):
            part.append(residuals)
        part.commit({})


def seconds(run: Run, work: Callable[[], object], rounds: int) -> float:
    """Median of some rounds after one that warms up."""
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if run.device.startswith("cuda"):
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def peak_flops(device: str, given: float | None) -> float | None:
    if given:
        return given * 1e12
    name = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if key in name), None)


def line(name: str, n_tokens: int, flops: float, taken: float, peak: float | None) -> float | None:
    utilisation = flops / taken / peak if peak else None
    figures = f"{n_tokens / taken:>10,.0f} tok/s{flops / taken / 1e12:>8.1f} TFLOP/s"
    print(f"{name:40}{figures}  utilisation {f'{utilisation:.2f}' if utilisation else 'unknown'}", flush=True)
    return utilisation


def verdict(what: str, value: float | None, met: Callable[[float], bool], target: str) -> None:
    if value is None:
        print(f"{what}: unknown (give --peak-tflops), target {target}")
    else:
        print(f"{what}: {value:.3f}, target {target}: {'met' if met(value) else 'missed'}")


def measure(run: Run, arguments: argparse.Namespace) -> None:
    peak = peak_flops(run.device, arguments.peak_tflops)
    n_blocks = run.n_tokens // BLOCK
    # Memory of one model at a time: the yardstick's goes before an engine's comes.
    work = dense(run, arguments.dense_batch)
    yardstick = seconds(run, work, arguments.rounds) / (n_blocks * BLOCK)
    del work
    dense_flops = run.flops([BLOCK] * n_blocks)
    line("dense batches, nothing captured", n_blocks * BLOCK, dense_flops, yardstick * n_blocks * BLOCK, peak)
    flops = run.flops([len(ids) for ids in run.instances])
    for name, make in ENGINES.items():
        backend = make(run, arguments.pack_tokens)
        captured = seconds(run, lambda: [None for _ in backend.residuals(run.instances)], arguments.rounds)  # noqa: B023
        line(f"{name}: packed, captured to the host", run.n_tokens, flops, captured, peak)
        written = seconds(run, lambda: write(run, backend, arguments.out), arguments.rounds)  # noqa: B023
        utilisation = line(f"{name}: packed, captured, written", run.n_tokens, flops, written, peak)
        overhead = written / run.n_tokens / yardstick - 1
        verdict(f"{name}: overhead", overhead, lambda found: found <= OVERHEAD, f"at most {OVERHEAD}")
        verdict(f"{name}: utilisation", utilisation, lambda found: found >= UTILISATION, f"at least {UTILISATION}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("7b", "0.5b"), default="7b")
    parser.add_argument("--tiny", action="store_true", help="a model and a corpus of a few seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--layer", type=int, help="captured layer; default: two thirds of the depth")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--pack-tokens", type=int)
    parser.add_argument("--dense-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of the device at this dtype, where it isn't known")
    parser.add_argument("--out", type=Path, help="folder for the cache, on the disk to be measured")
    arguments = parser.parse_args()
    hidden, intermediate, n_layers, heads, kv_heads, vocabulary = SHAPES["tiny" if arguments.tiny else arguments.shape]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=n_layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=32768,
    )  # fmt: skip
    layer = n_layers * 2 // 3 if arguments.layer is None else arguments.layer
    n_tokens = 8192 if arguments.tiny else arguments.tokens
    run = Run(config, layer, arguments.device, arguments.dtype, make_instances(n_tokens, vocabulary))
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, {arguments.dtype}; hidden {hidden}, layer {layer} of {n_layers}")
    print(f"{run.n_tokens:,} tokens, {len(run.instances):,} instances; median of {arguments.rounds} rounds", flush=True)
    measure(run, arguments)


if __name__ == "__main__":
    main()
