"""The page of a corpus: what was dropped and why, who repeats whom, how long the kept rows are, and examples.

All is read back from the corpus directory, in bounded memory, so the page can be made again at any time.
"""

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcache import __version__
from fastcache.corpus import CORPUS_FILE, Corpus
from fastcache.errors import FormatError, IntegrityError
from fastcache.extras import page_template, require_packages
from fastcache.files import require_fields, write_bytes_atomic
from fastcache.stages.prepare.histograms import measure, plot_lengths, read_batches, shards
from fastcache.stages.prepare.ledger import KEPT, LEDGER_FILE

PAGE_FILE = "report.html"
N_EXAMPLES = 12
EXAMPLE_CHARACTERS = 600
LEDGER_BATCH = 65_536

Row = dict[str, Any]


def write_page(out: Path) -> Path:
    """Write `report.html` in the corpus directory `out`; returns its path.

    Raises `InputError` where matplotlib or jinja2 is missing, `FormatError` if `out` holds no finished corpus,
    `IntegrityError` if its files can't be read or don't fit together.
    """
    require_packages("The corpus page", "report", "matplotlib", "jinja2")
    corpus = Corpus(out)
    info = corpus.info
    _check(info, out / CORPUS_FILE)
    sources = list(info["counts"])
    lengths, n_measured = measure(corpus)
    tokens = info.get("token_lengths")
    page = page_template(Path(__file__).parent / "page.html.j2").render(
        version=__version__,
        info=info,
        sources=sources,
        short=_short_names(sources),
        fields=field_rows(info),
        reasons=sorted({reason for entry in info["counts"].values() for reason in entry["dropped"]}),
        matrix=[[info["duplicates"].get(name, {}).get(other, 0) for other in sources] for name in sources],
        lengths=lengths,
        n_measured=n_measured,
        tokens=tokens,
        plot=plot_lengths(lengths, tokens),
        examples=_examples(corpus),
        example_characters=EXAMPLE_CHARACTERS,
        share=_share,
        shade=_shade,
    )
    write_bytes_atomic(out / PAGE_FILE, page.encode())
    return out / PAGE_FILE


def _check(info: dict[str, Any], path: Path) -> None:
    """Raise `FormatError` where something that the page shows is missing."""
    require_fields(info, {"duplicates": dict, "settings": dict, "n_grams": int, "false_drop_probability": float}, path)
    for entry in info["counts"].values():
        require_fields(entry, {"rows": int, "kept": int, "dropped": dict}, path)
    if "token_lengths" in info:
        tokens = info["token_lengths"]
        require_fields(tokens, {"edges": list, "counts": list, "model": str, "max_length": int, "longer": int}, path)
        if not 0 < len(tokens["counts"]) == len(tokens["edges"]) - 1:
            raise FormatError(f"{path}: token_lengths should have one edge more than counts. The file is damaged.")


def field_rows(info: dict[str, Any]) -> list[tuple[str, str, int, str]]:
    """Source, field, kept rows that had it, and "kept" or "not kept"; of each source the most frequent first.

    A field that is kept in some dialogues and not in others is named as one that is not kept. Corpora of version 1.0
    have no such counts.
    """
    rows = []
    for source, kinds in info.get("fields", {}).items():
        for kind in ("not_kept", "kept"):
            counts = sorted(kinds.get(kind, {}).items(), key=lambda entry: (-entry[1], entry[0]))
            rows += [(source, name, count, kind.replace("_", " ")) for name, count in counts]
    return rows


def _share(part: int, whole: int) -> str:
    """A percentage that shows neither none nor all unless that is so."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.05:
        return "<0.1%"
    return ">99.9%" if 99.95 <= percent < 100 else f"{percent:.1f}%"


def _shade(count: int, largest: int) -> int:
    """Percent of colour of a cell; logarithmic, since one pair of sources often outweighs all others."""
    return round(8 + 47 * float(np.log1p(count) / np.log1p(largest))) if count else 0


def _short_names(sources: list[str]) -> dict[str, str]:
    """File names instead of paths, if they tell the sources apart."""
    last = [name.rstrip("/").rsplit("/", 1)[-1] for name in sources]
    return dict(zip(sources, last if len(set(last)) == len(last) else sources, strict=True))


def _examples(corpus: Corpus) -> list[Row]:
    """Some dropped rows, each with the row that it repeats: its outcome, and its beginning if it was kept."""
    pairs = _pairs(corpus)
    wanted = {(pair["repeats_source"], pair["repeats_row"]) for pair in pairs}
    places = pa.array([row for _, row in wanted], pa.int64())
    repeated: dict[tuple[str, int], Row] = {}
    for batch in read_batches(corpus.path / LEDGER_FILE, ["source", "source_row", "outcome", "row"], LEDGER_BATCH):
        for entry in batch.filter(pc.is_in(batch["source_row"], value_set=places)).to_pylist():
            if (entry["source"], entry["source_row"]) in wanted:
                repeated[entry["source"], entry["source_row"]] = entry
    # A row that n-grams repeat may itself be dropped later, as a near duplicate; it has no text to show then.
    numbers = sorted(entry["row"] for entry in repeated.values() if entry["outcome"] == KEPT)
    kept = _kept_rows(corpus, numbers)
    if len(repeated) < len(wanted) or len(kept) < len(numbers):
        raise IntegrityError(f"{corpus.path} lacks a row that {LEDGER_FILE} names. Prepare it again.")
    found = [repeated[pair["repeats_source"], pair["repeats_row"]] for pair in pairs]
    return [
        pair | {"repeated": entry, "text": kept.get(entry["row"])} for pair, entry in zip(pairs, found, strict=True)
    ]


def _pairs(corpus: Corpus) -> list[Row]:
    """Ledger entries of a few rows that repeat another, by seed, spread over the pairs of sources."""
    cells = {(name, other): n for name, row in corpus.info["duplicates"].items() for other, n in row.items()}
    rng = np.random.default_rng(corpus.info["settings"].get("seed", 0))
    order = [list(cells)[place] for place in rng.permutation(len(cells))]
    shares = dict.fromkeys(order, 0)
    room = min(N_EXAMPLES, sum(cells.values()))
    for cell in cycle(order):  # one of each pair of sources in turn, while there are any
        if sum(shares.values()) >= room:
            break
        shares[cell] += shares[cell] < cells[cell]
    chosen = {cell: rng.choice(cells[cell], n, replace=False) for cell, n in shares.items() if n}
    seen = dict.fromkeys(chosen, 0)
    pairs: list[Row] = []
    for batch in read_batches(
        corpus.path / LEDGER_FILE, ["source", "source_row", "outcome", "repeats_source", "repeats_row"], LEDGER_BATCH
    ):
        for cell, ordinals in chosen.items():
            mine = pc.and_(pc.equal(batch["source"], cell[0]), pc.equal(batch["repeats_source"], cell[1]))
            places = np.flatnonzero(mine.fill_null(False).to_numpy(zero_copy_only=False))
            here = places[ordinals[(ordinals >= seen[cell]) & (ordinals < seen[cell] + len(places))] - seen[cell]]
            pairs += batch.take(pa.array(here)).to_pylist()
            seen[cell] += len(places)
    if seen != {cell: cells[cell] for cell in chosen}:
        raise IntegrityError(
            f"{LEDGER_FILE} and {CORPUS_FILE} of {corpus.path} count other duplicates. Prepare it again."
        )
    return pairs


def _kept_rows(corpus: Corpus, numbers: list[int]) -> dict[int, Row]:
    """The beginnings of the rows with these numbers."""
    wanted = pa.array(numbers, pa.int64())
    kept: dict[int, Row] = {}
    for path in shards(corpus) if numbers else []:
        if not any(
            pc.any(pc.is_in(batch["row"], value_set=wanted)).as_py()
            for batch in read_batches(path, ["row"], LEDGER_BATCH)
        ):
            continue
        for batch in read_batches(path, ["row", "messages", "text"], 1024):
            for row in batch.filter(pc.is_in(batch["row"], value_set=wanted)).to_pylist():
                kept[row["row"]] = _beginning(row)
    return kept


def _beginning(row: Row) -> Row:
    """The first characters of a row as `(role, text)` turns, and how many characters were left out."""
    turns, room = [], EXAMPLE_CHARACTERS
    whole = [(message["role"], message["content"] or "") for message in row["messages"] or ()] or [("", row["text"])]
    for role, text in whole:
        if room > 0:
            turns.append((role, text[:room]))
        room -= len(text)
    return {"turns": turns, "left_out": max(0, -room)}
