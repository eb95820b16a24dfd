"""Damage: every file that is gone or cut, and every single bit, is noticed.

`make test-faults` runs the long versions too.
"""

import contextlib
import random

import numpy as np
import pytest
import synthetic
from conftest import tree_bytes

import fastcache
from fastcache.cache_format.storage import LocalStorage
from fastcache.cache_format.verify import check_above, verify
from fastcache.cache_format.verify_part import Findings, PartCheck
from fastcache.errors import FastcacheError, IntegrityError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of an undisturbed cache."""
    root = tmp_path_factory.mktemp("whole")
    synthetic.write(root)
    return tree_bytes(root)


@pytest.mark.parametrize("damage", ["deleted", "cut", "longer", "empty"])
def test_any_file_that_is_gone_or_of_another_length_is_named(damage, whole, tmp_path):
    synthetic.write(tmp_path)
    for name, data in whole.items():
        path = tmp_path / name
        if damage == "deleted":
            path.unlink()
        else:
            path.write_bytes({"cut": data[:-1], "longer": data + b"\0", "empty": b""}[damage])
        found = [finding.file for finding in verify(LocalStorage(tmp_path), quick=True) if not finding.is_note]
        assert name in found, found
        path.write_bytes(data)


class Memory:
    """A cache in memory, as a storage to read from."""

    url = "memory"

    def __init__(self, files):
        self.files = {name: bytearray(data) for name, data in files.items()}

    def read(self, name, limit=0):
        if name not in self.files:
            raise FileNotFoundError(name)
        return bytes(self.files[name])

    def read_into(self, name, offset, buffer):
        data = self.files[name][offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise IntegrityError(f"{name} ends early")
        buffer[:] = data

    def sizes(self, folder):
        return {
            name[len(folder) + 1 :]: len(data) for name, data in self.files.items() if name.startswith(f"{folder}/")
        }

    def zarr_store(self, folder):
        raise NotImplementedError


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def tiny(request, tmp_path_factory):
    """The files of a complete cache of a few tens of kilobytes, and what stands above its parts."""
    root = tmp_path_factory.mktemp("tiny")
    synthetic.write(root, ((3, 2), (4,)), d_in=4, dtype=request.param)
    storage = Memory(tree_bytes(root))
    findings = Findings("memory")
    manifest, records = check_above(storage, findings)
    assert findings.found == [], findings.found
    assert list(verify(storage)) == []
    return storage, manifest, records


def is_noticed(tiny, name):
    """Whether the checks of the place where the file `name` stands find anything."""
    storage, manifest, records = tiny
    if not name.startswith("parts/0"):
        findings = Findings("memory")
        check_above(storage, findings)
        return bool(findings.problems())
    record = next(one for one in records if name.startswith(f"parts/{one.name}/"))
    return any(work()[0] for work in PartCheck(storage, record, manifest).work(quick=False))


def missed(tiny, flips):
    """Of these bits, given as file, byte and bit, those whose flip nobody notices."""
    storage = tiny[0]
    unseen = []
    for name, position, bit in flips:
        storage.files[name][position] ^= 1 << bit
        if not is_noticed(tiny, name):
            unseen.append((name, position, bit))
        storage.files[name][position] ^= 1 << bit
    return unseen


def all_bits(storage):
    return [(name, i, bit) for name, data in storage.files.items() for i in range(len(data)) for bit in range(8)]


def test_flips_of_random_bits_are_noticed(tiny):
    """Some of every file: all bits of the log's first bytes and of the shards' index, samples of the rest."""
    rng = random.Random(0)
    flips = []
    for name, data in tiny[0].files.items():
        n = 800 if name in ("manifest.json", "parts.jsonl") else 60
        flips += [(name, rng.randrange(len(data)), rng.randrange(8)) for _ in range(n)]
        edges = range(max(0, len(data) - 20), len(data)) if "/c/" in name or name == "parts.jsonl" else range(10)
        flips += [(name, i, bit) for i in edges if i < len(data) for bit in range(8)]
    assert missed(tiny, flips) == []


@pytest.mark.long
def test_every_single_bit_is_noticed(tiny):
    flips = all_bits(tiny[0])
    assert len(flips) > 100_000
    assert missed(tiny, flips) == []


def test_reading_a_cache_with_a_flipped_bit_gives_the_right_values_or_an_error(tiny, tmp_path_factory):
    """What readers check by themselves: no value is ever wrong, in token arrays and residuals."""
    from fastcache.cache_format.reader import Cache

    storage = tiny[0]

    def values():
        cache = Cache(storage)
        tokens = [part.tokens[name].tobytes() for part in cache.parts for name in sorted(part.tokens)]
        return [*tokens, cache.residuals(synthetic.HOOK, 0, cache.n_tokens).tobytes()]

    right = values()
    rng = random.Random(1)
    for name, data in storage.files.items():
        if "int8.mean" in name or "int8.deviation" in name or ".statistics." in name:
            continue
        for _ in range(25):
            position, bit = rng.randrange(len(data)), rng.randrange(8)
            data[position] ^= 1 << bit
            with contextlib.suppress(FastcacheError):
                assert values() == right, (name, position, bit)
            data[position] ^= 1 << bit


def test_the_synthetic_cache_is_what_it_says(tmp_path):
    synthetic.write(tmp_path)
    cache = fastcache.open_cache(tmp_path)
    assert [len(one) for one in cache.instances()] == [n for part in synthetic.LENGTHS for n in part]
    assert np.allclose(cache.instance(2).residuals(synthetic.HOOK), synthetic.rows_of(2, 20, 8), rtol=0.01)
