"""The page of a corpus: what was dropped and why, who repeats whom, how long the kept rows are, and examples.

All is read back from the corpus directory, so a page can be made again at any time, in bounded memory.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcache import __version__
from fastcache.corpus import CORPUS_FILE, Corpus
from fastcache.errors import FormatError, InputError, IntegrityError
from fastcache.files import require_fields, write_bytes_atomic
from fastcache.stages.prepare.ledger import KEPT, LEDGER_FILE

PAGE_FILE = "report.html"
SAMPLE_ROWS = 200_000
N_EXAMPLES = 12
EXAMPLE_CHARACTERS = 600
LARGEST = 2**22  # lengths are counted one by one up to here, and as this from here on
ROLE_COLOURS = {"user": "#1c7ed6", "assistant": "#d9480f", "system": "#5c940d", "tool": "#9c36b5"}
BAR_COLOUR = "#1c7ed6"
INK = "#010203"  # replaced by the page's text colour

Numbers = npt.NDArray[np.int64]
Key = tuple[str, int]


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
        if self.largest > 40:
            edges = np.unique(np.round(2 ** (np.arange(2 * np.log2(len(self.counts)) + 2) / 2)).astype(np.int64))
        below = np.concatenate([[0], np.cumsum(self.counts)])
        return edges, np.diff(below[np.minimum(edges, len(self.counts))])


def write_page(out: Path) -> Path:
    """Write `report.html` in the corpus directory `out`; returns its path.

    Raises `InputError` where matplotlib or jinja2 is missing, `FormatError` if `out` holds no finished corpus,
    `IntegrityError` if its files don't fit together.
    """
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise InputError(f"The corpus page needs {' and '.join(missing)}: pip install 'fastcache-sae[report]'.")
    import jinja2

    corpus = Corpus(out)
    info = corpus.info
    fields = {"duplicates": dict, "settings": dict, "n_grams": int, "false_drop_probability": float}
    require_fields(info, fields, out / CORPUS_FILE)
    for entry in info["counts"].values():
        require_fields(entry, {"rows": int, "kept": int, "dropped": dict}, out / CORPUS_FILE)
    sources = list(info["counts"])
    lengths, n_sampled = _measure(corpus)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(
        version=__version__,
        info=info,
        sources=sources,
        short=_short_names(sources),
        reasons=sorted({reason for entry in info["counts"].values() for reason in entry["dropped"]}),
        matrix=np.array([[info["duplicates"].get(a, {}).get(b, 0) for b in sources] for a in sources]),
        lengths={title: figures for title, figures in lengths.items() if figures.n},
        n_sampled=n_sampled,
        plot=_plot(corpus.kind, lengths, info.get("token_lengths"), out),
        examples=_examples(corpus),
        example_characters=EXAMPLE_CHARACTERS,
        share=_share,
    )
    write_bytes_atomic(out / PAGE_FILE, page.encode())
    return out / PAGE_FILE


def _share(part: int, whole: int) -> str:
    """A percentage that shows neither none nor all where that isn't so."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "<0.1%"
    return ">99.9%" if 99.9 < percent < 100 else f"{percent:.1f}%"


def _short_names(sources: list[str]) -> dict[str, str]:
    """File names for paths, as long as they tell the sources apart."""
    last = [name.rstrip("/").rsplit("/", 1)[-1] for name in sources]
    return dict(zip(sources, last if len(set(last)) == len(last) else sources, strict=True))


def _batches(path: Path, columns: list[str], n_rows: int) -> Iterator[pa.RecordBatch]:
    try:
        yield from pq.ParquetFile(path).iter_batches(n_rows, columns=columns)
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise IntegrityError(f"{path} can't be read ({error}). Prepare the corpus again.") from error


def _shards(corpus: Corpus) -> list[Path]:
    return [path for split in corpus.info["splits"] for path in sorted(corpus.path.glob(f"{split}-*.parquet"))]


def _word_counts(texts: pa.Array) -> Numbers:
    words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts)))
    return words.to_numpy(zero_copy_only=False).astype(np.int64)


def _measure(corpus: Corpus) -> tuple[dict[str, Lengths], int]:
    """Lengths by what they are of, and of how many rows: the first ones, a random sample since rows are permuted."""
    names = ["turns per dialogue", "words per dialogue", *(f"words per {role} turn" for role in ROLE_COLOURS)]
    lengths = {name: Lengths() for name in (names if corpus.kind == "chat" else ["words per document"])}
    n_rows = 0
    for path in _shards(corpus):
        if n_rows >= SAMPLE_ROWS:
            break
        for batch in _batches(path, ["messages", "text"], 1024):
            part = batch[: SAMPLE_ROWS - n_rows]
            n_rows += len(part)
            if corpus.kind != "chat":
                lengths["words per document"].add(_word_counts(part["text"]))
                continue
            turns, owners = part["messages"].flatten(), pc.list_parent_indices(part["messages"])
            words = _word_counts(pc.struct_field(turns, "content"))
            lengths["turns per dialogue"].add(np.bincount(owners, minlength=len(part)))
            by_row = np.bincount(owners, weights=words, minlength=len(part))
            lengths["words per dialogue"].add(by_row.astype(np.int64))
            roles = pc.struct_field(turns, "role")
            for role in ROLE_COLOURS:
                mine = pc.equal(roles, role).to_numpy(zero_copy_only=False)
                lengths[f"words per {role} turn"].add(words[mine])
    return lengths, n_rows


def _plot(kind: str, lengths: dict[str, Lengths], tokens: dict[str, Any] | None, out: Path) -> str:
    """The histograms as SVG text that takes the page's colours."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if tokens is not None:
        fields = {"edges": list, "counts": list, "model": str, "max_length": int, "longer": int}
        require_fields(tokens, fields, out / CORPUS_FILE)
        if len(tokens["edges"]) != len(tokens["counts"]) + 1 or len(tokens["edges"]) < 2:
            raise FormatError(f"{out / CORPUS_FILE}: token_lengths should have one edge more than counts.")
    whole = ["turns per dialogue", "words per dialogue"] if kind == "chat" else ["words per document"]
    n_panels = len(whole) + (kind == "chat") + (tokens is not None)
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = {"svg.fonttype": "none", "svg.hashsalt": "fastcache", "font.family": "sans-serif", "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "legend.frameon": False}
    with mpl.rc_context({**style, "figure.facecolor": "none", **dict.fromkeys(inks, INK)}):
        figure = Figure(figsize=(4.2 * min(n_panels, 2), 2.7 * -(-n_panels // 2)), layout="constrained")
        axes = [figure.add_subplot(-(-n_panels // 2), min(n_panels, 2), i + 1) for i in range(n_panels)]
        for ax, name in zip(axes, whole, strict=False):
            edges, counts = lengths[name].bars()
            ax.stairs(counts, edges - 0.5 if edges[-1] <= 41 else edges, fill=True, color=BAR_COLOUR)
            _axis(ax, edges, name, "rows")
        if kind == "chat":
            for role, colour in ROLE_COLOURS.items():
                figures = lengths[f"words per {role} turn"]
                if figures.n:
                    edges, counts = figures.bars()
                    axes[len(whole)].stairs(counts / figures.n, edges, color=colour, label=role, linewidth=1.4)
            _axis(axes[len(whole)], np.array([1, LARGEST]), "words per turn", "share of the role's turns")
            axes[len(whole)].legend()
        if tokens is not None:
            edges = np.array(tokens["edges"], float)
            axes[-1].stairs(tokens["counts"], np.maximum(edges, min(1, edges[1] / 2)), fill=True, color=BAR_COLOUR)
            _axis(axes[-1], edges, "tokens per row", "rows")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)


def _axis(ax: Any, edges: npt.NDArray[Any], name: str, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    if edges[-1] > 41:
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if unit == "rows":
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel(name)
    ax.set_ylabel(unit)


def _examples(corpus: Corpus) -> list[dict[str, Any]]:
    """Some rows that repeat another, spread over the pairs of sources, with the beginning of what they repeat."""
    pairs = _some_pairs(corpus)
    wanted = {(pair["repeats_source"], pair["repeats_row"]) for pair in pairs}
    numbers: dict[Key, int] = {}
    places = pa.array([row for _, row in wanted], pa.int64())
    for batch in _batches(corpus.path / LEDGER_FILE, ["source", "source_row", "outcome", "row"], 65_536):
        near = pc.and_(pc.is_in(batch["source_row"], value_set=places), pc.equal(batch["outcome"], KEPT))
        rows = batch.filter(near).to_pylist() if wanted else []
        numbers |= {(r["source"], r["source_row"]): r["row"] for r in rows if (r["source"], r["source_row"]) in wanted}
    texts = _beginnings(corpus, sorted(numbers.values()))
    for pair in pairs:
        number = numbers.get((pair["repeats_source"], pair["repeats_row"]))
        if number not in texts:
            raise IntegrityError(f"{corpus.path} lacks a row that its {LEDGER_FILE} names. Prepare it again.")
        pair |= {"row": number, **texts[number]}
    return pairs
