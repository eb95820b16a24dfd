"""What `--source` names: files, folders, the known sets, data sets on the hub; how many rows, at which commit."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from fastcache.assets import DEMO_CHAT, DEMO_TEXT
from fastcache.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
ESTIMATE_BYTES = 4 * 2**20
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Source:
    """Where rows come from: a local file or folder, or a data set on the hub."""

    name: str
    place: str
    column: str | None = None
    config: str | None = None
    revision: str | None = None
    rows: int | None = None
    """Rows that a known set has, for the estimate of the time left."""


KNOWN = {
    "wildchat": Source("wildchat", "allenai/WildChat-1M-Full", "conversation", rows=990_372),
    "infinity-instruct": Source("infinity-instruct", "BAAI/Infinity-Instruct", "conversations", "7M", rows=7_449_106),
    "tulu-3": Source("tulu-3", "allenai/tulu-3-sft-mixture", "messages", rows=939_343),
    "orca-agentinstruct": Source(
        "orca-agentinstruct", "mlabonne/orca-agentinstruct-1M-v1-cleaned", "messages", rows=1_046_410
    ),
    "lmsys-chat": Source("lmsys-chat", "lmsys/lmsys-chat-1m", "conversation", rows=1_000_000),
    "pile": Source("pile", "monology/pile-uncopyrighted", "text"),
    "demo": Source("demo", str(DEMO_CHAT)),
    "demo-text": Source("demo-text", str(DEMO_TEXT)),
}
RECIPES = {"fast-paper": ("wildchat", "infinity-instruct", "tulu-3", "orca-agentinstruct", "lmsys-chat")}
"""The paper's mixture, in the order of its table."""


def find_source(text: str) -> Source:
    """The source that `--source text` means: a known name, NAME=PATH, a path, or a data set on the hub."""
    name, equals, place = text.partition("=")
    if equals and name in KNOWN:
        return Source(name, place, KNOWN[name].column)
    return KNOWN.get(text, Source(text, text))


def stamps(sources: Iterable[Source]) -> dict[str, list[int]]:
    """Size in bytes and time of change in ns of every local file of `sources`: tells when one has changed."""
    found = {}
    for source in sources:
        path = Path(source.place)
        for file in [path] if path.is_file() else files_below(path) if path.is_dir() else []:
            status = file.stat()
            found[str(file)] = [status.st_size, status.st_mtime_ns]
    return found


def estimate_rows(source: Source) -> int | None:
    """About how many rows a source has, or None: from Parquet's own counts, or from the beginning of a JSONL file."""
    path = Path(source.place)
    if not path.exists():
        return source.rows
    total = 0.0
    for file in [path] if path.is_file() else files_below(path):
        if file.suffix == ".parquet":
            total += _parquet_rows(file)
        elif inner_suffix(file) == ".jsonl":
            total += _jsonl_rows(file)
        else:
            return None
    return round(total)


def _parquet_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowInvalid, OSError):
        return 0  # told when it is read


def _jsonl_rows(path: Path) -> float:
    """Lines in the first bytes, scaled by how much of the file, as it is stored, they took."""
    with pa.OSFile(str(path)) as stored:
        try:
            stream = pa.CompressedInputStream(stored, COMPRESSED[path.suffix]) if path.suffix in COMPRESSED else stored
            sample = stream.read(ESTIMATE_BYTES)
        except OSError:
            return 0  # told when it is read
        return sample.count(b"\n") * path.stat().st_size / max(stored.tell(), 1)


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder` that can be read, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and inner_suffix(path) in SUFFIXES)


def inner_suffix(path: Path) -> str:
    """The suffix that tells what is in the file, whether compressed or not."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def is_on_hub(source: Source) -> bool:
    """Whether the source is a data set on the hub, and no local file or folder; raises `InputError` if it is neither."""
    path = Path(source.place)
    if path.exists():
        return False
    hub_name = source.place.count("/") <= 1 and not source.place.startswith((".", "/", "~"))
    if not hub_name or inner_suffix(path) in SUFFIXES:
        raise InputError(f"--source {source.name}: there is no such file: {path}.")
    return True


def hub_revisions(sources: Iterable[Source]) -> dict[str, str]:
    """The commit that each data set on the hub is at; raises `InputError` where the hub doesn't tell."""
    found = {}
    for source in sources:
        if is_on_hub(source):
            from huggingface_hub import HfApi

            try:
                found[source.name] = str(HfApi().dataset_info(source.place).sha)
            except Exception as error:  # of the network, of the hub, of a wrong name
                raise no_hub(source, error) from error
    return found


def no_hub(source: Source, error: Exception) -> InputError:
    """The error that says what to do about a data set that the hub didn't give."""
    reason = (str(error).splitlines() or [""])[0][:200]
    local = f"{source.name}=PATH" if source.name in KNOWN else "PATH"
    return InputError(
        f"--source {source.name}: no file of this name, and the hub could not give the data set {source.place} "
        f"({type(error).__name__}: {reason}). Check the name and the network; for a gated set, accept its terms at "
        f"https://huggingface.co/datasets/{source.place} and run `hf auth login`; for a local copy, say "
        f"--source {local}."
    )
