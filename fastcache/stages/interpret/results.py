"""What `fastcache interpret` leaves behind, for those who go on with it: judge and dashboard."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastcache.errors import FormatError, InputError
from fastcache.files import fingerprint, read_json, require_fields

ABOUT_FILE, LATENTS_FILE = "about.json", "latents.parquet"
CONTEXTS_FILE, WINDOWS_FILE = "contexts.parquet", "windows.parquet"

ROWS_TOGETHER = 4096

Row = dict[str, Any]


class Results:
    """The tables of a finished run."""

    def __init__(self, folder: Path) -> None:
        """Raises `InputError` for a folder that holds none, `FormatError` for tables that can't be read."""
        self.folder = folder
        if not (folder / LATENTS_FILE).is_file():
            raise InputError(
                f"{folder} holds no {LATENTS_FILE}: it should be the finished output of `fastcache interpret`."
            )
        self.about = read_json(folder / ABOUT_FILE)
        require_fields(self.about, {"sae": dict, "top": int, "window": int}, folder / ABOUT_FILE)
        self.d_sae: int = self.about["sae"]["d_sae"]

    @cached_property
    def fingerprint(self) -> str:
        """Of all that the tables hold."""
        names = (LATENTS_FILE, CONTEXTS_FILE, WINDOWS_FILE)
        return fingerprint([self.about, *(_sha256(self.folder / name) for name in names)])

    def latents(self, columns: Sequence[str] | None = None) -> pa.Table:
        """A line for each latent, in their order."""
        return self._read(LATENTS_FILE, columns=columns)

    def active_in_dialogues(self, count: int) -> list[int]:
        """Latents that are active in `count` different dialogues at least; raises `InputError` where fewer were kept."""
        if self.about["top"] < count:
            raise InputError(
                f"{self.folder} keeps the {self.about['top']} highest contexts of each latent, but {count} are needed. "
                f"Run `fastcache interpret` again with --top {count} or more."
            )
        wanted = [("kind", "==", "top"), ("rank", "==", count - 1)]
        return self._read(CONTEXTS_FILE, columns=["latent"], filters=wanted)["latent"].to_pylist()

    def contexts_of(self, latents: Sequence[int]) -> dict[int, list[Row]]:
        """Contexts of these latents, those of the highest activations first."""
        found: dict[int, list[Row]] = {latent: [] for latent in latents}
        for row in self._read(CONTEXTS_FILE, filters=[("latent", "in", list(latents))]).to_pylist():
            found[row["latent"]].append(row)
        return found

    def contexts(self) -> Iterator[tuple[int, list[Row]]]:
        """Latents that have any, in their order, with their contexts; a few of them are in memory at a time."""
        latent = -1
        rows: list[Row] = []
        path = self.folder / CONTEXTS_FILE
        with _readable(path), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_TOGETHER):
                for row in batch.to_pylist():
                    if row["latent"] != latent and rows:
                        yield latent, rows
                        rows = []
                    latent = row["latent"]
                    rows.append(row)
        if rows:
            yield latent, rows

    def windows(self) -> list[Row]:
        """The windows that were drawn without regard to latents."""
        return self._read(WINDOWS_FILE).to_pylist()

    def _read(self, name: str, **how: Any) -> pa.Table:
        with _readable(self.folder / name):
            return pq.read_table(self.folder / name, **how)


def _sha256(path: Path) -> str:
    with _readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FormatError(f"{path} can't be read ({reason}). Run `fastcache interpret` again with --fresh.") from error
