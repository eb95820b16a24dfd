"""How much memory an extraction will take, and how much there is.

The estimate adds up what is alive at the peak: the process as it stands, the weights up to the deepest captured layer,
one pack's activations, the residuals on their way, and the writer's queue. The parity check, which holds a whole float32
model besides, is a phase of its own.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.schema import layer_of
from fastcache.cache_format.writer import QUEUE_BYTES
from fastcache.llm.loading import count_parameters
from fastcache.llm.parity import spread
from fastcache.llm.transformers_backend import DTYPES, PACK_TOKENS

if TYPE_CHECKING:
    from fastcache.stages.extract.add_layer import Addition
    from fastcache.stages.extract.run import Job

PACKS_AHEAD = 3
"""Packs whose residuals are held at once: one being computed, one on its way to the host, one being written."""
QUEUE_PACKS = 8
"""Packs of rows that the writer's queue holds, if they are fewer bytes than `QUEUE_BYTES`."""
LOADING = 15 * 2**20
"""What stays in a process besides the weights once a model was loaded and run."""
WORKER = 430 * 2**20
"""A worker process before it loads its model: Python, torch, transformers."""
CUDA_CONTEXT = 600 * 2**20
"""What a process takes of a GPU before it puts anything there."""


@dataclass(frozen=True)
class Needs:
    """Memory in bytes at the peak."""

    worker: int
    """Of the host, for one process that holds the model."""
    total: int
    """Of the host, for all processes together."""
    devices: dict[str, int]
    """Of each GPU."""


def queue_bytes(job: "Job | Addition", sample: list[Instance]) -> int:
    """Bound of the writer's queue: a few packs, so that it stays small beside the model."""
    pack = pack_tokens(job, sample) * job.llm_config.hidden_size * 4 * len(job.hook_points)
    return min(QUEUE_BYTES, QUEUE_PACKS * pack)


def pack_tokens(job: "Job | Addition", sample: list[Instance]) -> int:
    """Tokens that go through the model together, at most: a pack, or one sequence that is longer."""
    default = PACK_TOKENS.get(job.device.partition(":")[0], 4096)
    given = default if job.config.pack_tokens is None else job.config.pack_tokens
    return max(given, *(len(instance.token_ids) for instance in sample))


def estimate_memory(job: "Job | Addition", sample: list[Instance]) -> Needs:
    """Peak over the phases of a run with the transformers backend: parity check, loading, computing."""
    tokens, itemsize = pack_tokens(job, sample), DTYPES[job.model_dtype].itemsize
    n_parameters = count_parameters(job.source, layer_of(job.hook_points[-1]) + 1)
    here = process_bytes()  # with the model's code, which has been imported to count
    weights = n_parameters * itemsize
    row_values = job.llm_config.hidden_size * len(job.hook_points)
    work = activations(job.llm_config, tokens, itemsize)
    on_host = any(device.startswith("cpu") for device in job.devices)
    resident = LOADING + (weights if on_host else 0)
    loading = LOADING + weights + _mapped(job.llm_config, n_parameters, itemsize)
    running = (
        resident + PACKS_AHEAD * tokens * row_values * 4 + queue_bytes(job, sample) // 2 + (work if on_host else 0)
    )
    first = max(loading, resident + _parity_bytes(job, sample)) if job.config.parity else 0
    if job.n_workers == 1:
        worker = total = here + max(first, loading, running)
    else:
        worker = WORKER + max(loading, running)
        total = here + max(first, job.n_workers * worker)
    on_device = CUDA_CONTEXT + weights + work + 2 * tokens * row_values * itemsize
    turns = [job.devices[number % len(job.devices)] for number in range(job.n_workers)]
    return Needs(worker, total, {gpu: turns.count(gpu) * on_device for gpu in turns if gpu.startswith("cuda")})


def _mapped(llm_config: Any, n_parameters: int, itemsize: int) -> int:
    """Bytes of the model's files that are mapped while they are made into another dtype."""
    stored = getattr(getattr(llm_config, "dtype", None), "itemsize", 4)
    return n_parameters * stored if stored != itemsize else 0


def activations(llm_config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of what a decoder layer holds at its peak, in the MLP: gate, up and their product, and the stream itself.

    Soft-capped attention holds the logits of a sequence besides.
    """
    d_in = llm_config.hidden_size
    width = getattr(llm_config, "intermediate_size", None) or getattr(llm_config, "n_inner", None) or 4 * d_in
    logits = 0
    if getattr(llm_config, "attn_logit_softcapping", None):
        logits = 2 * llm_config.num_attention_heads * tokens**2
    return itemsize * (tokens * (3 * int(width) + 5 * d_in) + logits)


def _parity_bytes(job: "Job | Addition", sample: list[Instance]) -> int:
    """The whole float32 model on the host, and all hidden states of its longest sequence."""
    lengths = [len(instance.token_ids) for instance in sample]
    longest = max(lengths[index] for index in spread(lengths, job.config.parity))
    n_parameters = count_parameters(job.source, None)
    states = 4 * longest * job.llm_config.hidden_size * (job.llm_config.num_hidden_layers + 1)
    computing = states + activations(job.llm_config, longest, 4)
    return n_parameters * 4 + max(_mapped(job.llm_config, n_parameters, 4), computing)


def process_bytes() -> int:
    """Resident memory of this process; 0 where the system doesn't tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return 0


def free_memory() -> int | None:
    """Memory that can still be had here, by the machine and by the limits of the control group; None if unknown."""
    free = []
    with suppress(OSError, AttributeError):
        found = re.search(r"MemAvailable: +([0-9]+) kB", Path("/proc/meminfo").read_text())
        free += [int(found[1]) * 1024] if found else []
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = re.search(r"^inactive_file ([0-9]+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        free.append(limit - used + (int(cached[1]) if cached else 0))
    return min(free, default=None)
