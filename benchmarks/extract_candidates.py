"""What bench_extract.py compares: each candidate takes the same instances through the same model up to the same layer.

A candidate gets its task ready and returns what is timed: loading a model and arranging tokens isn't.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.schema import hook_point
from fastcache.cache_format.writer import CacheWriter
from fastcache.llm.loading import ModelSource, load_decoder
from fastcache.llm.transformers_backend import TransformersBackend, packs

BLOCK = 2048
OURS, BATCH_1, DENSE = "ours: packed, capture, writing", "transformers, batch 1", "dense blocks"
VLLM = {"ours: vLLM, capture, writing": "capture", "vLLM, generate": "plain"}
SAELENS = {"SAELens, HookedTransformer": "HookedTransformer", "SAELens, AutoModelForCausalLM": "AutoModelForCausalLM"}

Instances = list[np.ndarray]
Work = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """What every candidate does: these instances, through this model, up to this layer."""

    model: Path
    hidden: int
    layer: int
    instances: Instances

    def backend(self, pack_tokens: int | None = None) -> TransformersBackend:
        hook = hook_point(self.layer)
        return TransformersBackend(ModelSource(str(self.model)), [hook], "float32", "cpu", pack_tokens)


Candidate = Callable[[Task], Work]
"""Gets the task ready; what it returns is timed."""


def batch(rows: Instances) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def write(backend: TransformersBackend, hidden: int, instances: Instances) -> None:
    """What `extract` does with a unit."""
    units = [Instance(i, ids, np.ones(len(ids), np.uint8), [(i, 0)]) for i, ids in enumerate(instances)]
    manifest = Manifest({"hook_points": backend.hook_points, "d_in": hidden, "dtype": "bfloat16"})
    with tempfile.TemporaryDirectory() as folder, CacheWriter(Path(folder) / "cache", manifest) as writer:
        part = writer.part(0, units)
        for residuals in backend.residuals(instances):
            part.append(residuals)
        part.commit({})


def ours(task: Task) -> Work:
    return partial(write, task.backend(), task.hidden, task.instances)


def packed_without_writing(task: Task) -> Work:
    backend = task.backend()
    return lambda: [None for _ in backend.residuals(task.instances)]


def packed_without_capture(task: Task) -> Work:
    backend = task.backend()
    backend._layers[-1]._forward_hooks.clear()
    return lambda: [backend._run(pack) for pack in packs(task.instances, backend._pack_tokens, backend._shortest)]


def plain(task: Task, batches: list[dict[str, torch.Tensor]]) -> Work:
    """Forward passes of the base model cut after the layer, nothing captured."""
    base = load_decoder(ModelSource(str(task.model)), task.layer + 1, torch.float32, "cpu").model

    @torch.inference_mode()
    def work() -> None:
        for keywords in batches:
            base(use_cache=False, **keywords)

    return work


def batch_1(task: Task) -> Work:
    return plain(task, [{"input_ids": batch([ids])} for ids in task.instances])


def dense_blocks(task: Task) -> Work:
    """Block training: the same tokens without regard to where instances begin."""
    tokens = np.concatenate(task.instances)
    blocks = [tokens[start : start + BLOCK] for start in range(0, len(tokens), BLOCK)]
    return plain(task, [{"input_ids": batch([block])} for block in blocks])


def padded_buckets(task: Task) -> Work:
    """Sorted by length, padded on the right, batches of at most `BLOCK` tokens with their padding."""

    def padded(rows: Instances) -> dict[str, torch.Tensor]:
        longest = max(map(len, rows))
        mask = [np.arange(longest) < len(row) for row in rows]
        ids = [np.pad(row, (0, longest - len(row))) for row in rows]
        return {"input_ids": batch(ids), "attention_mask": batch(mask)}

    batches: list[Instances] = [[]]
    for ids in sorted(task.instances, key=len):
        if batches[-1] and (len(batches[-1]) + 1) * len(ids) > BLOCK:
            batches.append([])
        batches[-1].append(ids)
    return plain(task, [padded(rows) for rows in batches])


def packing_mask(task: Task) -> Work:
    """Packs as transformers does them with SDPA: it finds them by their positions and builds a mask."""

    def pack(rows: Instances) -> dict[str, torch.Tensor]:
        positions = np.concatenate([np.arange(len(row)) for row in rows])
        return {"input_ids": batch([np.concatenate(rows)]), "position_ids": batch([positions])}

    return plain(task, [pack(rows) for rows in packs(task.instances, BLOCK)])


def naive_script(task: Task) -> Work:
    """What one writes first: whole model, all hidden states of each dialogue, a list saved with torch."""
    whole = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).eval()

    @torch.no_grad()
    def work() -> None:
        states = [
            whole(batch([ids]), output_hidden_states=True).hidden_states[task.layer + 1][0] for ids in task.instances
        ]
        with tempfile.TemporaryDirectory() as folder:
            torch.save(states, Path(folder) / "states.pt")

    return work


CANDIDATES: dict[str, Candidate] = {
    OURS: ours,
    "  without writing": packed_without_writing,
    "  without capture": packed_without_capture,
    BATCH_1: batch_1,
    "padded buckets": padded_buckets,
    "SDPA packing mask": packing_mask,
    DENSE: dense_blocks,
    "naive hidden_states script": naive_script,
}


class Child:
    """A process in another environment, which answers each line with the seconds that a run took."""

    def __init__(self, command: list[str], log: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}  # ours, not theirs
        self._log = log.open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.versions = self._answer()

    def _answer(self) -> dict:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"A process failed:\n{Path(self._log.name).read_text()[-2000:]}")
        return json.loads(line)

    def seconds(self, work: str = "run") -> tuple[float, float]:
        """Wall and CPU seconds of a run."""
        assert self._process.stdin
        self._process.stdin.write(f"{work}\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["wall"], answer["cpu"]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def saelens(python: str, kind: str, task: Task, folder: Path, threads: int) -> Child:
    """SAELens' cache runner over the same tokens in blocks."""
    np.save(folder / "tokens.npy", np.concatenate(task.instances))
    script = str(Path(__file__).with_name("saelens_cache.py"))
    numbers = [str(task.layer), str(BLOCK), str(threads)]
    return Child([python, script, kind, str(task.model), str(folder / "tokens.npy"), *numbers], folder / "saelens.log")


def vllm(python: str, task: Task, folder: Path) -> Child:
    """vLLM over the same instances, with and without capture; its threads are set by its environment."""
    np.savez(folder / "instances.npz", *task.instances)
    script = str(Path(__file__).with_name("vllm_cache.py"))
    command = [python, script, str(task.model), str(folder / "instances.npz"), str(task.layer)]
    return Child(command, folder / "vllm.log")
