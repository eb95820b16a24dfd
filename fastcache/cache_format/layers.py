"""Adding hook points to a cache: their arrays join the parts that are there, and nothing else changes.

A hook point exists when the manifest lists it. Before that, its arrays may lie in parts, and stand in their lines of the
log, without meaning anything; so a crash at any moment leaves a cache with the old hook points, or with all.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcache.cache_format.manifest import Log, Manifest, PartRecord, load_manifest
from fastcache.cache_format.part_writer import ArraysBuilder, Instance
from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import PARTS_FOLDER, hook_of_file, layer_of
from fastcache.cache_format.storage import Storage
from fastcache.cache_format.writer import QUEUE_BYTES, PartSink, storage_errors


class LayerSink(PartSink):
    """Where a worker process writes arrays into parts that exist; its manifest lists the new hook points only."""

    def builder(self, folder: Path, instances: Sequence[Instance]) -> ArraysBuilder:
        """See `PartSink`; no tokens, which the part has."""
        return ArraysBuilder(folder, instances, self.manifest)

    def put(self, folder: Path, record: PartRecord) -> None:
        """See `PartSink`; array by array."""
        for array in sorted(folder.iterdir()):
            self.storage.publish(array, f"{PARTS_FOLDER}/{record.name}/{array.name}")
        shutil.rmtree(folder, ignore_errors=True)


class LayerWriter(LayerSink):
    """A complete cache that gets more hook points, or goes on getting them."""

    def __init__(self, storage: Storage, hook_points: Sequence[str], queue_bytes: int = QUEUE_BYTES) -> None:
        self.url = storage.url
        with storage_errors(self.url):
            self.whole = load_manifest(storage)
            self.whole.require_writable(self.url)
            storage.clear_workspaces()
            self._log = Log(storage)
        super().__init__(storage, Manifest({**self.whole.identity, "hook_points": list(hook_points)}), queue_bytes)
        self._records = {record.index: record for record in self._log.records}
        self.logged: dict[int, PartRecord] = {}
        """None: what parts hold is read from them, so that there is nothing to compare."""
        self.committed = {
            index: record
            for index, record in self._records.items()
            if set(hook_points) <= {hook_of_file(name) for name in record.files}
        }
        """The parts that have the new arrays."""

    @property
    def n_tokens(self) -> int:
        """Rows of all parts."""
        return sum(record.n_tokens for record in self._records.values())

    def log_part(self, record: PartRecord) -> None:
        """Add the files of the new arrays to the part's line."""
        old = self._records[record.index]
        others = {
            name: entry for name, entry in old.files.items() if hook_of_file(name) not in self.manifest.hook_points
        }
        merged = replace(old, files=others | record.files)
        self._log.replace(merged)
        self.committed[record.index] = merged

    def finish(self, parity: dict[str, Any]) -> None:
        """List the new hook points in the manifest, with their figures: now they exist."""
        manifest, cache = self.whole, Cache(self.storage)
        hooks = sorted({*manifest.hook_points, *self.manifest.hook_points}, key=layer_of)
        manifest.statistics |= {hook: cache.summary(hook) for hook in self.manifest.hook_points}
        manifest.identity = {**manifest.identity, "hook_points": hooks}
        manifest.totals["n_bytes"] = sum(part.record.n_bytes(hooks) for part in cache.parts)
        manifest.parity = parity
        with storage_errors(self.url):
            manifest.save(self.storage)
