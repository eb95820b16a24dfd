"""verify names all damage and nothing else; repair computes exactly what is damaged again."""

import json
import shutil
import signal

import numpy as np
import pytest
from conftest import edit_manifest, run_extract, tree_bytes
from crc32c import crc32c
from disk_changes import run_and_die
from processes import kill, n_lines, start, start_command, wait_for
from test_cache_format import log_line

import fastcache
from fastcache.cache_format.arrays import join_crc32c
from fastcache.cache_format.storage import LocalStorage
from fastcache.cache_format.verify import verify
from fastcache.errors import FormatError, InputError, MismatchError
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.stages.extract.repair import repair

HOOK = "resid_post.1"


@pytest.fixture
def cache(small_cache, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(small_cache, tmp_path / "cache")


def problems(root, **options):
    return [finding for finding in verify(LocalStorage(root), **options) if not finding.is_note]


def notes(root):
    return [finding for finding in verify(LocalStorage(root)) if finding.is_note]


def flip(path, position=None, bit=4):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= bit
    path.write_bytes(bytes(data))


def times(root):
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in sorted(root.rglob("*")) if path.is_file()}


def relog(root, change):
    """Change the records of a log, each with a right checksum."""
    lines = (root / "parts.jsonl").read_bytes().splitlines()
    records = [json.loads(line[9:]) for line in lines]
    change(records)
    (root / "parts.jsonl").write_bytes(b"".join(map(log_line, records)))


@pytest.mark.parametrize("workers", [1, 5])
def test_a_whole_cache_has_no_findings(small_cache, workers):
    assert list(verify(LocalStorage(small_cache), workers=workers)) == []
    assert list(verify(LocalStorage(small_cache), quick=True)) == []


@pytest.mark.parametrize("method", ["bt-f", "bt-p"])
def test_a_whole_cache_of_blocks_has_no_findings(method, tiny_qwen, chat_corpus, text_corpus, tmp_path):
    corpus = chat_corpus if method == "bt-f" else text_corpus
    run_extract(tiny_qwen, corpus, tmp_path, method=method, block_size=16, tokens=900, unit_tokens=64)
    assert list(verify(LocalStorage(tmp_path))) == []


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_whole_cache_of_other_dtypes_has_no_findings(dtype, tiny_qwen, chat_corpus, tmp_path):
    run_extract(tiny_qwen, chat_corpus, tmp_path, dtype=dtype, max_length=64)
    assert list(verify(LocalStorage(tmp_path))) == []


def test_joined_checksums_are_those_of_the_whole():
    data = np.random.default_rng(0).bytes(5000)
    for cut in (0, 1, 255, 2500, 4999, 5000):
        assert join_crc32c(crc32c(data[:cut]), crc32c(data[cut:]), len(data) - cut) == crc32c(data)


def test_a_damaged_unit_is_named(cache):
    flip(cache / f"parts/00000001/{HOOK}/c/0/0", 256 * 32 * 2 + 7)
    (finding,) = problems(cache)
    assert finding.part == 1
    assert finding.file == f"parts/00000001/{HOOK}/c/0/0"
    assert finding.problem == "differs from its checksum in the log: unit 1"


def test_the_filling_of_the_last_unit_is_checked_too(cache):
    shard = cache / f"parts/00000001/{HOOK}/c/0/0"
    index_bytes = 16 * (-(-fastcache.open_cache(cache).parts[1].record.n_tokens // 256)) + 4
    flip(shard, shard.stat().st_size - index_bytes - 1)
    assert [finding.problem for finding in problems(cache)] == ["differs from its checksum in the log"]


def test_quick_sees_sizes_but_no_bits(cache):
    flip(cache / f"parts/00000001/{HOOK}/c/0/0")
    assert problems(cache, quick=True) == []
    with (cache / "parts/00000000/token_ids/c/0").open("ab") as file:
        file.write(b"x")
    (finding,) = problems(cache, quick=True)
    assert (finding.part, finding.file) == (0, "parts/00000000/token_ids/c/0")


def test_all_damage_is_seen_at_once(cache):
    (cache / "parts/00000000/token_ids/c/0").unlink()
    (cache / "parts/00000000/extra").write_text("?")
    shutil.rmtree(cache / "parts/00000001")
    flip(cache / "zarr.json")
    found = {(finding.part, finding.file) for finding in problems(cache)}
    assert found == {
        (None, "zarr.json"),
        (0, "parts/00000000/token_ids/c/0"),
        (0, "parts/00000000/extra"),
        (1, "parts/00000001"),
    }


def test_leftovers_are_notes(cache):
    (cache / "parts/.00000007.tmp").mkdir()
    (cache / "parts/.00000007.tmp/zarr.json").write_text("{")
    shutil.copytree(cache / "parts/00000000", cache / "parts/00000077")
    assert problems(cache) == []
    assert [finding.file for finding in notes(cache)] == ["parts/.00000007.tmp", "parts/00000077"]


def test_a_torn_last_line_is_a_note_only_while_the_cache_is_written(cache):
    log = cache / "parts.jsonl"
    log.write_bytes(log.read_bytes()[:-1])
    assert any("torn" in finding.problem for finding in problems(cache))
    edit_manifest_like_us(cache, state="writing", totals={}, ledger={}, statistics={})
    assert problems(cache) == []
    assert any("torn" in finding.problem for finding in notes(cache))


def edit_manifest_like_us(root, **changes):
    """Change a manifest into one that the writer could have written."""
    from fastcache.cache_format.manifest import load_manifest

    manifest = load_manifest(LocalStorage(root))
    for name, value in changes.items():
        setattr(manifest, name, value)
    manifest.save(LocalStorage(root))


def test_a_lost_line_at_the_end_shows_in_the_totals(cache):
    log = cache / "parts.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert any("n_parts of all parts" in finding.problem for finding in problems(cache))


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("ledger", {"stored": 1}, "ledger.stored"),
        ("totals", {"n_bytes": 5}, "n_bytes"),
        ("totals", {"tokens_by_type": {}}, "tokens_by_type"),
        ("statistics", {HOOK: {}}, "statistics.resid_post.1"),
    ],
)
def test_wrong_figures_of_the_manifest_are_told(cache, field, change, said):
    raw = json.loads((cache / "manifest.json").read_text())
    edit_manifest_like_us(cache, **{field: {**raw[field], **change}})
    assert any(said in finding.problem for finding in problems(cache))


def test_a_manifest_laid_out_otherwise_is_told(cache):
    edit_manifest(cache)  # a right checksum, no line breaks
    assert [finding.problem for finding in problems(cache)] == ["is valid, but not the bytes that fastcache writes"]


def forge(root, part, name, values):
    """Put other values into a small array, with all checksums right."""
    from fastcache.cache_format.arrays import chunk_name, encode_chunk

    file = f"{name}/{chunk_name(values.ndim)}"
    (root / f"parts/{part:08d}/{file}").write_bytes(data := encode_chunk(values))

    def change(records):
        records[part]["files"][file] = [len(data), crc32c(data)]

    relog(root, change)
    raw = json.loads((root / "manifest.json").read_text())["totals"]
    n_bytes = sum(size for one in fastcache.open_cache(root).parts for size, _ in one.record.files.values())
    edit_manifest_like_us(root, totals={**raw, "n_bytes": n_bytes})


def tokens_of(root, name, part=1):
    return fastcache.open_cache(root).parts[part].tokens[name].copy()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("token_types", lambda values: values | 3, "exactly one of the flags"),
        ("token_types", lambda values: values | (5 << 5), "unknown turn role"),
        ("token_types", lambda values: values | 16, "FIRST_POSITION"),
        ("token_types", lambda values: values & 0xEF, "FIRST_POSITION"),
        ("token_ids", lambda values: -values - 1, "negative token id"),
        ("instance_ids", lambda values: values[::-1].copy(), "should rise"),
        ("instance_ids", lambda values: values - values[0], "the parts before end with"),
        ("document_ids", lambda values: values * 0 + 7, "fewer than the ledger"),
        ("instance_offsets", lambda values: values[::-1].copy(), "should rise from 0"),
    ],
)
def test_values_that_cannot_be_are_told_though_every_checksum_is_right(cache, name, change, said):
    forge(cache, 1, name, change(tokens_of(cache, name)))
    found = problems(cache)
    assert any(finding.part == 1 and said in finding.problem for finding in found), found


def test_statistics_that_do_not_count_the_tokens_are_told(cache):
    forge(cache, 1, f"{HOOK}.statistics.count", np.full(5, 3))
    assert any(finding.part == 1 and "counts 3 tokens" in finding.problem for finding in problems(cache))


@pytest.mark.parametrize(
    ("ledger", "said"),
    [
        ({"stored": -1, "truncated": [], "skipped": {}}, "stored should be a count"),
        ({"stored": 1, "truncated": [3, 3], "skipped": {}}, "accounted for twice"),
        ({"stored": 1, "truncated": [], "skipped": {"why": ["x"]}}, "by reason"),
        ({"stored": 1}, "by reason"),
        ({"stored": 1, "truncated": [10**9], "skipped": {}}, "lacks a row"),
        ({"stored": 10**6, "truncated": [], "skipped": {}}, "fewer than the ledger"),
    ],
)
def test_a_ledger_that_cannot_be_is_told(cache, ledger, said):
    relog(cache, lambda records: records[1].update(ledger=ledger))
    assert any(finding.part == 1 and said in finding.problem for finding in problems(cache))


def test_a_row_in_the_ledgers_of_two_parts_is_told(cache):
    def change(records):
        for record in records[:2]:
            record["ledger"]["skipped"] = {"no tokens": [10**6]}

    relog(cache, change)
    assert any("that another part has too" in finding.problem for finding in problems(cache))


def test_what_is_no_cache_is_refused(tmp_path):
    with pytest.raises(FormatError, match="not a fastcache cache"):
        list(verify(LocalStorage(tmp_path)))


def test_a_missing_manifest_of_a_cache_is_damage(cache):
    (cache / "manifest.json").unlink()
    flip(cache / "parts/00000001/token_ids/c/0")
    assert [finding.file for finding in problems(cache)] == ["manifest.json", "parts/00000001/token_ids/c/0"]


def test_the_command_lists_damage_and_exits_with_1(cache, capsys):
    main(["verify", str(cache)])
    assert "nothing is wrong" in capsys.readouterr().out
    flip(cache / "parts/00000001/token_ids/c/0")
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(cache)])
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    assert "parts/00000001/token_ids/c/0: differs from its checksum in the log" in printed
    assert f"damaged parts: 1, problems: 1.\nNext: fastcache repair {cache}" in printed


def test_names_from_a_log_cannot_write_to_the_terminal(cache, capsys):
    relog(cache, lambda records: records[0]["files"].update({"\x1b[2Jevil\ud800": [1, 1]}))
    with pytest.raises(SystemExit):
        main(["verify", str(cache), "--quick"])
    assert "\\x1b[2Jevil\\ud800: is missing" in capsys.readouterr().out


# Repair


def test_a_whole_cache_has_nothing_to_repair(cache, capsys):
    before = times(cache)
    main(["repair", str(cache)])
    assert "nothing to repair" in capsys.readouterr().out
    assert {name: time for name, time in times(cache).items() if name != ".lock"} == {
        name: time for name, time in before.items() if name != ".lock"
    }


def test_repair_computes_the_damaged_part_and_touches_no_other(cache, small_cache, capsys):
    flip(cache / f"parts/00000001/{HOOK}/c/0/0")
    before = times(cache)
    main(["repair", str(cache)])
    printed = capsys.readouterr().out
    assert "part 1: computed again, identical to the original" in printed
    assert tree_bytes(cache) == tree_bytes(small_cache)
    after = times(cache)
    unlike = {name for name in after if after[name] != before[name]}
    assert all(name.startswith(("parts/00000001/", "parts.jsonl", ".lock")) for name in unlike)


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: shutil.rmtree(root / "parts/00000000"),
        lambda root: (root / "parts/00000001/token_ids/c/0").unlink(),
        lambda root: (root / "parts/00000001/extra").write_text("?"),
        lambda root: flip(root / "parts.jsonl", 300),
        lambda root: flip(root / "parts.jsonl"),
        lambda root: (root / "parts.jsonl").unlink(),
        lambda root: (root / "parts.jsonl").write_bytes((root / "parts.jsonl").read_bytes()[:-30]),
        lambda root: (root / "zarr.json").write_text("{"),
        lambda root: (root / "parts/zarr.json").unlink(),
        lambda root: edit_manifest_like_us(root, statistics={}, ledger={"stored": 7}),
        edit_manifest,
        lambda root: relog(root, lambda records: records[1]["ledger"].update(stored=-1)),
    ],
    ids=["part", "file", "extra", "line", "inner-line", "log", "torn", "root", "parts", "figures", "layout", "ledger"],
)
def test_whatever_is_damaged_is_mended_to_the_byte(damage, cache, small_cache):
    damage(cache)
    assert problems(cache)
    repair(cache, Silent())
    assert tree_bytes(cache) == tree_bytes(small_cache)


def test_a_part_that_is_a_link_is_computed_again_and_the_link_left_alone(cache, small_cache, tmp_path):
    (cache / "parts/00000000").rename(tmp_path / "elsewhere")
    (cache / "parts/00000000").symlink_to(tmp_path / "elsewhere")
    before = times(tmp_path / "elsewhere")
    assert repair(cache, Silent()) == [0]
    assert tree_bytes(cache) == tree_bytes(small_cache)
    assert times(tmp_path / "elsewhere") == before


def test_nothing_is_written_through_a_linked_parts_folder(cache, tmp_path):
    (cache / "parts").rename(tmp_path / "elsewhere")
    (cache / "parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="symbolic link"):
        repair(cache, Silent())


def test_a_damaged_manifest_says_what_to_do(cache):
    flip(cache / "manifest.json")
    with pytest.raises(InputError, match=r"Restore the file from a copy, or extract the cache again"):
        repair(cache, Silent())


def test_another_corpus_is_refused(cache, text_corpus, chat_corpus, tmp_path):
    flip(cache / "parts/00000001/token_ids/c/0")
    before = tree_bytes(cache)
    shutil.copytree(chat_corpus, tmp_path / "corpus")
    info = json.loads((tmp_path / "corpus/corpus.json").read_text())
    (tmp_path / "corpus/corpus.json").write_text(json.dumps({**info, "fingerprint": "0" * 64}))
    with pytest.raises(MismatchError, match=r"corpus\.fingerprint"):
        repair(cache, Silent(), corpus=str(tmp_path / "corpus"))
    with pytest.raises(InputError, match="Say where it is with --corpus"):
        repair(cache, Silent(), corpus=str(tmp_path / "nowhere"))
    assert tree_bytes(cache) == before


def test_a_moved_corpus_may_be_named(cache, small_cache, chat_corpus, tmp_path):
    flip(cache / "parts/00000001/token_ids/c/0")
    shutil.copytree(chat_corpus, tmp_path / "corpus")
    assert repair(cache, Silent(), corpus=str(tmp_path / "corpus")) == [1]
    assert tree_bytes(cache) == tree_bytes(small_cache)


def test_an_unfinished_cache_is_repaired_and_then_finished(tiny_qwen, chat_corpus, small_cache, tmp_path):
    out = tmp_path / "cache"
    extract = ["extract", "--model", tiny_qwen, "--corpus", chat_corpus, "--layer", 1, "--layer", 3, "--parity", 2]
    process = start_command(*extract, "--unit-tokens", 1000, "--out", out)
    wait_for(lambda: n_lines(out / "parts.jsonl") >= 2, process)
    kill(process)
    flip(out / "parts/00000000/token_ids/c/0")
    assert repair(out, Silent()) == [0]
    run_extract(tiny_qwen, chat_corpus, out, layer=(1, 3), dtype="bfloat16")
    assert tree_bytes(out) == tree_bytes(small_cache)


def test_a_part_that_comes_out_otherwise_brings_the_manifest_up_to_date(cache, monkeypatch):
    """As on other hardware: the values differ, but the cache is whole afterwards."""
    from fastcache.llm.transformers_backend import TransformersBackend

    plain = TransformersBackend.residuals

    def others(*given):
        return ({hook: rows * 2 for hook, rows in residuals.items()} for residuals in plain(*given))

    monkeypatch.setattr(TransformersBackend, "residuals", others)
    flip(cache / f"parts/00000001/{HOOK}/c/0/0")
    before = (cache / "manifest.json").read_bytes()
    assert repair(cache, Silent()) == [1]
    assert (cache / "manifest.json").read_bytes() != before
    assert problems(cache) == []


def test_a_repair_killed_anywhere_goes_on(cache, small_cache):
    for part in (0, 1, 2):
        flip(cache / f"parts/{part:08d}/{HOOK}/c/0/0")
    flip(cache / "parts.jsonl", 300)
    # While the log is written, while the first part is built, and while the second one gets its name.
    for moment in ((2, "parts.jsonl"), (30, "parts/.00000000.tmp"), (1, "parts/00000001")):
        process = start(run_and_die, ["repair", cache], cache, *moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    main(["repair", str(cache)])
    assert tree_bytes(cache) == tree_bytes(small_cache)
