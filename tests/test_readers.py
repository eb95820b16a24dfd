"""Any Zarr v3 tool opens a cache: zarr-python, zarrs and tensorstore read every value of every array."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from make_golden import GOLDEN
from test_quantize import residual_like, write

from fastcache.cache_format.schema import FORMAT_VERSION, UNIT_ROWS

CACHES = [GOLDEN / f"{FORMAT_VERSION}-{dtype}" for dtype in ("bfloat16", "int8")]


def arrays(root: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(root)) for path in root.glob("parts/*/*/zarr.json"))


def with_zarr(path: Path) -> np.ndarray:
    return zarr.open_array(path, mode="r")[...]


def with_zarrs(path: Path) -> np.ndarray:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return zarr.open_array(path, mode="r")[...]


def with_tensorstore(path: Path) -> np.ndarray:
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


def by_hand(path: Path) -> np.ndarray:
    """The values by the text of docs/FORMAT.md alone, without fastcache's code."""
    from numcodecs.zstd import Zstd

    metadata = json.loads((path / "zarr.json").read_text())
    shape, dtype = tuple(metadata["shape"]), np.dtype(metadata["data_type"])
    if 0 in shape:
        return np.empty(shape, dtype)
    if metadata["codecs"][0]["name"] != "sharding_indexed":
        data = (path / "/".join(["c", *["0"] * len(shape)])).read_bytes()
        return np.frombuffer(Zstd().decode(data), dtype).reshape(shape)
    shard_rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    unit_rows = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
    rows = []
    for shard in range(-(-shape[0] // shard_rows)):
        data = (path / f"c/{shard}/0").read_bytes()
        index = np.frombuffer(data[-16 * (shard_rows // unit_rows) - 4 : -4], "<u8").reshape(-1, 2)
        for offset, length in index[index[:, 0] < 2**64 - 1].tolist():
            rows.append(np.frombuffer(data[offset : offset + length], dtype).reshape(unit_rows, shape[1]))
    return np.concatenate(rows)[: shape[0]]


@pytest.mark.parametrize("reader", [with_zarr, with_zarrs, with_tensorstore])
@pytest.mark.parametrize("root", CACHES, ids=lambda path: path.name)
def test_every_array_of_a_cache_is_read_by(reader, root):
    for name in arrays(root):
        assert np.array_equal(reader(root / name), by_hand(root / name)), name


@pytest.mark.parametrize("reader", [with_zarr, with_zarrs, with_tensorstore])
def test_several_shards_and_raw_rows_are_read_by(reader, tmp_path, monkeypatch):
    monkeypatch.setattr("fastcache.cache_format.schema.SHARD_BYTES", 3 * UNIT_ROWS * 64)
    write(tmp_path, residual_like(5_000))
    assert len(list(tmp_path.glob("parts/00000000/resid_post.1/c/*"))) > 5
    for name in arrays(tmp_path):
        assert np.array_equal(reader(tmp_path / name), by_hand(tmp_path / name)), name
