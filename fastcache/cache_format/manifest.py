"""manifest.json and parts.jsonl: what a cache is, and which parts of it exist.

A part exists when its line stands in the log; each line is `<crc32c in hex> <canonical JSON>`. A torn last line is
what a crash leaves and is cut off by the next writer; a bad line anywhere else is corruption.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import orjson
from crc32c import crc32c

from fastcache.cache_format.schema import FORMAT_NAME, FORMAT_VERSION, LOG_FILE, MANIFEST_FILE, STORED_DTYPES, layer_of
from fastcache.cache_format.storage import Storage
from fastcache.errors import FormatError, InputError, IntegrityError
from fastcache.files import canonical_json, parse_json, readable_json

MAX_ROWS = 2**48
STATES = ("writing", "complete")


@dataclass(frozen=True)
class PartRecord:
    """One committed part: its place in the log and what it holds."""

    index: int
    n_tokens: int
    n_instances: int
    ledger: dict[str, Any]
    files: dict[str, list[int]]
    """Path inside the part -> [size in bytes, crc32c]."""

    @property
    def name(self) -> str:
        """Name of the part's folder."""
        return f"{self.index:08d}"

    def to_json(self) -> dict[str, Any]:
        """The JSON object of a log line."""
        return {
            "part": self.index,
            "n_tokens": self.n_tokens,
            "n_instances": self.n_instances,
            "ledger": self.ledger,
            "files": self.files,
        }


@dataclass
class Manifest:
    """What a cache is. `identity` decides whether work may be resumed; the rest describes."""

    identity: dict[str, Any]
    state: str = "writing"
    parity: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[int]] = field(default_factory=dict)
    """The metadata files above the parts -> [size in bytes, crc32c]."""

    @property
    def hook_points(self) -> list[str]:
        """The captured hook points, by layer."""
        return list(self.identity["hook_points"])

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return int(self.identity["d_in"])

    @property
    def dtype(self) -> str:
        """Logical dtype of the stored residuals."""
        return str(self.identity["dtype"])

    def to_bytes(self) -> bytes:
        """The file, which ends with a checksum of everything else in it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **fields}
        return readable_json({**content, "checksum": _checksum(content)})

    def save(self, storage: Storage) -> None:
        """Write manifest.json atomically."""
        storage.write(MANIFEST_FILE, self.to_bytes())


def _checksum(content: dict[str, Any]) -> str:
    return f"{crc32c(canonical_json(content).encode()):08x}"


def load_manifest(storage: Storage) -> Manifest:
    """Read and check manifest.json; raises `FormatError` for other formats, other major versions, wrong types."""
    root, path = storage.url, f"{storage.url}/{MANIFEST_FILE}"
    try:
        raw = parse_json(storage.read(MANIFEST_FILE), path)
    except FileNotFoundError as error:
        raise FormatError(
            f"{root} is not a fastcache cache: it has no {MANIFEST_FILE}. Give the --out of an extract run."
        ) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT_NAME or not isinstance(raw.get("format_version"), str):
        raise FormatError(f"{path} is not the manifest of a fastcache cache.")
    version = raw["format_version"]
    if not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", version):
        raise FormatError(f"{path}: {version!r} is not a format version.")
    major, minor = map(int, version.split("."))
    if major != int(FORMAT_VERSION.split(".")[0]):
        raise FormatError(
            f"{root} has cache format {version}; this fastcache reads {FORMAT_VERSION.split('.')[0]}.x. "
            "Use a fastcache of that version, or extract the cache again."
        )
    checksum = raw.pop("checksum", None)
    if checksum != _checksum(raw) and minor > 0:  # 1.0 had none
        raise IntegrityError(f"{path} differs from its checksum. Restore the file, or extract the cache again.")
    known = Manifest.__dataclass_fields__
    fields = {name: raw[name] for name in known if name in raw}  # a newer minor version may add names
    for name, value in fields.items():
        if not isinstance(value, str if name == "state" else dict):
            raise FormatError(f"{path}: {name} has the wrong type, {type(value).__name__}.")
    if fields.get("state", "writing") not in STATES:
        raise FormatError(f"{path}: state {fields['state']!r} is not one of {', '.join(STATES)}.")
    _check_identity(fields.get("identity", {}), path)
    _check_files(fields.get("files", {}), path)
    return Manifest(**fields)


def _check_identity(identity: dict[str, Any], path: str) -> None:
    hooks, d_in = identity.get("hook_points"), identity.get("d_in")
    if not isinstance(hooks, list) or not hooks or not all(isinstance(hook, str) for hook in hooks):
        raise FormatError(f"{path}: identity.hook_points should list at least one hook point, found {hooks!r}.")
    try:
        layers = [layer_of(hook) for hook in hooks]
    except InputError as error:
        raise FormatError(f"{path}: identity.hook_points: {error}") from error
    if len(set(layers)) != len(layers):
        raise FormatError(f"{path}: identity.hook_points names a layer twice: {', '.join(hooks)}.")
    if type(d_in) is not int or not 0 < d_in <= 2**20:
        raise FormatError(f"{path}: identity.d_in should be a width between 1 and 2^20, found {d_in!r}.")
    if identity.get("dtype") not in list(STORED_DTYPES):
        raise FormatError(f"{path}: identity.dtype {identity.get('dtype')!r} is not one of {', '.join(STORED_DTYPES)}.")


def _count(raw: dict[str, Any], key: str, where: str) -> int:
    value = raw.get(key)
    if type(value) is not int or not 0 <= value <= MAX_ROWS:
        raise FormatError(f"{where}: {key} should be a count, found {value!r}.")
    return value


def _check_files(files: Any, where: str) -> dict[str, list[int]]:
    if not isinstance(files, dict):
        raise FormatError(f"{where}: files should be an object.")
    for name, entry in files.items():
        if not _is_inside(name):
            raise FormatError(f"{where}: {name!r} is not a path inside the part.")
        if type(entry) is not list or len(entry) != 2 or type(entry[0]) is not int or type(entry[1]) is not int:
            raise FormatError(f"{where}: {name!r} should have [size, crc32c], found {entry!r}.")
    return files


@lru_cache(10_000)
def _is_inside(name: str) -> bool:
    """Whether a path can't leave its folder; every part has the same few."""
    return not any(part in ("", ".", "..") for part in name.split("/")) and not {"\\", "\0"} & set(name)


def _parse_canonical(text: bytes, where: str) -> Any:
    """Strict JSON, quickly where it is canonical: what is written again as it was has no key twice and no NaN."""
    try:
        value = orjson.loads(text)
        if orjson.dumps(value, option=orjson.OPT_SORT_KEYS) == text:
            return value
    except (ValueError, TypeError):
        pass  # the strict reader says what is wrong
    return parse_json(text, where)


def _parse_record(text: bytes, where: str) -> PartRecord:
    raw = _parse_canonical(text, where)
    if not isinstance(raw, dict) or not isinstance(raw.get("ledger"), dict):
        raise FormatError(f"{where} is not the record of a part.")
    counts = (_count(raw, "part", where), _count(raw, "n_tokens", where), _count(raw, "n_instances", where))
    return PartRecord(*counts, raw["ledger"], _check_files(raw.get("files"), where))


def _split_log(data: bytes) -> tuple[list[PartRecord], int]:
    """The records of a log, and the length of its good beginning."""
    records: list[PartRecord] = []
    position = 0
    while position < len(data):
        end = data.find(b"\n", position)
        if end < 0:
            break
        checksum, _, text = data[position:end].partition(b" ")
        where = f"{LOG_FILE} line {len(records) + 1}"
        if checksum != b"%08x" % crc32c(text):
            if end + 1 == len(data):
                break
            raise IntegrityError(f"{where} differs from its checksum. Restore the file, or extract the cache again.")
        records.append(_parse_record(text, where))
        position = end + 1
    return records, position


class Log:
    """parts.jsonl: its good lines, and the end at which the next one is written."""

    def __init__(self, storage: Storage) -> None:
        """Raises on a bad line (other than a torn last one) and on a part that is logged twice."""
        self._storage = storage
        try:
            data = storage.read(LOG_FILE)
        except FileNotFoundError:
            data = b""
        records, length = _split_log(data)
        self.is_torn = length < len(data)
        self._good = data[:length]
        self.records = sorted(records, key=lambda record: record.index)
        """By part."""
        for before, after in pairwise(self.records):
            if before.index == after.index:
                raise FormatError(f"{storage.url}/{LOG_FILE}: part {after.index} is listed twice.")

    def append(self, record: PartRecord) -> None:
        """Add a line, durably, in the place of a torn one; now the part exists."""
        text = _line(record)
        self._storage.append(LOG_FILE, self._good, text)
        self._good += text
        self.records.append(record)

    def replace(self, record: PartRecord) -> None:
        """Write the line of a part anew, in the same place, after a repair."""
        lines = self._good.splitlines(keepends=True)
        kept = [_line(record) if _parse_line(line).index == record.index else line for line in lines]
        self._good = b"".join(kept)
        self._storage.write(LOG_FILE, self._good)
        self.records = [record if one.index == record.index else one for one in self.records]


def _line(record: PartRecord) -> bytes:
    text = canonical_json(record.to_json()).encode()
    return b"%08x %s\n" % (crc32c(text), text)


def _parse_line(line: bytes) -> PartRecord:
    return _parse_record(line[9:], LOG_FILE)
