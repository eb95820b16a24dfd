"""The format: exact encodings, a log that survives torn writes, damage and attacks that are noticed."""

import contextlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr
from conftest import edit_manifest, tree_bytes
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastcache
from fastcache.cache_format.manifest import Log, Manifest, PartRecord, load_manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.schema import decode, encode, hook_point, layer_of, select
from fastcache.cache_format.statistics import GROUPS, Moments, merged
from fastcache.cache_format.storage import LocalStorage
from fastcache.cache_format.writer import CacheWriter
from fastcache.errors import FormatError, InputError, IntegrityError, MismatchError
from fastcache.files import canonical_json, parse_json

HOOK = "resid_post.1"
finite = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def small_manifest(dtype="float32", d_in=8, hooks=(HOOK,)):
    return Manifest({"hook_points": list(hooks), "d_in": d_in, "dtype": dtype})


def write_cache(root, lengths, dtype="float32", d_in=8):
    """A cache of one part per list of lengths; returns the residuals in order."""
    rng = np.random.default_rng(0)
    writer, everything = CacheWriter(root, small_manifest(dtype, d_in)), []
    for index, part_lengths in enumerate(lengths):
        instances = [
            Instance(
                10 * index + i, rng.integers(0, 99, n).astype(np.int32), np.full(n, 8, np.uint8), [(10 * index + i, 0)]
            )
            for i, n in enumerate(part_lengths)
        ]
        part = writer.part(index, instances)
        for instance in instances:
            rows = rng.standard_normal((len(instance.token_ids), d_in)).astype(np.float32)
            part.append({HOOK: rows})
            everything.append(rows)
        part.commit({"stored": len(instances), "truncated": [], "skipped": {}})
    return everything


@settings(deadline=None)
@given(finite)
def test_bfloat16_encoding_is_torchs(values):
    expected = torch.from_numpy(values).bfloat16()
    if expected.isinf().any():
        with pytest.raises(FormatError, match="overflows bfloat16"):
            encode(values, "bfloat16")
        return
    assert np.array_equal(encode(values, "bfloat16").view(np.int16), expected.view(torch.int16).numpy())
    assert np.array_equal(decode(encode(values, "bfloat16"), "bfloat16"), expected.float().numpy())


@given(finite)
def test_float32_is_kept_to_the_bit(values):
    assert np.array_equal(decode(encode(values, "float32"), "float32"), values)


def test_float16_overflow_is_refused():
    with pytest.raises(FormatError, match="overflows float16"):
        encode(np.array([1e5], np.float32), "float16")


@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_is_written_is_read(lengths, tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    everything = write_cache(root, lengths)
    cache = fastcache.open_cache(root)
    assert cache.n_instances == len(everything)
    for instance, rows in zip(cache.instances(), everything, strict=True):
        assert np.array_equal(instance.residuals(HOOK), rows)
    assert np.array_equal(cache.residuals(HOOK, 0, cache.n_tokens), np.concatenate(everything))


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_gathered_rows_are_those_asked_for(data, small_cache):
    cache = fastcache.open_cache(small_cache)
    numbers = np.array(data.draw(st.lists(st.integers(0, cache.n_tokens - 1), max_size=40)), np.int64)
    everything = cache.residuals(HOOK, 0, cache.n_tokens)
    assert np.array_equal(decode(cache.gather(HOOK, numbers), "bfloat16"), everything[numbers])


def test_units_cover_every_row_once(small_cache):
    cache = fastcache.open_cache(small_cache)
    rows = [row + cache.first_row(part) for part, start, stop in cache.units().tolist() for row in range(start, stop)]
    assert rows == list(range(cache.n_tokens))


def test_plain_zarr_reads_the_same_values(small_cache):
    cache = fastcache.open_cache(small_cache)
    group = zarr.open_group(small_cache, mode="r")
    stored = np.concatenate([group[f"parts/{part.record.name}/{HOOK}"][...] for part in cache.parts])
    assert group[f"parts/00000000/{HOOK}"].attrs["logical_dtype"] == "bfloat16"
    assert np.array_equal(decode(stored, "bfloat16"), cache.residuals(HOOK, 0, cache.n_tokens))


def test_zeros_are_written_like_any_value(tmp_path):
    writer = CacheWriter(tmp_path, small_manifest())
    instance = Instance(0, np.zeros(300, np.int32), np.zeros(300, np.uint8), [(0, 0)])
    part = writer.part(0, [instance])
    part.append({HOOK: np.zeros((300, 8), np.float32)})
    record = part.commit({"stored": 1, "truncated": [], "skipped": {}})
    assert f"{HOOK}/c/0/0" in record.files
    assert not fastcache.open_cache(tmp_path).instance(0).residuals(HOOK).any()


def test_opening_needs_neither_torch_nor_transformers(small_cache):
    code = (
        "import sys, fastcache; fastcache.open_cache(sys.argv[1]).instance(0).residuals('resid_post.1');"
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(small_cache)], check=False).returncode == 0


def test_statistics_equal_a_full_second_pass(small_cache):
    cache = fastcache.open_cache(small_cache)
    rows = cache.residuals(HOOK, 0, cache.n_tokens).astype(np.float64)
    types = np.concatenate([instance.token_types for instance in cache.instances()])
    moments = cache.statistics(HOOK)
    for split in ("all", "special", "special_not_first", "content"):
        g, chosen = GROUPS.index(split), rows[select(types, split)]
        assert moments.count[g] == len(chosen)
        # Gathered from the float32 values before they were rounded to bfloat16.
        assert np.allclose(moments.mean[g], chosen.mean(0), atol=5e-3 * np.abs(chosen).max())
        assert np.allclose(moments.squared_deviation[g] / len(chosen), chosen.var(0), rtol=2e-2)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_merged_statistics_equal_those_of_all_rows(sizes):
    rng = np.random.default_rng(len(sizes))
    blocks = [rng.standard_normal((n, 4)).astype(np.float32) * 100 + 1000 for n in sizes]
    types = [rng.choice([1, 8, 17], n).astype(np.uint8) for n in sizes]
    pieces = []
    for block, kinds in zip(blocks, types, strict=True):
        pieces.append(Moments.empty(4))
        pieces[-1].add(block, kinds)
    whole = Moments.empty(4)
    whole.add(np.concatenate(blocks), np.concatenate(types))
    total = merged(pieces, 4)
    assert np.array_equal(total.count, whole.count)
    assert np.allclose(total.mean, whole.mean, rtol=1e-12)
    assert np.allclose(total.squared_deviation, whole.squared_deviation, rtol=1e-8, atol=1e-6)
    assert np.array_equal(total.norm_counts, whole.norm_counts)


def test_norm_quantiles_are_right_to_a_bin():
    rows = np.random.default_rng(0).standard_normal((5000, 16)).astype(np.float32)
    moments = Moments.empty(16)
    moments.add(rows, np.full(5000, 8, np.uint8))
    norms = np.linalg.norm(rows, axis=1)
    for q in (0.01, 0.5, 0.99):
        assert moments.norm_quantile("all", q) == pytest.approx(np.quantile(norms, q), rel=0.05)


def test_a_flipped_bit_is_noticed_on_reading(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "cache")
    shard = tmp_path / f"cache/parts/00000001/{HOOK}/c/0/0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 4
    shard.write_bytes(bytes(data))
    cache = fastcache.open_cache(tmp_path / "cache")
    with pytest.raises(IntegrityError, match=r"00000001/resid_post\.1: unit 0"):
        cache.residuals(HOOK, 0, cache.n_tokens)


@pytest.mark.parametrize("name", ["token_ids/c/0", f"{HOOK}/c/0/0", "instance_offsets/zarr.json"])
def test_a_missing_file_is_named(small_cache, tmp_path, name):
    shutil.copytree(small_cache, tmp_path / "cache")
    (tmp_path / "cache/parts/00000001" / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        list(fastcache.open_cache(tmp_path / "cache").instances())


def test_a_truncated_file_is_named(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "cache")
    shard = tmp_path / f"cache/parts/00000001/{HOOK}/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="c/0/0 has"):
        list(fastcache.open_cache(tmp_path / "cache").instances())


@pytest.mark.parametrize("name", ["token_ids", "token_types", "instance_ids", "document_offsets"])
def test_a_flipped_bit_in_a_token_array_is_noticed(small_cache, tmp_path, name):
    shutil.copytree(small_cache, tmp_path / "cache")
    chunk = tmp_path / f"cache/parts/00000000/{name}/c/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises((IntegrityError, FormatError)):
        list(fastcache.open_cache(tmp_path / "cache").instances())


def test_a_complete_cache_with_a_shorter_log_is_refused(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "cache")
    (tmp_path / "cache/parts.jsonl").unlink()
    with pytest.raises(IntegrityError, match="the log has n_parts = 0"):
        fastcache.open_cache(tmp_path / "cache")


def test_a_committed_part_is_never_written_again(tmp_path):
    write_cache(tmp_path, [[3]])
    with pytest.raises(FormatError, match="is committed"):
        CacheWriter(tmp_path, small_manifest()).part(0, [])


def test_a_writer_killed_between_its_groups_can_go_on(tmp_path):
    write_cache(tmp_path / "cache", [[3]])
    for path in ("parts", "manifest.json", "parts.jsonl"):
        entry = tmp_path / "cache" / path
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    assert len(write_cache(tmp_path / "cache", [[3]])) == 1


def test_a_missing_part_is_named(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/parts/00000001")
    cache = fastcache.open_cache(tmp_path / "cache")
    with pytest.raises(IntegrityError, match="00000001 is listed in the log but missing"):
        list(cache.instances())


def test_a_part_without_its_log_line_does_not_exist(tmp_path):
    write_cache(tmp_path, [[3], [4]])
    log = tmp_path / "parts.jsonl"
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    assert fastcache.open_cache(tmp_path).n_tokens == 3


record = PartRecord(0, 3, 1, {"stored": 1, "truncated": [], "skipped": {}}, {"zarr.json": [5, 6]})


@given(cut=st.integers(1, 60))
def test_a_torn_last_line_is_ignored_and_cut_off(cut, tmp_path_factory):
    root = tmp_path_factory.mktemp("log")
    for index in range(3):
        Log(LocalStorage(root)).append(PartRecord(index, 3, 1, record.ledger, record.files))
    log = root / "parts.jsonl"
    log.write_bytes(log.read_bytes()[:-cut])
    assert [one.index for one in Log(LocalStorage(root)).records] == [0, 1]
    Log(LocalStorage(root)).append(PartRecord(2, 3, 1, record.ledger, record.files))
    assert [one.index for one in Log(LocalStorage(root)).records] == [0, 1, 2]


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_of_an_inner_line_is_noticed(position, bit, tmp_path_factory):
    root = tmp_path_factory.mktemp("log")
    for index in range(3):
        Log(LocalStorage(root)).append(PartRecord(index, 3, 1, record.ledger, record.files))
    log = root / "parts.jsonl"
    data = bytearray(log.read_bytes())
    first_two = data.index(b"\n", data.index(b"\n") + 1)
    data[position % first_two] ^= 1 << bit
    log.write_bytes(bytes(data))
    with pytest.raises((IntegrityError, FormatError)):
        Log(LocalStorage(root))


@given(data=st.binary(max_size=300))
def test_no_bytes_crash_the_log_reader(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("log")
    (root / "parts.jsonl").write_bytes(data)
    with contextlib.suppress(IntegrityError, FormatError):
        assert Log(LocalStorage(root)).records == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=10,
)


@settings(deadline=None)
@given(
    raw=st.fixed_dictionaries(
        {"format": st.just("fastcache"), "format_version": st.just("1.0")},
        optional=dict.fromkeys(
            ("identity", "state", "parity", "totals", "ledger", "statistics", "files", "failed"), json_values
        ),
    )
)
def test_no_manifest_crashes_the_reader(raw, tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    (root / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises((FormatError, InputError)):
        load_manifest(LocalStorage(root))


def log_line(raw):
    text = canonical_json(raw).encode()
    return b"%08x %s\n" % (crc32c(text), text)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../../etc/passwd": [1, 2]}},
        {"files": {"/etc/passwd": [1, 2]}},
        {"files": {"a/./b": [1, 2]}},
        {"files": {"zarr.json": [1]}},
        {"files": []},
        {"n_tokens": -1},
        {"n_tokens": 2**60},
        {"n_tokens": True},
        {"part": "0"},
        {"ledger": []},
    ],
)
def test_forged_records_are_refused(changes, tmp_path):
    (tmp_path / "parts.jsonl").write_bytes(log_line({**record.to_json(), **changes}))
    with pytest.raises(FormatError):
        Log(LocalStorage(tmp_path))


def test_a_part_logged_twice_is_refused(tmp_path):
    (tmp_path / "parts.jsonl").write_bytes(log_line(record.to_json()) * 2)
    with pytest.raises(FormatError, match="listed twice"):
        Log(LocalStorage(tmp_path))


def test_a_part_that_is_a_link_is_refused(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "cache")
    part = tmp_path / "cache/parts/00000000"
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="symbolic link"):
        fastcache.open_cache(tmp_path / "cache").instance(0)


def test_huge_declared_rows_are_refused_without_allocation(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "cache")
    lines = (tmp_path / "cache/parts.jsonl").read_bytes().splitlines()
    raw = json.loads(lines[0].partition(b" ")[2])
    (tmp_path / "cache/parts.jsonl").write_bytes(log_line({**raw, "n_tokens": 2**47}))
    edit_manifest(tmp_path / "cache", state="writing")
    cache = fastcache.open_cache(tmp_path / "cache")
    with pytest.raises(FormatError, match="should be"):
        cache.parts[0].rows(HOOK, 0, 10)


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100 + "]" * 100, '{"a": 1e999}', '{"a": Infinity}', "{"]
)
def test_json_is_strict(text):
    with pytest.raises(FormatError):
        parse_json(text, "here")


def test_a_cache_of_another_major_version_is_refused(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "cache")
    edit_manifest(tmp_path / "cache", format_version="2.0")
    with pytest.raises(FormatError, match=r"format 2\.0; this fastcache reads 1\.x"):
        fastcache.open_cache(tmp_path / "cache")


def test_a_newer_minor_version_is_read(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "cache")
    edit_manifest(tmp_path / "cache", format_version="1.7", novelty={})
    assert fastcache.open_cache(tmp_path / "cache").n_tokens > 0


def test_a_writer_of_another_identity_is_refused(tmp_path):
    write_cache(tmp_path, [[3]])
    before = tree_bytes(tmp_path)
    with pytest.raises(MismatchError, match="d_in: 8 -> 9"):
        CacheWriter(tmp_path, small_manifest(d_in=9))
    assert tree_bytes(tmp_path) == before


def test_hook_points_name_layers():
    assert layer_of(hook_point(18)) == 18
    for name in ("resid_post.-1", "resid_post.01", "resid_pre.1", "resid_post.1/..", ""):
        with pytest.raises(InputError):
            layer_of(name)
