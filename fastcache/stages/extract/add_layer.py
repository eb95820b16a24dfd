"""Adding layers to a cache: the tokens that it holds go through its model again, unit by unit.

Sequences, order and units are those of the cache, so neither corpus nor tokenizer is asked, and the cache becomes what
`extract` with all layers at once would have made. Killed at any moment, the same command goes on; until it ends, the cache
is one of the old layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
from fastcache.errors import InputError, MismatchError, ModelError, NonFiniteError
from fastcache.files import readable_json
from fastcache.llm.loading import ModelSource, check_layers, load_config, model_identity, place_of
from fastcache.progress import Progress
from fastcache.rundir import RUN_FILE
from fastcache.stages.extract.compute import Worker
from fastcache.stages.extract.config import AddLayerConfig, ExtractConfig
from fastcache.stages.extract.memory import estimate_memory, queue_bytes
from fastcache.stages.extract.model_use import ModelUse
from fastcache.stages.extract.output import cache_output, run_of
from fastcache.stages.extract.plan import TOKEN_BYTES, Plan, announce
from fastcache.stages.extract.run import SAMPLE
from fastcache.stages.extract.sequences import Unit
from fastcache.stages.extract.status import STATUS_FILE
from fastcache.stages.extract.unit_run import UnitRun


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
        _add(storage, _use(config, given, manifest, hooks, root), manifest, progress, force)
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


def _use(
    config: ExtractConfig, given: AddLayerConfig, manifest: Manifest, hooks: list[str], root: Path | str
) -> ModelUse:
    """The model of the cache at the new hook points; raises `MismatchError` if that has changed."""
    source = ModelSource(config.model, config.revision, config.trust_remote_code, place_of(config.model, root))
    llm_config = load_config(source)
    check_layers(llm_config, hooks, source, "--add-layer")
    if found := differences(manifest.identity["model"], model_identity(source, llm_config), "model"):
        raise MismatchError(
            f"{config.model!r} is not the model that the cache was made with ({'; '.join(found)}); nothing was computed. "
            "Put that model in its place, or extract a new cache."
        )
    chosen = {name: value for name, value in as_dict(given).items() if name != "add_layer" and value not in (None, [])}
    identity = manifest.identity
    # As the other layers were computed: a model that ran in bfloat16 because there was a GPU must do so again.
    chosen |= {"model_dtype": identity["model_dtype"], "backend": identity.get("backend", "transformers")}
    config = from_mapping(ExtractConfig, {**as_dict(config), **chosen}, "options")
    method = identity["method"]
    return ModelUse(config, source, llm_config, hooks, int(method.get("max_length", method.get("block_size"))))


def _add(storage: Storage, use: ModelUse, manifest: Manifest, progress: Progress, force: bool) -> None:
    """Compute the arrays that are missing, then list the new hook points."""
    sample = list(islice((instance for unit in _units(storage, manifest) for instance in unit.instances), SAMPLE))
    queue = queue_bytes(use, sample)
    here = None if "://" in storage.url else Path(storage.url)
    parity = dict(manifest.parity)
    with LayerWriter(storage, use.hook_points, queue) as writer:
        plan = _plan(writer, use, sample)
        announce(plan, use, here or storage.url, progress, force)
        use.say(progress)
        identity = {**manifest.identity, "hook_points": use.hook_points}
        worker = Worker(storage.url, identity, use.plan(), False, queue, sink=LayerSink)
        run = UnitRun(use, worker, plan, sample, progress, here and here / STATUS_FILE)
        with _explained(use, storage):
            failed = run.compute(
                "add layer",
                _units(storage, manifest),
                writer,
                lambda found: parity.update(_merged(manifest.parity, found)),
            )
        if failed:
            unit, reason = next(iter(failed.items()))
            raise ModelError(
                f"Unit {unit} failed three times ({reason}), so the layer can't be added yet. The cache is what it was; "
                "the same command goes on with the units that are missing."
            )
        writer.finish(parity)


def _plan(writer: LayerWriter, use: ModelUse, sample: list[Instance]) -> Plan:
    """Tokens are known, and none is rendered."""
    tokens = writer.n_tokens
    left = tokens - sum(record.n_tokens for record in writer.committed.values())
    itemsize = np.dtype(STORED_DTYPES[writer.manifest.dtype]).itemsize
    row_bytes = itemsize * writer.manifest.d_in * len(use.hook_points)
    needs = estimate_memory(use, sample)
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


def _merged(parity: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The manifest's parity figures with those of the new hook points."""
    if not parity:
        return found
    new = found["hook_points"]
    if found["lengths"] != parity["lengths"]:
        new = {hook: {**figures, "lengths": found["lengths"]} for hook, figures in new.items()}
    return {**parity, "hook_points": {**parity["hook_points"], **new}}


@contextmanager
def _explained(use: ModelUse, storage: Storage) -> Iterator[None]:
    """Says of NaN what it means here: the dialogue can't be left out, for the cache holds it."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{str(error).partition('. ')[0]}. {storage.url} holds this dialogue at its other layers, so it can't be "
            f"left out, and {', '.join(use.hook_points)} can't be added. The cache is what it was."
        ) from error
