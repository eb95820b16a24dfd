"""Checks of one part: every file, unit and count of it, against the log, the checksums and each other.

Damage never raises here: whatever goes wrong while looking becomes a `Finding`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from fastcache.cache_format.arrays import group_metadata, join_crc32c
from fastcache.cache_format.manifest import Manifest, PartRecord
from fastcache.cache_format.part import Part
from fastcache.cache_format.quantize import int8_array
from fastcache.cache_format.schema import LOG_FILE, PARTS_FOLDER, UNIT_ROWS, hook_of_file, layer_of
from fastcache.cache_format.statistics import Moments, group_counts
from fastcache.cache_format.storage import MAX_SMALL_FILE, Storage
from fastcache.cache_format.unit_array import RESTORE, UnitArray
from fastcache.cache_format.verify_values import ledger_problems, moments_problems, token_problems
from fastcache.errors import FastcacheError
from fastcache.files import parse_json

BLOCK_BYTES = 2**20
"""Large files are read by about so much at a time, or by units: little enough to stay in a core's cache."""

ADDED = "a layer is being added, or that was broken off; `fastcache extract --add-layer {}` goes on"
"""What arrays mean that belong to no hook point of the manifest."""

Work = Callable[[], tuple[list["Finding"], "PartFacts | None", int]]
"""A piece of work: gives findings, perhaps the part's facts, and the bytes it has looked at."""


class Finding(NamedTuple):
    """Something that is wrong or, as a note, only worth a word."""

    part: int | None
    """Index of the part it belongs to; None for the files above the parts."""
    file: str
    """Path inside the cache."""
    problem: str
    is_note: bool = False

    def __str__(self) -> str:
        text = f"{self.file}: {self.problem}"
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@dataclass
class Findings:
    """What was found at one place, in the order of looking."""

    url: str
    part: int | None = None
    found: list[Finding] = field(default_factory=list)

    def add(self, file: str, problem: str) -> None:
        """Note a problem."""
        self.found.append(Finding(self.part, file, problem))

    def note(self, file: str, text: str) -> None:
        """Note something that is no damage."""
        self.found.append(Finding(self.part, file, text, is_note=True))

    def problems(self) -> list[Finding]:
        """What was found, without the notes."""
        return [finding for finding in self.found if not finding.is_note]

    @contextmanager
    def catching(self, file: str) -> Iterator[None]:
        """Whatever is raised inside becomes a finding at `file`: a check must not end at the first damage."""
        try:
            yield
        except FileNotFoundError:
            self.add(file, "is missing")
        except FastcacheError as error:
            text = str(error).removesuffix(RESTORE).removeprefix(f"{self.url}/").removeprefix(file)
            self.add(file, text.strip(" :,"))
        except OSError as error:
            self.add(file, f"can't be read ({error.strerror or error})")
        except Exception as error:  # damage that nothing of ours names
            self.add(file, f"can't be checked ({error!r})")


class RememberingStorage:
    """The files of one part: small ones are read, and compared with the log, once."""

    def __init__(self, storage: Storage) -> None:
        self.url = storage.url
        self.read_into, self.zarr_store = storage.read_into, storage.zarr_store
        self._storage = storage
        self._sizes: dict[str, int] | None = None
        self._read: dict[str, bytes] = {}

    def read(self, name: str, limit: int = MAX_SMALL_FILE) -> bytes:
        """See `Storage`."""
        if name not in self._read:
            self._read[name] = self._storage.read(name, limit)
        return self._read[name]

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Storage`."""
        if self._sizes is None:
            self._sizes = self._storage.sizes(folder)
        return self._sizes


@dataclass
class PartFacts:
    """What the figures of the whole cache are made of; None where the part is damaged."""

    type_counts: npt.NDArray[np.int64] | None = None
    instance_ids: tuple[int, int] | None = None
    """The first and the last."""
    moments: dict[str, Moments] = field(default_factory=dict)
    squared_errors: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)


class PartCheck:
    """All checks of one part, as pieces of work that threads may do in any order."""

    def __init__(self, storage: Storage, record: PartRecord, manifest: Manifest | None) -> None:
        self.record, self.folder = record, f"{PARTS_FOLDER}/{record.name}"
        self._storage = cast(Storage, RememberingStorage(storage))
        self._part = Part(self._storage, record, manifest) if manifest else None
        self._hooks = manifest.hook_points if manifest else []
        shards = tuple(f"{array}/c/" for hook in self._hooks for array in unit_array_names(hook))
        self._large = [
            name for name, (size, _) in record.files.items() if size > BLOCK_BYTES or name.startswith(shards)
        ]

    def work(self, quick: bool) -> list[Work]:
        """All that is to be done; `quick` reads no file."""
        return [self._structure] if quick else [self._structure, self._small, *map(self._one_large, self._large)]

    def _one_large(self, name: str) -> Work:
        return lambda: self._file(name)

    def _findings(self) -> Findings:
        return Findings(self._storage.url, self.record.index)

    def _there(self) -> dict[str, int]:
        """Sizes of the files that may be read: none, if there are links."""
        with self._findings().catching(self.folder):
            return self._storage.sizes(self.folder)
        return {}

    def _structure(self) -> tuple[list[Finding], None, int]:
        """Which files there are, and their sizes; the ledger, which stands in the log."""
        findings, files = self._findings(), self.record.files
        for problem in ledger_problems(self.record.ledger):
            findings.add(LOG_FILE, f"part {self.record.index}: {problem}")
        with findings.catching(self.folder):
            there = self._storage.sizes(self.folder)
            if not there:
                findings.add(self.folder, "the folder is missing or empty")
            for name, (size, _) in files.items() if there else ():
                if name not in there:
                    findings.add(f"{self.folder}/{name}", "is missing")
                elif there[name] != size:
                    findings.add(f"{self.folder}/{name}", f"has {there[name]:,} bytes, expected {size:,}")
            for name in sorted(there.keys() - files.keys()):
                if (hook := hook_of_file(name)) is None or hook in self._hooks or self._part is None:
                    findings.add(f"{self.folder}/{name}", "is not among the files that the log lists")
                else:
                    findings.note(f"{self.folder}/{name}", f"doesn't count: {ADDED.format(layer_of(hook))}")
        return findings.found, None, 0

    def _small(self) -> tuple[list[Finding], PartFacts, int]:
        """All but the shards: bytes against the log, then what they mean."""
        findings, facts, n_bytes = self._findings(), PartFacts(), 0
        there = self._there()
        for name, (size, checksum) in self.record.files.items():
            if name not in self._large and there.get(name) == size:
                n_bytes += size
                with findings.catching(f"{self.folder}/{name}"):
                    if crc32c(self._storage.read(f"{self.folder}/{name}")) != checksum:
                        findings.add(f"{self.folder}/{name}", "differs from its checksum in the log")
        whole = all(there.get(name) == size for name, (size, _) in self.record.files.items())
        if self._part is not None and whole and not findings.found:
            self._meaning(self._part, findings, facts)
        return findings.found, facts, n_bytes

    def _meaning(self, part: Part, findings: Findings, facts: PartFacts) -> None:
        with findings.catching(f"{self.folder}/zarr.json"):
            group = parse_json(self._storage.read(f"{self.folder}/zarr.json"), "")
            if not isinstance(group, dict) or {**group, "attributes": {}} != group_metadata():
                findings.add(f"{self.folder}/zarr.json", "is not the metadata of a Zarr group")
        with findings.catching(self.folder):
            types = part.tokens["token_types"]
            facts.type_counts = np.bincount(types, minlength=256).astype(np.int64)
            ids = part.tokens["instance_ids"]
            facts.instance_ids = (int(ids[0]), int(ids[-1])) if len(ids) else None
            for name, problem in token_problems(part.tokens, self.record):
                findings.add(f"{self.folder}/{name}", problem)
        for hook in self._hooks:
            with findings.catching(f"{self.folder}/{hook}"):
                facts.moments[hook] = part.moments(hook)
                if facts.type_counts is not None:
                    for problem in moments_problems(facts.moments[hook], group_counts(facts.type_counts)):
                        findings.add(f"{self.folder}/{hook}.statistics", problem)
                if (squared_error := part.squared_error(hook)) is not None:
                    facts.squared_errors[hook] = squared_error
            with findings.catching(f"{self.folder}/{hook}"):
                if not all(array.native for array in part.residual_array(hook).unit_arrays()):
                    self._each_unit(part, hook, range(-(-self.record.n_tokens // UNIT_ROWS)), findings)

    def _each_unit(self, part: Part, hook: str, units: range, findings: Findings) -> None:
        """The units of an array, one by one, as readers read them."""
        for unit in units:
            with findings.catching(f"{self.folder}/{hook}"):
                part.rows(hook, unit * UNIT_ROWS, min((unit + 1) * UNIT_ROWS, self.record.n_tokens))

    def _file(self, name: str) -> tuple[list[Finding], None, int]:
        """A large file: its bytes against the log, and if it is a shard its index and units, in one go."""
        findings, place = self._findings(), f"{self.folder}/{name}"
        size, expected = self.record.files[name]
        if self._there().get(name) != size:  # a finding of `_structure`
            return [], None, 0
        with findings.catching(place):
            units = self._units_of(name, findings)
            found, damaged = self._stream(place, size, units)
            which = f": unit {damaged[0]}" if damaged else ""
            which += f" and {len(damaged) - 1} more units" if len(damaged) > 1 else ""
            if found != expected:
                findings.add(place, f"differs from its checksum in the log{which}")
            elif damaged:
                findings.add(place, f"is what the log says, but not what the checksums of its units say{which}")
        return findings.found, None, size

    def _units_of(self, name: str, findings: Findings) -> "Units":
        """The units of a file, if it is a shard of ours; says what is wrong with its index."""
        none = Units(1, 0, [])
        array = self._array_of(name)
        if array is None:
            return none
        shards = range(-(-len(array.checksums) // array.units_per_shard)) if array.native else range(0)
        shard = next((shard for shard in shards if name == array.file(shard)), None)
        if shard is None:
            return none
        first = shard * array.units_per_shard
        checksums = array.checksums[first : first + array.units_per_shard].tolist()
        with findings.catching(f"{self.folder}/{name}"):
            offsets = array.offsets(shard)
            if (offsets != np.arange(len(offsets), dtype=np.uint64) * np.uint64(array.unit_bytes)).any():
                self._read_units(array, first, len(checksums), findings)
                return none
        return Units(array.unit_bytes, first, [(unit_size(array, first + i), crc) for i, crc in enumerate(checksums)])

    def _array_of(self, name: str) -> UnitArray | None:
        """The opened array, one of a hook point, to which the file belongs."""
        if self._part is not None:
            for hook in self._hooks:
                if name.partition("/c/")[0] in unit_array_names(hook):
                    try:
                        arrays = self._part.residual_array(hook).unit_arrays()
                    except (FastcacheError, OSError):  # a finding of `_small`
                        return None
                    return next((array for array in arrays if name.startswith(f"{array.name}/c/")), None)
        return None

    def _read_units(self, array: UnitArray, first: int, n_units: int, findings: Findings) -> None:
        """The units of a shard that has them in another order, one by one."""
        for unit in range(first, first + n_units):
            out = np.empty(unit_size(array, unit), np.uint8).view(array.dtype).reshape(-1, array.shape[1])
            with findings.catching(f"{self.folder}/{array.name}"):
                array.read_unit(unit, out)

    def _stream(self, place: str, size: int, units: "Units") -> tuple[int, list[int]]:
        """The crc32c of a file, and the numbers of the units that differ from theirs."""
        unit_bytes = units.unit_bytes
        block = max(1, BLOCK_BYTES // unit_bytes) * unit_bytes
        buffer = np.empty(min(block, size), np.uint8).data.cast("B")
        total, damaged = 0, []
        for start in range(0, size, block):
            data = buffer[: min(block, size - start)]
            self._storage.read_into(place, start, data)
            first = start // unit_bytes
            for i, (n_bytes, checksum) in enumerate(units.checksums[first : first + block // unit_bytes], first):
                unit, data = data[:unit_bytes], data[unit_bytes:]
                found = crc32c(unit[:n_bytes])
                if found != checksum:
                    damaged.append(units.first + i)
                total = join_crc32c(total, found, n_bytes)
                total = crc32c(unit[n_bytes:], total)
            total = crc32c(data, total)
        return total, damaged


class Units(NamedTuple):
    """The units of a shard, one behind the other."""

    unit_bytes: int
    first: int
    """Number, in the part, of the first."""
    checksums: list[tuple[int, int]]
    """Bytes that the checksum covers, and the crc32c, of each."""


def unit_array_names(hook: str) -> tuple[str, ...]:
    """The arrays of units that a hook point may have."""
    return (hook, int8_array(hook, "scales"), int8_array(hook, "raw"))


def unit_size(array: UnitArray, unit: int) -> int:
    """Bytes of the rows of a unit, of which the last one may be short."""
    rows = min(array.unit_rows, array.shape[0] - unit * array.unit_rows)
    return rows * (array.unit_bytes // array.unit_rows)
