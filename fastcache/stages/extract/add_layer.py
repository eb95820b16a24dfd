"""Adding layers to a cache: the tokens that it holds go through its model again, unit by unit.

Sequences, order and units are those of the cache, so neither corpus nor tokenizer is asked, and the cache becomes what
`extract` with all layers at once would have made. Killed at any moment, the same command goes on; until it ends, the cache
is one of the old layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastcache.cache_format.layers import LayerSink, LayerWriter
from fastcache.cache_format.manifest import Log, Manifest, load_manifest
from fastcache.cache_format.part import Part
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import STORED_DTYPES, hook_point, layer_of
from fastcache.cache_format.storage import Storage, open_storage
from fastcache.config import as_dict, differences, from_mapping
from fastcache.devices import choose_device
from fastcache.errors import InputError, MismatchError, ModelError, NonFiniteError
from fastcache.files import readable_json
from fastcache.llm.loading import ModelSource, check_layers, load_config, model_identity
from fastcache.progress import Progress
from fastcache.rundir import RUN_FILE
from fastcache.stages.extract.compute import Worker, compute_by_crew, compute_here
from fastcache.stages.extract.config import AddLayerConfig, ExtractConfig
from fastcache.stages.extract.memory import estimate_memory, queue_bytes
from fastcache.stages.extract.output import cache_output, run_of
from fastcache.stages.extract.plan import TOKEN_BYTES, Plan, announce, announce_time
from fastcache.stages.extract.run import SAMPLE, begun, parity_figures
from fastcache.stages.extract.sequences import Unit
from fastcache.stages.extract.status import STATUS_FILE, Status


@dataclass
class Addition:
    """What is computed, and by whom; for the plan and the parity check it is what a `Job` is."""

    config: ExtractConfig
    source: ModelSource
    llm_config: Any
    hook_points: list[str]
    """The new ones, by layer."""
    model_dtype: str

    def __post_init__(self) -> None:
        self.device = choose_device(self.config.device)
        self.devices = tuple(map(choose_device, self.config.devices)) or (self.device,)
        self.n_workers = self.config.workers or len(self.devices)

    def worker(self, storage: Storage, manifest: Manifest, queue: int) -> Worker:
        """What computes the new arrays."""
        hooks, pack_tokens = tuple(self.hook_points), self.config.pack_tokens
        identity = {**manifest.identity, "hook_points": self.hook_points}
        source, dtype = self.source, self.model_dtype
        return Worker(
            storage.url, identity, source, hooks, dtype, self.devices, False, pack_tokens, queue, sink=LayerSink
        )


def add_layers(root: Path | str, given: AddLayerConfig, progress: Progress, force: bool = False) -> Cache:
    """Add the residual stream after the layers of `given` to the cache at `root`; returns the cache opened.

    Raises `InputError` for layers that the cache has or the model hasn't, and for a cache that isn't complete,
    `MismatchError` for another model than the cache's, `NonFiniteError`, `SpaceError`.
    """
    run = run_of(open_storage(root))
    with cache_output(root, run["settings"], fresh=False) as storage:
        manifest = load_manifest(storage)
        config = from_mapping(ExtractConfig, run["settings"], RUN_FILE)
        hooks = [hook_point(layer) for layer in sorted(set(given.add_layer))]
        if _is_added(manifest, config, hooks):  # killed between manifest and run.json
            _note_layers(storage, run, manifest)
            return Cache(storage)
        _require_addable(storage, manifest, hooks)
        addition = _addition(config, given, manifest, hooks)
        _add(storage, addition, manifest, progress, force)
        _note_layers(storage, run, load_manifest(storage))
        return Cache(storage)


def _is_added(manifest: Manifest, config: ExtractConfig, hooks: list[str]) -> bool:
    noted = {hook_point(layer) for layer in config.layer}
    return set(hooks) <= set(manifest.hook_points) and noted != set(manifest.hook_points)


def _note_layers(storage: Storage, run: dict[str, Any], manifest: Manifest) -> None:
    """Have run.json name all layers, so that `extract` and `repair` know the cache as it is now."""
    layers = [layer_of(hook) for hook in manifest.hook_points]
    storage.write(RUN_FILE, readable_json({**run, "settings": {**run["settings"], "layer": layers}}))


def _require_addable(storage: Storage, manifest: Manifest, hooks: list[str]) -> None:
    """Raise `InputError` unless the cache is complete and has none of these hook points."""
    if manifest.state != "complete":
        raise InputError(
            f"{storage.url} is not complete: run its `fastcache extract` command again to finish it, then add layers."
        )
    if known := [hook for hook in hooks if hook in manifest.hook_points]:
        raise InputError(
            f"--add-layer {layer_of(known[0])}: {storage.url} has this layer already; "
            f"it holds {', '.join(manifest.hook_points)}. Nothing was computed."
        )


def _addition(config: ExtractConfig, given: AddLayerConfig, manifest: Manifest, hooks: list[str]) -> Addition:
    """What is to be done, with the model of the cache; raises `MismatchError` if that has changed."""
    source = ModelSource(config.model, config.revision, config.trust_remote_code)
    llm_config = load_config(source)
    check_layers(llm_config, hooks, source, "--add-layer")
    if found := differences(manifest.identity["model"], model_identity(source, llm_config), "model"):
        raise MismatchError(
            f"{config.model!r} is not the model that the cache was made with ({'; '.join(found)}); nothing was computed. "
            "Put that model in its place, or extract a new cache."
        )
    chosen = {name: value for name, value in as_dict(given).items() if name != "add_layer" and value not in (None, [])}
    config = from_mapping(ExtractConfig, {**as_dict(config), **chosen}, "options")
    return Addition(config, source, llm_config, hooks, str(manifest.identity["model_dtype"]))


def _add(storage: Storage, addition: Addition, manifest: Manifest, progress: Progress, force: bool) -> None:
    """Compute the arrays that are missing, then list the new hook points."""
    sample = list(islice((instance for unit in _units(storage, manifest) for instance in unit.instances), SAMPLE))
    queue = queue_bytes(addition, sample)
    with LayerWriter(storage, addition.hook_points, queue) as writer:
        plan = _plan(writer, addition, sample)
        announce(plan, addition, Path(storage.url) if "://" not in storage.url else storage.url, progress, force)
        worker = addition.worker(storage, manifest, queue)
        backend = begun(worker, progress) if addition.n_workers == 1 else None
        parity = manifest.parity
        if addition.config.parity:
            checked = backend or begun(worker, progress)
            parity = _with_figures(parity, parity_figures(addition, sample, checked, progress))
            announce_time(plan, addition, checked, sample, progress)
            del checked
        path = Path(storage.url) / STATUS_FILE if "://" not in storage.url else None
        with progress.task("add layer", plan.expected_tokens, "tokens") as task, _explained(addition, storage):
            status = Status(task, progress, plan.expected_tokens, plan.row_bytes, path)
            units = _units(storage, manifest)
            if backend is not None:
                failed = compute_here(units, writer, backend, False, status)
            else:
                failed = compute_by_crew(units, writer, worker, addition.n_workers, status)
            status.state = "computed"
            status.write()
        if failed:
            unit, reason = next(iter(failed.items()))
            raise ModelError(
                f"Unit {unit} failed three times ({reason}), so the layer can't be added yet. The cache is what it was; "
                "the same command goes on with the units that are missing."
            )
        writer.finish(parity)


def _plan(writer: LayerWriter, addition: Addition, sample: list[Instance]) -> Plan:
    """Tokens are known, and none is rendered."""
    tokens = writer.n_tokens
    left = tokens - sum(record.n_tokens for record in writer.committed.values())
    itemsize = np.dtype(STORED_DTYPES[writer.manifest.dtype]).itemsize
    row_bytes = itemsize * writer.manifest.d_in * len(addition.hook_points)
    needs = estimate_memory(addition, sample)
    return Plan(tokens, left, row_bytes, left * (row_bytes + TOKEN_BYTES), needs, float("inf"))


def _units(storage: Storage, manifest: Manifest) -> Iterator[Unit]:
    """The cache's own sequences, by part; a part is let go of before the next one is read."""
    for record in Log(storage).records:
        tokens = Part(storage, record, manifest).tokens
        bounds = tokens["instance_offsets"].tolist()
        instances = [
            Instance(row, tokens["token_ids"][start:stop], tokens["token_types"][start:stop], ())
            for row, start, stop in zip(tokens["instance_ids"].tolist(), bounds[:-1], bounds[1:], strict=True)
        ]
        yield Unit(record.index, instances, [], record.n_tokens)


def _with_figures(parity: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The manifest's parity figures with those of the new hook points."""
    if not parity:
        return found
    new = found["hook_points"]
    if found["lengths"] != parity["lengths"]:
        new = {hook: {**figures, "lengths": found["lengths"]} for hook, figures in new.items()}
    return {**parity, "hook_points": {**parity["hook_points"], **new}}


@contextmanager
def _explained(addition: Addition, storage: Storage) -> Iterator[None]:
    """Says of NaN what it means here: the dialogue can't be left out, for the cache holds it."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{str(error).partition('. ')[0]}. {storage.url} holds this dialogue at its other layers, so it can't be "
            f"left out, and {', '.join(addition.hook_points)} can't be added. The cache is what it was."
        ) from error
