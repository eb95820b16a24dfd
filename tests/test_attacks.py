"""Caches made to do harm: each is refused with an error of ours, before anything large is allocated or left."""

import json
import os
import shutil
import tracemalloc
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import synthetic
import zarr
from conftest import edit_manifest, tree_bytes
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_format import json_values, log_line
from test_verify import edit_manifest_like_us, forge, problems

import fastcache
from fastcache.cache_format.arrays import encode_chunk, parse_index, to_bytes
from fastcache.cache_format.storage import LocalStorage
from fastcache.cache_format.verify import verify
from fastcache.errors import FastcacheError, FormatError, IntegrityError

HOOK = synthetic.HOOK
LENGTHS = ((300, 7), (20,))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    synthetic.write(root, LENGTHS)
    return root


@pytest.fixture
def root(original, tmp_path):
    return shutil.copytree(original, tmp_path / "cache")


@contextmanager
def little_memory(megabytes=30):
    """Less than so much is allocated inside."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 2**20


def read_everything(place):
    cache = fastcache.open_cache(place)
    for part in cache.parts:
        _ = part.tokens
        part.moments(HOOK)
    cache.residuals(HOOK, 0, cache.n_tokens)
    return [instance.corpus_rows for instance in cache.instances()]


def refused(place, match=None):
    """Reading raises an error of ours; verify finds something, without raising."""
    with little_memory(), pytest.raises(FastcacheError, match=match):
        read_everything(place)
    with little_memory():
        assert problems(place)


def put(root, name, data, part=0):
    """Put a file into a part, with a log that says the same."""
    path = root / f"parts/{part:08d}/{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    relog(root, part, lambda record: record["files"].update({name: [len(data), crc32c(data)]}))


def relog(root, part, change):
    log = root / "parts.jsonl"
    records = [json.loads(line[9:]) for line in log.read_bytes().splitlines()]
    change(records[part])
    log.write_bytes(b"".join(map(log_line, records)))


def remeta(root, array, change, part=0):
    metadata = json.loads((root / f"parts/{part:08d}/{array}/zarr.json").read_bytes())
    change(metadata)
    put(root, f"{array}/zarr.json", to_bytes(metadata), part)


def test_the_cache_of_these_tests_is_whole(root):
    assert list(verify(LocalStorage(root))) == []
    read_everything(root)


# Paths


@pytest.mark.parametrize("name", ["../zarr.json", "/etc/passwd", "a//b", "./zarr.json", "a\\b", "", "a/.."])
def test_paths_that_leave_the_cache_are_refused(name, root):
    edit_manifest(root, files={name: [1, 1]})
    refused(root, "not a path inside")


@pytest.mark.parametrize("hook", ["resid_post.1/../../..", "../resid_post.1", "resid_post.1\0", "/resid_post.1"])
def test_hook_points_are_no_paths(hook, root):
    raw = json.loads((root / "manifest.json").read_bytes())["identity"]
    edit_manifest(root, identity={**raw, "hook_points": [hook]})
    refused(root, "not a hook point")


@pytest.mark.parametrize(
    "name", ["parts", "parts/00000000", f"parts/00000000/{HOOK}", "parts/00000000/token_ids/c", "parts/00000000/token_ids/c/0"]
)  # fmt: skip
def test_links_are_not_followed(name, root, tmp_path):
    (root / name).rename(tmp_path / "outside")
    (root / name).symlink_to(tmp_path / "outside")
    refused(root, "symbolic link")


@pytest.mark.parametrize("name", ["manifest.json", "parts.jsonl", "zarr.json", "parts/00000000/token_ids/c/0"])
def test_pipes_are_not_waited_for(name, root):
    (root / name).unlink()
    os.mkfifo(root / name)
    assert problems(root)
    if name != "zarr.json":
        with pytest.raises(FastcacheError):
            read_everything(root)


# Sizes


@pytest.mark.parametrize(
    "array", ["token_ids", "token_types", "instance_offsets", "document_ids", HOOK, f"{HOOK}.crc32c"]
)
def test_a_huge_declared_shape_allocates_nothing(array, root):
    remeta(root, array, lambda metadata: metadata["shape"].__setitem__(0, 2**46))
    refused(root)


@pytest.mark.parametrize("field", ["n_tokens", "n_instances"])
def test_huge_counts_allocate_nothing_though_everything_agrees_with_them(field, root):
    huge = 2**44
    changes = {
        "n_tokens": {"token_ids": huge, "token_types": huge, HOOK: huge, f"{HOOK}.crc32c": huge // 256},
        "n_instances": {"instance_ids": huge, "instance_offsets": huge + 1},
    }
    for array, size in changes[field].items():

        def change(metadata, size=size):
            metadata["shape"][0] = size
            if "sharding" not in json.dumps(metadata):
                metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = size

        remeta(root, array, change)
    relog(root, 0, lambda record: record.update({field: huge}))
    edit_manifest_like_us(root, state="writing")
    cache = fastcache.open_cache(root)
    for read in (lambda: cache.parts[0].tokens, lambda: cache.parts[0].rows(HOOK, 0, 5)):
        if field == "n_tokens" or "tokens" in read.__code__.co_names:
            with little_memory(), pytest.raises(FastcacheError):
                read()
    with little_memory():
        assert problems(root)


@pytest.mark.parametrize("chunk", [[2**50], [0], [-1], ["x"], [], None, [True]])
def test_foreign_chunks_of_any_size_are_refused(chunk, root):
    remeta(root, "token_ids", lambda metadata: metadata["chunk_grid"]["configuration"].update(chunk_shape=chunk))
    refused(root)


def frame_without_size(n):
    """A zstd frame of `n` zeros (RFC 8878) that doesn't say how many."""
    return b"\x28\xb5\x2f\xfd\x00\x58" + ((n << 3) | 0b011).to_bytes(3, "little") + b"\0"


@pytest.mark.parametrize(
    "chunk",
    [
        encode_chunk(np.zeros(10**8, np.uint8)),
        encode_chunk(np.zeros(3, np.uint8)),
        frame_without_size(307 * 4),
        frame_without_size(100_000),
        b"\x28\xb5\x2f\xfd\xe0" + (307 * 4).to_bytes(8, "little"),
        b"\x28\xb5\x2f\xfd",
        b"",
        encode_chunk(np.zeros(307, np.int32)) + b"more",
    ],
    ids=["bomb", "short", "no-size", "no-size-bomb", "header-only", "magic-only", "empty", "more"],
)
def test_chunks_that_are_not_what_the_shape_says_are_refused(chunk, root):
    put(root, "token_ids/c/0", chunk)
    refused(root)


def test_a_chunk_that_claims_terabytes_is_refused_in_a_foreign_layout_too(root):
    remeta(root, "token_ids", lambda metadata: metadata["codecs"][1]["configuration"].update(level=7))
    put(root, "token_ids/c/0", b"\x28\xb5\x2f\xfd\xe0" + (2**50).to_bytes(8, "little") + b"\x01\0\0")
    refused(root, "can't be decoded")


# JSON


def deep(n):
    return json.loads("[" * n + "]" * n)


@pytest.mark.parametrize("n", [70, 500])
def test_deep_json_is_refused_wherever_it_stands(n, root, original):
    edit_manifest(root, parity={"deep": deep(n)})
    refused(root, "nested deeper")
    shutil.copy(original / "manifest.json", root)
    relog(root, 0, lambda record: record["ledger"].update(deep=deep(n)))
    refused(root, "nested deeper")
    shutil.copy(original / "parts.jsonl", root)
    remeta(root, "token_ids", lambda metadata: metadata.update(attributes={"deep": deep(n)}))
    refused(root, "nested deeper")


def test_json_deeper_than_python_itself_can_go_is_refused(root):
    (root / "manifest.json").write_text("[" * 10**6)
    refused(root, "is not the JSON")


def test_a_large_file_is_not_read(root):
    with (root / "manifest.json").open("r+b") as file:
        file.truncate(2**40)  # sparse: takes no space
    refused(root, "larger than 256 MiB")


# Arrays


@pytest.mark.parametrize(
    "array", ["token_ids", "token_types", "instance_ids", HOOK, f"{HOOK}.crc32c", f"{HOOK}.statistics.count"]
)
@pytest.mark.parametrize("dtype", ["int16", "float64", "bytes", "string", None, 7, {"name": "object"}])
def test_other_dtypes_are_refused(array, dtype, root):
    remeta(root, array, lambda metadata: metadata.update(data_type=dtype))
    refused(root)


@pytest.mark.parametrize("array", ["instance_offsets", "document_offsets"])
@pytest.mark.parametrize(
    "change",
    [
        lambda offsets: offsets - 5,
        lambda offsets: -offsets,
        lambda offsets: offsets * 2,
        lambda offsets: offsets[[0, 2, 1]],
        lambda offsets: np.array([0, 0, offsets[-1]]),
        lambda offsets: np.array([0, 2**62, offsets[-1]]),
        lambda offsets: offsets - np.array([0, 0, 1]),
    ],
)
def test_offsets_that_overlap_or_leave_the_part_are_refused(array, change, root):
    offsets = fastcache.open_cache(root).parts[0].tokens[array]
    forge(root, 0, array, change(offsets))
    refused(root, "should rise from 0")


def test_a_part_listed_twice_is_refused(root):
    relog(root, 1, lambda record: record.update(part=0))
    refused(root, "listed twice")


@pytest.mark.parametrize("missing", [f"{HOOK}/c/0/0", "token_ids/c/0", "token_ids/zarr.json", f"{HOOK}.crc32c/c/0"])
def test_files_that_the_log_does_not_list_are_not_read(missing, root):
    relog(root, 0, lambda record: record["files"].pop(missing))
    refused(root)


# Shard indices

UNIT = 256 * 8 * 2
N_UNITS = 2


def index(entries, crc=None):
    data = np.array(entries, np.uint64).astype("<u8").tobytes()
    return data + (crc32c(data) if crc is None else crc).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("entries", "crc"),
    [
        ([[UNIT * 5, UNIT], [0, UNIT]], None),
        ([[2**64 - UNIT, UNIT], [0, UNIT]], None),
        ([[2**64 - 1, 2**64 - 1], [0, UNIT]], None),
        ([[0, UNIT], [0, UNIT]], None),
        ([[0, UNIT], [UNIT - 1, UNIT]], None),
        ([[0, UNIT + 1], [UNIT, UNIT]], None),
        ([[0, 0], [UNIT, UNIT]], None),
        ([[0, UNIT], [UNIT, UNIT]], 12345),
        ([[UNIT, UNIT], [0, UNIT]], None),
    ],
    ids=["beyond", "overflow", "absent", "same", "overlap", "long", "zero", "checksum", "swapped"],
)
def test_a_forged_shard_index_is_refused(entries, crc, root):
    shard = (root / f"parts/00000000/{HOOK}/c/0/0").read_bytes()
    put(root, f"{HOOK}/c/0/0", shard[: N_UNITS * UNIT] + index(entries, crc))
    refused(root)


def test_a_shard_may_hold_its_units_in_any_order(root):
    shard = (root / f"parts/00000000/{HOOK}/c/0/0").read_bytes()
    before = fastcache.open_cache(root).residuals(HOOK, 0, 327)
    swapped = shard[UNIT : 2 * UNIT] + shard[:UNIT] + index([[UNIT, UNIT], [0, UNIT]])
    put(root, f"{HOOK}/c/0/0", swapped)
    assert np.array_equal(fastcache.open_cache(root).residuals(HOOK, 0, 327), before)
    assert problems(root) == []
    put(root, f"{HOOK}/c/0/0", swapped[: UNIT + 5] + b"!" + swapped[UNIT + 6 :])
    assert any("unit 0" in finding.problem for finding in problems(root))


@settings(deadline=None, max_examples=300)
@given(st.binary(min_size=4, max_size=120), st.integers(1, 4), st.integers(1, 2**40), st.booleans())
def test_no_bytes_crash_the_reader_of_an_index(data, n_units, shard_bytes, is_signed):
    data = data[: (len(data) - 4) // 16 * 16]
    data += (crc32c(data) if is_signed else 7).to_bytes(4, "little")
    with suppress(FormatError, IntegrityError):
        offsets = parse_index(data, n_units, UNIT, shard_bytes, "here")
        assert len(offsets) == n_units
        assert (offsets + UNIT <= shard_bytes).all()


# Versions and other layouts


def test_a_newer_minor_version_is_read_and_verified_but_not_written(root):
    edit_manifest(root, format_version="1.9", novelty={"x": 1})
    before = tree_bytes(root)
    read_everything(root)
    assert problems(root) == []
    with pytest.raises(FormatError, match=r"has cache format 1\.9; this fastcache reads it but writes"):
        synthetic.write(root, LENGTHS)
    assert tree_bytes(root) == before


@pytest.mark.parametrize(
    "version", ["2.0", "0.9", "1", "1.x", "", "1.1.1", "99999999999.0", "-1.0", "1.-1", "\u0661.\u0660"]
)
def test_other_versions_are_refused(version, root):
    edit_manifest(root, format_version=version)
    refused(root)


def test_a_flip_from_1_1_to_1_0_does_not_switch_the_checksum_off(root):
    text = (root / "manifest.json").read_text().replace('"format_version": "1.1"', '"format_version": "1.0"')
    (root / "manifest.json").write_text(text)
    refused(root, "differs from its checksum")


def as_foreign(root, array, **layout):
    """Lay an array out otherwise, as Zarr allows."""
    folder = root / f"parts/00000000/{array}"
    values, attributes = zarr.open_array(folder, mode="r")[...], zarr.open_array(folder, mode="r").attrs.asdict()
    shutil.rmtree(folder)
    zarr.create_array(folder, data=values, attributes=attributes, write_data=True, **layout)
    files = {f"{array}/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def change(record):
        kept = {name: entry for name, entry in record["files"].items() if not name.startswith(f"{array}/")}
        record["files"] = {**kept, **{name: [len(data), crc32c(data)] for name, data in files.items()}}

    relog(root, 0, change)
    edit_manifest_like_us(root, state="writing")


@pytest.mark.parametrize(("array", "chunks"), [("token_ids", (50,)), (HOOK, (100, 8)), (f"{HOOK}.crc32c", (1,))])
def test_arrays_that_only_zarr_can_read_are_read_and_verified(array, chunks, root, original):
    as_foreign(root, array, chunks=chunks)
    assert problems(root) == []
    cache = fastcache.open_cache(original)
    found = fastcache.open_cache(root)
    assert np.array_equal(found.residuals(HOOK, 0, 327), cache.residuals(HOOK, 0, 327))
    assert np.array_equal(found.instance(0).token_ids, cache.instance(0).token_ids)


def test_damage_in_an_array_that_only_zarr_can_read_is_found(root):
    as_foreign(root, HOOK, chunks=(100, 8), compressors=None)
    chunk = (root / f"parts/00000000/{HOOK}/c/1/0").read_bytes()
    put(root, f"{HOOK}/c/1/0", chunk[:10] + b"!" + chunk[11:])
    assert any("unit 0" in finding.problem for finding in problems(root))


# Fuzzing: what is read is right, or the error is ours


def leaves(value, path=()):
    """The paths of all values inside `value`."""
    yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(child, (*path, key))


def with_other(value, path, other):
    if not path:
        return other
    copy = value.copy()
    copy[path[0]] = with_other(copy[path[0]], path[1:], other)
    return copy


odd = json_values | st.sampled_from([-1, 2**31, 2**47, 2**63, 2**64, 10**30, 1.5, "", "..", "a" * 300, [[]], {"": {}}])


@pytest.fixture(scope="module")
def fuzzed(original, tmp_path_factory):
    """A copy whose files are put back after each example: a copy for each would take as long as all else."""
    return shutil.copytree(original, tmp_path_factory.mktemp("fuzzed") / "cache")


@contextmanager
def put_back(root, *names):
    before = {name: (root / name).read_bytes() for name in names}
    try:
        yield
    finally:
        for name, data in before.items():
            (root / name).write_bytes(data)


def survives(place):
    with suppress(FastcacheError):
        read_everything(place)
    for finding in verify(LocalStorage(place), workers=1):
        assert "can't be checked" not in finding.problem, finding


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_manifest_does_harm(data, fuzzed):
    raw = json.loads((fuzzed / "manifest.json").read_bytes())
    path = data.draw(st.sampled_from(list(leaves(raw))[1:]))
    other = data.draw(odd)
    with put_back(fuzzed, "manifest.json"):
        edit_manifest(fuzzed, **with_other(raw, path, other))
        survives(fuzzed)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_log_does_harm(data, fuzzed):
    lines = (fuzzed / "parts.jsonl").read_bytes().splitlines()
    raw = json.loads(lines[0][9:])
    changed = with_other(raw, data.draw(st.sampled_from(list(leaves(raw)))), data.draw(odd))
    with put_back(fuzzed, "parts.jsonl"):
        (fuzzed / "parts.jsonl").write_bytes(log_line(changed) + lines[1] + b"\n")
        survives(fuzzed)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), array=st.sampled_from(["token_ids", "instance_offsets", HOOK, f"{HOOK}.crc32c"]))
def test_no_metadata_of_an_array_does_harm(data, array, fuzzed):
    metadata = f"parts/00000000/{array}/zarr.json"
    raw = json.loads((fuzzed / metadata).read_bytes())
    changed = with_other(raw, data.draw(st.sampled_from(list(leaves(raw)))), data.draw(odd))
    with put_back(fuzzed, metadata, "parts.jsonl"):
        put(fuzzed, f"{array}/zarr.json", to_bytes(changed))
        survives(fuzzed)


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=400), name=st.sampled_from(["manifest.json", "parts.jsonl", "zarr.json"]))
def test_no_bytes_do_harm(data, name, fuzzed):
    with put_back(fuzzed, name):
        (fuzzed / name).write_bytes(data)
        survives(fuzzed)


def test_the_fuzzed_cache_was_put_back(fuzzed, original):
    assert tree_bytes(fuzzed) == tree_bytes(original)
