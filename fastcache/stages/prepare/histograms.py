"""How long the kept rows are, for the corpus page: counted in bounded memory, drawn as SVG."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcache.corpus import Corpus
from fastcache.errors import IntegrityError
from fastcache.svg import page_style, panels, to_svg

SAMPLE_ROWS = 200_000
LARGEST = 2**22  # lengths are counted one by one up to here; longer ones as this
FEW = 64  # so many lengths at most get a bar each
ROLE_COLOURS = {"user": "#1c7ed6", "assistant": "#d9480f", "system": "#5c940d", "tool": "#9c36b5"}
BAR_COLOUR = "#1c7ed6"
TURNS, DIALOGUES, DOCUMENTS = "turns per dialogue", "words per dialogue", "words per document"

Numbers = npt.NDArray[np.int64]


@dataclass
class Lengths:
    """How often each length occurs."""

    counts: Numbers = field(default_factory=lambda: np.zeros(1, np.int64))
    total: int = 0
    largest: int = 0

    def add(self, values: Numbers) -> None:
        """Count more of them."""
        found = np.bincount(np.minimum(values, LARGEST), minlength=len(self.counts))
        found[: len(self.counts)] += self.counts
        self.counts = found
        self.total += int(values.sum())
        self.largest = max(self.largest, int(values.max(initial=0)))

    @property
    def n(self) -> int:
        """How many there are."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> int:
        """The smallest length that at least this share of them doesn't exceed."""
        return int(np.searchsorted(np.cumsum(self.counts), share * self.n))

    def bars(self) -> tuple[Numbers, Numbers]:
        """Edges and counts of a histogram: a bar for each length if they are few, else two for each doubling."""
        edges = np.arange(1, self.largest + 2)
        if self.largest > FEW:
            halves = np.arange(2 * np.log2(len(self.counts)) + 2) / 2
            edges = np.unique(np.round(2**halves).astype(np.int64))
            edges = edges[: np.searchsorted(edges, len(self.counts) - 1, side="right") + 1]
        below = np.concatenate([[0], np.cumsum(self.counts)])
        return edges, np.diff(below[np.minimum(edges, len(self.counts))])


def read_batches(path: Path, columns: list[str], n_rows: int) -> Iterator[pa.RecordBatch]:
    """The file by batches of at most `n_rows`; raises `IntegrityError` if it can't be read."""
    try:
        yield from pq.ParquetFile(path).iter_batches(n_rows, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise IntegrityError(f"{path} can't be read ({error}). Prepare the corpus again.") from error


def shards(corpus: Corpus) -> list[Path]:
    """The files of all splits."""
    return [path for split in corpus.info["splits"] for path in sorted(corpus.path.glob(f"{split}-*.parquet"))]


def measure(corpus: Corpus) -> tuple[dict[str, Lengths], int]:
    """Lengths by what they are of, and of how many rows.

    These are the first rows of the corpus: a random sample, since rows are permuted. Raises `IntegrityError` if rows
    are missing.
    """
    names = [TURNS, DIALOGUES, *map(_of_role, ROLE_COLOURS)] if corpus.kind == "chat" else [DOCUMENTS]
    lengths = {name: Lengths() for name in names}
    n_rows = 0
    for path in shards(corpus):
        if n_rows >= SAMPLE_ROWS:
            break
        for batch in read_batches(path, ["messages", "text"], 1024):
            part = batch[: SAMPLE_ROWS - n_rows]
            n_rows += len(part)
            if corpus.kind == "chat":
                _add_dialogues(part["messages"], lengths)
            else:
                lengths[DOCUMENTS].add(_word_counts(part["text"]))
    if n_rows < min(SAMPLE_ROWS, sum(corpus.info["splits"].values())):
        raise IntegrityError(f"{corpus.path} has fewer rows than its corpus.json says. Prepare it again.")
    return {name: figures for name, figures in lengths.items() if figures.n}, n_rows


def _add_dialogues(dialogues: pa.ListArray, lengths: dict[str, Lengths]) -> None:
    turns, owners = dialogues.flatten(), pc.list_parent_indices(dialogues).to_numpy()
    words = _word_counts(pc.fill_null(pc.struct_field(turns, "content"), ""))
    lengths[TURNS].add(np.bincount(owners, minlength=len(dialogues)))
    lengths[DIALOGUES].add(np.bincount(owners, weights=words, minlength=len(dialogues)).astype(np.int64))
    roles = pc.struct_field(turns, "role")
    for role in ROLE_COLOURS:
        lengths[_of_role(role)].add(words[pc.equal(roles, role).to_numpy(zero_copy_only=False)])


def _of_role(role: str) -> str:
    return f"words per {role} turn"


def _word_counts(texts: pa.Array) -> Numbers:
    words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts)))
    return words.to_numpy(zero_copy_only=False).astype(np.int64)


def plot_lengths(lengths: dict[str, Lengths], tokens: dict[str, Any] | None) -> str:
    """Histograms as SVG text that takes the page's colours, so that dark and light both work."""
    whole = [name for name in (TURNS, DIALOGUES, DOCUMENTS) if name in lengths]
    by_role = {role: lengths[_of_role(role)] for role in ROLE_COLOURS if _of_role(role) in lengths}
    n_panels = len(whole) + bool(by_role) + bool(tokens)
    n_columns = n_panels if n_panels < 4 else 2
    with page_style():
        figure, axes = panels(n_panels, n_columns, max(8.4 / n_columns, 3.5), 2.7)
        for ax, name in zip(axes, whole, strict=False):
            edges, counts = lengths[name].bars()
            few = lengths[name].largest <= FEW
            ax.stairs(counts, edges - 0.5 if few else edges, fill=True, color=BAR_COLOUR)
            _label(ax, name, "rows", not few)
        if by_role:
            ax = axes[len(whole)]
            for role, figures in by_role.items():
                edges, counts = figures.bars()
                ax.stairs(counts / figures.n, edges, color=ROLE_COLOURS[role], label=role, linewidth=1.4)
            few = max(figures.largest for figures in by_role.values()) <= FEW
            _label(ax, "words per turn", "share of the role's turns", not few)
            ax.legend()
        if tokens:
            counts = np.array(tokens["counts"], np.int64)
            edges = np.array(tokens["edges"], np.float64)
            n_bars = int(np.flatnonzero(counts).max(initial=0)) + 1
            axes[-1].stairs(counts[:n_bars], edges[: n_bars + 1], fill=True, color=BAR_COLOUR)
            _label(axes[-1], "tokens per row", "rows", True)
        return to_svg(figure)


def _label(ax: Any, name: str, unit: str, logarithmic: bool) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    if logarithmic:
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    if unit == "rows":
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel(name)
    ax.set_ylabel(unit)
