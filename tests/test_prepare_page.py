"""The page of a corpus: its figures are those on disk, its texts never markup, and it needs nothing from elsewhere."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import needs_chromium, watched_page

from fastcache import extras
from fastcache.errors import FormatError, InputError, IntegrityError
from fastcache.progress import Silent
from fastcache.stages.prepare import histograms, page
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.histograms import Lengths, measure
from fastcache.stages.prepare.page import EXAMPLE_CHARACTERS, N_EXAMPLES, write_page
from fastcache.stages.prepare.run import prepare

ATTACK = "<script>alert(1)</script> </style> </div> {{ 7 * 191 }} {% raw %} &amp; \u202e $x_{1$ \x00"


class Tables(HTMLParser):
    """Rows of cells, by the table's id; what stands under a number, as its share, is left out."""

    def __init__(self):
        super().__init__()
        self.tables, self.open, self.tags = {}, None, []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.open = self.tables.setdefault(dict(attrs).get("id"), [])
        elif tag == "tr":
            self.open.append([])
        elif tag in ("td", "th"):
            self.open[-1].append(None)

    def handle_data(self, data):
        if self.open and self.open[-1] and self.open[-1][-1] is None:
            self.open[-1][-1] = data.strip()


def parsed(path):
    tables = Tables()
    tables.feed(path.read_text())
    return tables


def number(cell):
    return 0 if cell == "\u2013" else int(cell.replace(",", ""))


def dialogue(*texts, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


def words(seed, count):
    return " ".join(map(str, np.random.default_rng(seed).integers(0, 10**9, count)))


def corpus(folder, *row_lists, **options):
    folder.mkdir(exist_ok=True)
    for i, rows in enumerate(row_lists):
        (folder / f"set{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = tuple(str(folder / f"set{i}.jsonl") for i in range(len(row_lists)))
    return prepare(PrepareConfig(source=sources, **options), folder / "out", Silent()), folder / "out"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three sources with duplicates within and across, and rows that can't be used."""
    rows = [dialogue(words(i, 10 + i), words(100 + i, 40), system="Be brief." if i % 3 else None) for i in range(60)]
    first = [*rows[:30], *rows[:4], {"messages": []}]
    second = [*rows[20:50], dialogue("so: " + rows[1]["messages"][-1]["content"], "yes"), dialogue(ATTACK, "")]
    third = [*rows[50:], *rows[55:], *rows[:15]]
    return corpus(tmp_path_factory.mktemp("mixed"), first, second, third)


@pytest.fixture(scope="module")
def tables(mixed):
    return parsed(write_page(mixed[1]))


def test_the_table_of_drops_adds_up_to_the_counts(mixed, tables):
    info, _ = mixed
    head, *rows, last = tables.tables["dropped"]
    reasons = head[4:-1]
    assert len(reasons) == 4
    for entry, (_, _, *cells) in zip(info["counts"].values(), rows, strict=True):
        expected = [entry["rows"], entry["kept"], *(entry["dropped"].get(reason, 0) for reason in reasons)]
        assert list(map(number, cells)) == [*expected, sum(entry["dropped"].values())]
    body = np.array([list(map(number, row[2:])) for row in rows])
    assert list(map(number, last[2:])) == body.sum(0).tolist()
    assert (body[:, 0] == body[:, 1] + body[:, -1]).all()


def test_the_matrix_is_that_of_the_ledger(mixed, tables):
    info, out = mixed
    names = list(info["counts"])
    expected = np.zeros((len(names),) * 2, int)
    for entry in pq.read_table(out / "ledger.parquet").to_pylist():
        if entry["repeats_source"] is not None:
            expected[names.index(entry["source"]), names.index(entry["repeats_source"])] += 1
    _, *rows, last = tables.tables["matrix"]
    assert [[number(cell) for cell in row[2:-1]] for row in rows] == expected.tolist()
    assert [number(row[-1]) for row in rows] == expected.sum(1).tolist()
    assert [number(cell) for cell in last[2:]] == [*expected.sum(0).tolist(), expected.sum()]
    assert expected.trace() not in (0, expected.sum())


def test_examples_name_dropped_rows_and_show_what_they_repeat(mixed):
    _, out = mixed
    by_place = {
        (r["source"], r["source_row"]): r for p in out.glob("*-0*.parquet") for r in pq.read_table(p).to_pylist()
    }
    ledger = {(r["source"], r["source_row"]): r for r in pq.read_table(out / "ledger.parquet").to_pylist()}
    examples = page._examples(page.Corpus(out))
    assert len({(e["source"], e["source_row"]) for e in examples}) == len(examples) == N_EXAMPLES
    for example in examples:
        entry = ledger[example["source"], example["source_row"]]
        assert entry == {name: example.get(name) for name in entry}
        kept = by_place[example["repeats_source"], example["repeats_row"]]
        text = "".join(message["content"] for message in kept["messages"])
        shown = "".join(text for _, text in example["text"]["turns"])
        assert shown == text[:EXAMPLE_CHARACTERS]
        assert len(shown) + example["text"]["left_out"] == len(text)
    html = (out / "report.html").read_text()
    assert all(f"<code>{e['source']}:{e['source_row']}</code> was dropped" in html for e in examples)


def test_lengths_are_those_of_the_kept_rows(mixed):
    _, out = mixed
    rows = [row for path in out.glob("*-0*.parquet") for row in pq.read_table(path).to_pylist()]
    lengths, n_measured = measure(page.Corpus(out))
    assert n_measured == len(rows)
    assert lengths["turns per dialogue"].total == sum(len(row["messages"]) for row in rows)
    counts = sorted(sum(len(message["content"].split()) for message in row["messages"]) for row in rows)
    whole = lengths["words per dialogue"]
    assert (whole.total, whole.largest, whole.quantile(0.5)) == (sum(counts), counts[-1], counts[(len(rows) - 1) // 2])
    roles = [lengths[f"words per {role} turn"].n for role in ("user", "assistant", "system")]
    assert sum(roles) == lengths["turns per dialogue"].total
    assert sum(lengths[f"words per {role} turn"].total for role in ("user", "assistant", "system")) == sum(counts)


@pytest.mark.parametrize("largest", [1, 2, 63, 64, 65, 128, 1000, 10**7])
def test_a_histogram_leaves_nothing_out(largest):
    lengths = Lengths()
    lengths.add(np.array([1, largest]))
    lengths.add(np.array([(largest + 1) // 2]))
    edges, counts = lengths.bars()
    assert counts.sum() == lengths.n == 3
    assert len(edges) == len(counts) + 1


def test_a_sample_of_the_rows_is_said_to_be_one(mixed, tmp_path, monkeypatch):
    out = shutil.copytree(mixed[1], tmp_path / "out")
    assert "Measured on all kept rows" in write_page(out).read_text()
    monkeypatch.setattr(histograms, "SAMPLE_ROWS", 7)
    assert "Measured on the first 7 kept rows" in write_page(out).read_text()


def test_texts_and_names_never_become_markup(tmp_path):
    clean = [dialogue(f"a {words(1, 30)}", "b")]
    hostile = [dialogue(f"{ATTACK} {words(1, 30)}", "b")]
    _, plain = corpus(tmp_path / "plain", clean, clean)
    _, attacked = corpus(tmp_path / "<b onclick={{1}}>'\"&", hostile, hostile)
    found = parsed(write_page(attacked))
    expected = parsed(write_page(plain))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in expected.tags]
    text = (attacked / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &lt;/style&gt;" in text
    assert "{{ 7 * 191 }} {% raw %}" in text


def test_a_corpus_of_texts(text_corpus, tmp_path):
    path = write_page(shutil.copytree(text_corpus, tmp_path / "out"))
    rows = {row[0]: row[1:] for row in parsed(path).tables["quantiles"]}
    assert list(rows) == [None, "words per document"]
    assert number(rows["words per document"][0]) == 40


def test_repeated_texts_are_shown(tmp_path):
    _, out = corpus(tmp_path / "c", [{"text": "one two three"}, {"text": "one two three"}])
    assert '<div class="turn" dir="auto">one two three</div>' in write_page(out).read_text()


def test_one_row_and_nothing_dropped(tmp_path):
    _, out = corpus(tmp_path / "c", [dialogue("hi", "yes")])
    html = write_page(out).read_text()
    assert "Corpus of 1 dialogue<" in html
    assert "No row repeats another." in html
    assert "Examples" not in html


def test_twenty_sources(tmp_path):
    rows = [dialogue(words(i, 30), "b") for i in range(20)]
    _, out = corpus(tmp_path / "c", *[[rows[i], rows[0]] for i in range(20)])
    assert len(parsed(write_page(out)).tables["matrix"]) == 22


def test_a_repeated_row_that_was_dropped_later_is_said_to_be(tmp_path):
    pytest.importorskip("datasketch")
    long = words(1, 200).split()
    near = [word if i % 19 else "other" for i, word in enumerate(long)]  # no 20 words in common, most 5 words
    rows = [dialogue(" ".join(long), "b"), dialogue(" ".join(near), "b"), dialogue(" ".join([*near[:40], "c"]), "d")]
    info, out = corpus(tmp_path / "c", rows, minhash=0.4)
    assert info["counts"][str(tmp_path / "c/set0.jsonl")]["dropped"] == {"n-gram duplicate": 1, "near duplicate": 1}
    assert "itself dropped later (near duplicate)" in write_page(out).read_text()


def test_token_lengths_are_shown(mixed, tmp_path):
    out = shutil.copytree(mixed[1], tmp_path / "out")
    info = json.loads((out / "corpus.json").read_text())
    tokens = {"edges": [1, 2, 4, 8, 16], "counts": [0, 3, 4, 0], "model": "<i>$a_{", "max_length": 8192, "longer": 2}
    (out / "corpus.json").write_text(json.dumps(info | {"token_lengths": tokens}))
    html = write_page(out).read_text()
    assert "<code>&lt;i&gt;$a_{</code>" in html
    assert "tokens per row" in html
    tokens["counts"].append(1)
    (out / "corpus.json").write_text(json.dumps(info | {"token_lengths": tokens}))
    with pytest.raises(FormatError, match="one edge more"):
        write_page(out)


def test_the_same_corpus_gives_the_same_page(mixed, tables):
    first = (mixed[1] / "report.html").read_bytes()
    assert write_page(mixed[1]).read_bytes() == first


def test_the_page_needs_nothing_from_elsewhere(mixed, tables):
    html = (mixed[1] / "report.html").read_text()
    assert re.findall(r'(?:src|href)\s*=\s*"([^"#][^"]*)"', html) == []
    assert not re.search(r"url\((?!#)|@import|<(script|link|iframe|img|object)", html)
    ids = [attributes["id"] for _, attributes in tables.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_folder_that_is_no_corpus(tmp_path):
    with pytest.raises(FormatError, match=r"corpus\.json is missing"):
        write_page(tmp_path)


@pytest.mark.parametrize("lost", ["ledger.parquet", "train-00000.parquet"])
def test_a_corpus_that_lacks_a_file(mixed, tmp_path, lost):
    out = shutil.copytree(mixed[1], tmp_path / "out")
    (out / lost).unlink()
    with pytest.raises(IntegrityError):
        write_page(out)


def test_missing_packages_are_named(mixed, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "jinja2" else name)
    with pytest.raises(InputError, match=r"needs jinja2: pip install"):
        write_page(mixed[1])


@needs_chromium
def test_a_browser_shows_the_page_without_complaint(mixed, tables, browser):
    with watched_page(browser, viewport={"width": 1200, "height": 2400}) as page:
        page.goto((mixed[1] / "report.html").as_uri())
        assert len(page.screenshot()) > 50_000
