"""manifest.json and parts.jsonl: what a cache is, and which parts of it exist.

A part exists when its line stands in the log; each line is `<crc32c in hex> <canonical JSON>`. A torn last line is
what a crash leaves and is cut off by the next writer; a bad line anywhere else is corruption.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
from crc32c import crc32c

from fastcache.cache_format.schema import (
    FORMAT_NAME,
    FORMAT_VERSION,
    LOG_FILE,
    MANIFEST_FILE,
    STORED_DTYPES,
    hook_of_file,
    layer_of,
)
from fastcache.cache_format.storage import Storage
from fastcache.cache_format.unit_array import RESTORE
from fastcache.errors import FormatError, InputError, IntegrityError
from fastcache.files import canonical_json, check_depth, parse_json, readable_json

MAX_ROWS, MAX_BYTES = 2**48, 2**62
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

    def n_bytes(self, hook_points: Sequence[str]) -> int:
        """Bytes of its files, but for arrays of hook points other than these: of layers that are being added."""
        known = {None, *hook_points}
        return sum(size for name, (size, _) in self.files.items() if hook_of_file(name) in known)

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
    format_version: str = FORMAT_VERSION
    failed: dict[str, str] = field(default_factory=dict)
    """Units that were given up -> why. Their rows are `failed` in the ledger."""
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

    def unchecked(self, hook_points: Sequence[str] | None = None) -> str:
        """A sentence that names those of the hook points (None: all) whose values were never compared with the plain model.

        Empty if all were compared.
        """
        checked = self.parity.get("hook_points") or {}
        names = [hook for hook in (self.hook_points if hook_points is None else hook_points) if hook not in checked]
        if not names:
            return ""
        model = self.identity.get("model")
        is_quantised = isinstance(model, dict) and "quantisation" in model
        why = "its model is quantised, and there is no plain one" if is_quantised else "it ran with --parity 0"
        return f"The values at {', '.join(names)} were never compared with the plain model: {why}."

    def to_bytes(self) -> bytes:
        """The file, which ends with a checksum of everything else in it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content = {"format": FORMAT_NAME, **fields}
        return readable_json({**content, "checksum": _checksum(content)})

    def save(self, storage: Storage) -> None:
        """Write manifest.json atomically."""
        storage.write(MANIFEST_FILE, self.to_bytes())

    def require_writable(self, url: str) -> None:
        """Raise `FormatError` for a newer minor version: to save its manifest would drop what this version doesn't know."""
        if _minor(self.format_version) > _minor(FORMAT_VERSION):
            raise FormatError(
                f"{url} has cache format {self.format_version}; this fastcache reads it but writes {FORMAT_VERSION}. "
                "Use the fastcache that began it, or choose another --out."
            )


def _minor(version: str) -> int:
    return int(version.partition(".")[2])


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
    if checksum != _checksum(raw) and (minor > 0 or checksum is not None):  # 1.0 had none
        raise IntegrityError(
            f"{path} differs from its checksum. Restore the file from a copy, or extract the cache again with --fresh: "
            "it can't be computed from the rest."
        )
    known = Manifest.__dataclass_fields__
    fields = {name: raw[name] for name in known if name in raw}  # a newer minor version may add names
    for name, value in fields.items():
        if not isinstance(value, str if name in ("state", "format_version") else dict):
            raise FormatError(f"{path}: {name} has the wrong type, {type(value).__name__}.")
    if fields.get("state", "writing") not in STATES:
        raise FormatError(f"{path}: state {fields['state']!r} is not one of {', '.join(STATES)}.")
    _check_identity(fields.get("identity", {}), path)
    _check_files(fields.get("files", {}), path)
    for unit, reason in fields.get("failed", {}).items():
        if not re.fullmatch(r"[0-9]{1,15}", unit) or not isinstance(reason, str):
            raise FormatError(f"{path}: failed should map numbers of units to reasons, found {unit!r}.")
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
        if not 0 <= entry[0] <= MAX_BYTES or not 0 <= entry[1] < 2**32:
            raise FormatError(f"{where}: {name!r} should have a size and a crc32c, found {entry!r}.")
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
            check_depth(value)
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


class ParsedLog(NamedTuple):
    """The lines of a log, good and bad."""

    good: list[tuple[bytes, PartRecord]]
    """In their order in the file."""
    bad: list[FormatError | IntegrityError]
    """What is wrong with each line that is corrupt."""
    is_torn: bool
    """Whether something follows that a crash may have left."""


def parse_log(data: bytes) -> ParsedLog:
    """Read every line. Never raises; what to do about bad lines is for the caller to say."""
    good: list[tuple[bytes, PartRecord]] = []
    bad: list[FormatError | IntegrityError] = []
    known: set[int] = set()
    *lines, rest = data.split(b"\n")
    is_torn = bool(rest)
    for number, line in enumerate(lines, 1):
        checksum, _, text = line.partition(b" ")
        where = f"{LOG_FILE} line {number}"
        if checksum != b"%08x" % crc32c(text):
            if number == len(lines) and not rest:
                is_torn = True
            else:
                bad.append(IntegrityError(f"{where} differs from its checksum. {RESTORE}"))
            continue
        try:
            record = _parse_record(text, where)
        except FormatError as error:
            bad.append(error)
            continue
        if record.index in known:
            bad.append(FormatError(f"{where}: part {record.index} is listed twice. {RESTORE}"))
            continue
        known.add(record.index)
        good.append((line + b"\n", record))
    return ParsedLog(good, bad, is_torn)


def read_log(storage: Storage) -> bytes:
    """The bytes of the log; a missing one is empty."""
    try:
        return storage.read(LOG_FILE)
    except FileNotFoundError:
        return b""


class Log:
    """parts.jsonl: its good lines, and the end at which the next one is written."""

    def __init__(self, storage: Storage, *, salvage: bool = False) -> None:
        """Raises on a bad line (other than a torn last one); with `salvage` bad lines are left out."""
        self._storage = storage
        parsed = parse_log(read_log(storage))
        if parsed.bad and not salvage:
            raise parsed.bad[0]
        self.is_torn = parsed.is_torn
        self._good = bytearray().join(line for line, _ in parsed.good)  # grows in place; `bytes` would be copied
        self.records = sorted((record for _, record in parsed.good), key=lambda record: record.index)
        """By part."""

    def append(self, record: PartRecord) -> None:
        """Add a line, durably, in the place of a torn one; now the part exists."""
        text = _line(record)
        self._storage.append(LOG_FILE, self._good, text)
        self._good += text
        self.records.append(record)

    def replace(self, record: PartRecord) -> None:
        """After a repair: write the line of a part in the place of its old one, or if that is lost, by its index."""
        lines = parse_log(bytes(self._good)).good
        indices = [one.index for _, one in lines]
        if record.index in indices:
            lines[indices.index(record.index)] = (_line(record), record)
        else:
            lines.insert(sum(index < record.index for index in indices), (_line(record), record))
        self._good = bytearray().join(line for line, _ in lines)
        self.rewrite()
        self.records = sorted((one for _, one in lines), key=lambda one: one.index)

    def rewrite(self) -> None:
        """Put the good lines in the place of the file."""
        self._storage.write(LOG_FILE, bytes(self._good))


def _line(record: PartRecord) -> bytes:
    text = canonical_json(record.to_json()).encode()
    return b"%08x %s\n" % (crc32c(text), text)
