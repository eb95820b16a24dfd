"""int8 caches: opt-in, near to the rows, sinks kept raw, the loss measured and told."""

import numpy as np
import pytest
from conftest import run_extract
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastcache
from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.quantize import Scheme
from fastcache.cache_format.statistics import GROUPS
from fastcache.cache_format.stream import unit_stream
from fastcache.cache_format.writer import CacheWriter

HOOK = "resid_post.1"
D_IN = 64


def residual_like(n, seed=0):
    """Rows with a few massive dimensions, and a sink with hundreds of times the norm at every 50th token."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, D_IN)) * np.exp(rng.standard_normal(D_IN)) + rng.standard_normal(D_IN)
    rows[:, :2] = rows[:, :2] * 50 + 300
    rows[::50] *= 200
    return rows.astype(np.float32)


def write(root, rows, length=50):
    starts = range(0, len(rows), length)
    types = np.full(length, 8, np.uint8)
    types[0] = 17
    pieces = [rows[start : start + length] for start in starts]
    instances = [
        Instance(i, np.zeros(len(piece), np.int32), types[: len(piece)], [(i, 0)]) for i, piece in enumerate(pieces)
    ]
    with CacheWriter(root, Manifest({"hook_points": [HOOK], "d_in": rows.shape[1], "dtype": "int8"})) as writer:
        part = writer.part(0, instances)
        for piece in pieces:
            part.append({HOOK: piece})
        part.commit({"stored": len(instances), "truncated": [], "skipped": {}})
    return fastcache.open_cache(root)


@pytest.fixture(scope="module", params=[700, 9_001])
def written(request, tmp_path_factory):
    rows = residual_like(request.param)
    return rows, write(tmp_path_factory.mktemp("int8"), rows)


def test_rows_are_read_back_nearly(written):
    rows, cache = written
    found = cache.residuals(HOOK, 0, len(rows))
    ordinary = np.arange(len(rows)) % 50 != 0
    lost = np.square(found[ordinary] - rows[ordinary]).sum(0) / np.square(rows[ordinary] - rows[ordinary].mean(0)).sum(
        0
    )
    assert lost.max() < 2e-4  # of every dimension's own variance, massive or not


def test_sinks_are_kept_to_the_bit(written):
    rows, cache = written
    assert np.array_equal(cache.residuals(HOOK, 0, len(rows))[::50], rows[::50])


def test_the_loss_is_measured_and_told(written):
    rows, cache = written
    summary = cache.summary(HOOK)
    found = cache.residuals(HOOK, 0, len(rows)).astype(np.float64)
    content = np.arange(len(rows)) % 50 != 0
    expected = (
        np.square(found - rows)[content].sum() / np.square(rows[content] - rows[content].mean(0, np.float64)).sum()
    )
    assert summary["content"]["quantization_fvu"] == pytest.approx(expected, rel=1e-4)
    assert 1e-6 < expected < 1.5e-4
    assert summary["first"]["quantization_fvu"] == 0
    assert set(summary) == set(GROUPS)


def test_units_of_the_stream_are_the_rows(written):
    rows, cache = written
    whole = cache.residuals(HOOK, 0, len(rows))
    units = cache.units()
    for read in unit_stream(cache, HOOK, range(len(units))):
        _, start, stop = units[read.unit]
        assert np.array_equal(read.rows, whole[start:stop])


def test_an_int8_cache_takes_half_the_space_of_bfloat16(tmp_path):
    rows = residual_like(9_001)
    write(tmp_path, rows)
    size = sum(path.stat().st_size for path in tmp_path.glob(f"parts/*/{HOOK}*/c/**/*") if path.is_file())
    assert size < 0.75 * 2 * rows.size  # a fiftieth of the rows is raw here, and 64 dimensions are few for a scale


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 40), st.integers(1, 6)), elements=st.floats(-(2.0**60), 2.0**60, width=32)
    )
)
def test_no_finite_rows_make_anything_but_finite_rows(rows):
    scheme = Scheme.of(rows)
    quantised, scales, raw = scheme.encode(rows)
    decoded = scheme.decode(quantised, scales)
    assert np.isfinite(decoded[~raw]).all()
    assert np.isfinite(scales).all()


def test_extract_makes_an_int8_cache_and_its_manifest_tells_the_loss(tiny_qwen, chat_corpus, tmp_path):
    exact = run_extract(tiny_qwen, chat_corpus, tmp_path / "exact")
    cache = run_extract(tiny_qwen, chat_corpus, tmp_path / "int8", dtype="int8")
    assert cache.manifest.statistics[HOOK]["content"]["quantization_fvu"] < 2e-4
    found, rows = cache.instance(0).residuals(HOOK), exact.instance(0).residuals(HOOK)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - rows).max() < 0.05 * np.abs(rows).max()
