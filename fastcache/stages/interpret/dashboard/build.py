"""Writes the page and its data: `index.html`, an index of all latents, and files of a few latents each.

A page that is opened as a file may load scripts but no JSON, so that the data are scripts, each a call of one function.
Text of dialogues is data in them, and the page makes text nodes of it, never markup.
"""

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from fastcache import __version__
from fastcache.cache_format.schema import TOKEN_SETS
from fastcache.errors import FormatError, MismatchError
from fastcache.files import fingerprint, new_folder, read_json, write_bytes_atomic, write_file
from fastcache.progress import Progress
from fastcache.rundir import RUN_FILE, output_directory
from fastcache.stages.interpret.collect import LOWEST
from fastcache.stages.interpret.judge.tables import SCORES_FILE, SUMMARY_FILE
from fastcache.stages.interpret.results import Results, Row

PAGE_FILE, DATA_FOLDER = "index.html", "data"
OWNED = (PAGE_FILE, DATA_FOLDER)
PER_FILE = 64
"""Latents of a data file: some 300 KB."""
MOST_PEAKS = 4
"""Tokens that stand for a latent in the list, and that are searched."""
HERE = Path(__file__).parent
Judged = dict[int, Row]


def build(latents: Path, judged: Path | None, out: Path, progress: Progress) -> Path:
    """Write the dashboard into `out`, unless it is there; returns the page. `judged` holds scores, by default `latents`/judge.

    Raises `InputError` for a folder without latents, `MismatchError` for scores of another SAE's.
    """
    results = Results(latents)
    scores = _read_scores(results, judged or latents / "judge", needed=judged is not None)
    parts = [HERE / name for name in ("page.html", "page.css", "page.js")]
    made_of = [results.fingerprint, __version__, scores, *(path.read_text() for path in parts)]
    settings = {"made_of": fingerprint(made_of)}
    page, run = out / PAGE_FILE, out / RUN_FILE
    is_there = page.is_file() and run.is_file() and read_json(run).get("settings") == settings
    with output_directory(out, "dashboard", settings, OWNED, fresh=not is_there and run.is_file()):
        if is_there:
            progress.say(f"{page} is up to date.")
            return page
        with new_folder(out / DATA_FOLDER) as data:
            peaks = _write_latents(results, scores, data, progress)
            _write_script(data / "index.js", "fastcacheIndex", _index(results, scores, peaks))
        write_bytes_atomic(page, _page(results).encode())  # last: it says that all is there
    return page


def _read_scores(results: Results, folder: Path, needed: bool) -> Judged:
    if not needed and not (folder / SCORES_FILE).is_file():
        return {}
    if read_json(folder / SUMMARY_FILE).get("sae") != results.about["sae"]:
        raise MismatchError(f"{folder} holds scores of another SAE than {results.folder}. Name them by --judged.")
    try:
        return {row["latent"]: row for row in pq.read_table(folder / SCORES_FILE).to_pylist()}
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{folder / SCORES_FILE} can't be read ({error}). Run `interpret judge` again.") from error


def _write_script(path: Path, function: str, *arguments: Any) -> None:
    given = b",".join(orjson.dumps(argument, option=orjson.OPT_SERIALIZE_NUMPY) for argument in arguments)
    write_file(path, function.encode() + b"(" + given + b");\n")


def _write_latents(results: Results, scores: Judged, folder: Path, progress: Progress) -> list[list[str]]:
    """The files of latents; returns for each latent the tokens that it is most active on."""
    table = results.latents()
    peaks: list[list[str]] = [[] for _ in range(results.d_sae)]
    contexts = results.contexts()
    upcoming = next(contexts, None)
    with progress.task("dashboard", results.d_sae, "latents") as task:
        for first in range(0, results.d_sae, PER_FILE):
            records = [_record(row, scores) for row in table.slice(first, PER_FILE).to_pylist()]
            while upcoming and upcoming[0] < first + PER_FILE:
                latent, rows = upcoming
                records[latent - first]["contexts"] = [_context(row) for row in rows]
                peaks[latent] = _peaks(rows)
                upcoming = next(contexts, None)
            number = first // PER_FILE
            _write_script(folder / f"latents-{number:05}.js", "fastcacheLatents", number, records)
            task.advance(len(records))
    return peaks


def _record(row: Row, scores: Judged) -> dict[str, Any]:
    judged = scores.get(row["latent"], {})
    return {
        "active": row["n_active"],
        "histogram": row["histogram"],
        "neighbours": [[each["index"], _short(each["value"])] for each in row["neighbours"]],
        "promoted": [[each["token"], _short(each["value"])] for each in row.get("promoted") or []],
        "suppressed": [[each["token"], _short(each["value"])] for each in row.get("suppressed") or []],
        "answer": judged.get("answer"),
        "failure": judged.get("failure"),
        "contexts": [],
    }


def _context(row: Row) -> dict[str, Any]:
    """Short names: there are a million of them. Activations are few, so those that aren't 0 are given with their places."""
    return {
        "k": row["kind"][0],
        "v": _short(row["value"]),
        "d": row["dialogue"],
        "r": row["corpus_row"],
        "p": row["position"],
        "s": row["start"],
        "t": row["tokens"],
        "y": row["token_types"],
        "a": [[place, _short(value)] for place, value in enumerate(row["activations"]) if value],
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _peaks(contexts: Sequence[Row]) -> list[str]:
    tokens = (row["tokens"][row["position"] - row["start"]] for row in contexts if row["kind"] == "top")
    return list(dict.fromkeys(tokens))[:MOST_PEAKS]


def _index(results: Results, scores: Judged, peaks: list[list[str]]) -> dict[str, Any]:
    """What the list is sorted, searched and drawn by."""
    densities = [f"density_{name}" for name in TOKEN_SETS]
    table = results.latents([*densities, "max_activation", "mean_activation"])
    columns = {name: table[name].to_numpy() for name in table.column_names}
    for name in ("score", "detection") if scores else ():
        values = (scores.get(latent, {}).get(name) for latent in range(results.d_sae))
        columns[name] = np.array([np.nan if value is None else value for value in values])
    return {
        "about": results.about,
        "judged": bool(scores),
        "perFile": PER_FILE,
        "lowest": LOWEST,
        "sets": TOKEN_SETS,
        "columns": {name: base64.b64encode(values.astype("<f4")).decode() for name, values in columns.items()},
        "names": [[latent, row["name"]] for latent, row in scores.items() if row["name"]],
        "peaks": peaks,
    }


def _page(results: Results) -> str:
    """Style and script stand in the page; what else it may load is a policy in it: its own data, nothing from elsewhere."""
    sae = results.about["sae"]
    title = f"{sae['model']}, {sae['hook_point']}, {sae['architecture']}, trained on {sae['trained_on']}"
    style, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    filled = {
        "TITLE": html.escape(title),
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASH": _hash(script),
        "STYLE": style,
        "SCRIPT": script,
    }
    pattern = re.compile("%%(" + "|".join(filled) + ")%%")
    return pattern.sub(lambda found: filled[found[1]], (HERE / "page.html").read_text())


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
