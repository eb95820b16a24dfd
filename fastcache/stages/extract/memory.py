"""How much memory an extraction will take, and how much there is.

The estimate adds up what is alive at the peak: the process as it stands, the weights up to the deepest captured layer,
one pack's activations, the residuals on their way, and the writer's queue. The parity check, which holds a whole float32
model besides, is a phase of its own; where that model doesn't fit, the check reads one layer of it after another.
"""

from dataclasses import dataclass
from typing import Any

from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.schema import layer_of
from fastcache.cache_format.writer import QUEUE_BYTES
from fastcache.llm.backend import default_pack_tokens
from fastcache.llm.model_files import setting
from fastcache.llm.parity import spread
from fastcache.llm.sizes import count_by_layer, count_parameters
from fastcache.llm.transformers_backend import DTYPES
from fastcache.llm.vllm_backend.backend import arena_rows
from fastcache.memory import free_memory, process_bytes
from fastcache.stages.extract.model_use import ModelUse

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
    reference_by_layer: bool = False
    """Whether the parity check reads its model one layer at a time, since the whole one doesn't fit. Figures are the same."""


def queue_bytes(use: ModelUse, sample: list[Instance]) -> int:
    """Bound of the writer's queue: a few packs, so that it stays small beside the model."""
    pack = pack_tokens(use, sample) * use.llm_config.hidden_size * 4 * len(use.hook_points)
    return min(QUEUE_BYTES, QUEUE_PACKS * pack)


def pack_tokens(use: ModelUse, sample: list[Instance]) -> int:
    """Tokens that go through the model together, at most: a pack, or one sequence that is longer."""
    given = use.config.pack_tokens
    if given is None:
        given = default_pack_tokens(use.backend, use.device)
    return max(given, *(len(instance.token_ids) for instance in sample))


def estimate_memory(use: ModelUse, sample: list[Instance]) -> Needs:
    """Peak over the phases of a run: parity check, loading, computing."""
    needs, free = _needs(use, sample, by_layer=False), free_memory()
    if use.n_checked and free is not None and needs.total - process_bytes() > free:
        smaller = _needs(use, sample, by_layer=True)
        return smaller if smaller.total < needs.total else needs
    return needs


def _needs(use: ModelUse, sample: list[Instance], by_layer: bool) -> Needs:
    tokens, itemsize = pack_tokens(use, sample), DTYPES[use.model_dtype].itemsize
    n_parameters = count_parameters(use.source, layer_of(use.hook_points[-1]) + 1)
    here = process_bytes()  # with the model's code, which has been imported to count
    weights = n_parameters * itemsize
    row_values = use.llm_config.hidden_size * len(use.hook_points)
    work = activations(use.llm_config, tokens, itemsize)
    on_host = any(device.startswith("cpu") for device in use.devices)
    resident = LOADING + (weights if on_host else 0)
    loading = LOADING + weights + _mapped(use.llm_config, n_parameters, itemsize)
    running = (
        resident + PACKS_AHEAD * tokens * row_values * 4 + queue_bytes(use, sample) // 2 + (work if on_host else 0)
    )
    first = max(loading, resident + _parity_bytes(use, sample, by_layer)) if use.n_checked else 0
    if use.n_workers == 1:
        worker = total = here + max(first, loading, running)
    else:
        worker = WORKER + max(loading, running)
        total = here + max(first, use.n_workers * worker)
    on_device = CUDA_CONTEXT + weights + work + 2 * tokens * row_values * itemsize
    if use.backend == "vllm":  # its two processes more; on a GPU it takes what it is allowed to, and says so itself
        arena = arena_rows(tokens, use.longest) * row_values * itemsize
        worker, total = (bytes_ + max(1, use.n_workers) * (2 * WORKER + arena) for bytes_ in (worker, total))
        return Needs(worker, total, {}, by_layer)
    turns = [use.devices[number % len(use.devices)] for number in range(use.n_workers)]
    on_devices = {gpu: turns.count(gpu) * on_device for gpu in turns if gpu.startswith("cuda")}
    return Needs(worker, total, on_devices, by_layer)


def _mapped(llm_config: Any, n_parameters: int, itemsize: int) -> int:
    """Bytes of the model's files that are mapped while they are made into another dtype."""
    stored = getattr(getattr(llm_config, "dtype", None), "itemsize", 4)
    return n_parameters * stored if stored != itemsize else 0


def activations(llm_config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of what a decoder layer holds at its peak, in the MLP: gate, up and their product, and the stream itself.

    Soft-capped attention holds the logits of a sequence besides.
    """
    d_in, width = llm_config.hidden_size, mlp_width(llm_config)
    logits = 0
    if getattr(llm_config, "attn_logit_softcapping", None):
        logits = 2 * llm_config.num_attention_heads * tokens**2
    return itemsize * (tokens * (3 * width + 5 * d_in) + logits)


def mlp_width(llm_config: Any) -> int:
    """Width of the widest MLP; some configurations give one for each layer."""
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        width = setting(llm_config, name)
        if isinstance(width, (list, tuple)):
            width = max((int(each) for each in width), default=0)
        if width:
            return int(width)
    return 4 * int(llm_config.hidden_size)


def _parity_bytes(use: ModelUse, sample: list[Instance], by_layer: bool) -> int:
    """The float32 model on the host, whole or the larger part of it, and what it computes with.

    By layer, all sequences are under way at once, and each holds its residual stream at the hook points besides.
    """
    lengths = [len(instance.token_ids) for instance in sample]
    checked = [lengths[index] for index in spread(lengths, use.n_checked)]
    computing = activations(use.llm_config, max(checked), 4)
    n_rows = sum(checked) * (2 + len(use.hook_points)) if by_layer else max(checked) * (1 + len(use.hook_points))
    n_parameters = sum(count_by_layer(use.source)) if by_layer else count_parameters(use.source, None)
    states = 4 * n_rows * use.llm_config.hidden_size
    return n_parameters * 4 + max(_mapped(use.llm_config, n_parameters, 4), states + computing)
