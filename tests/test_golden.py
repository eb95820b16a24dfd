"""Caches written by earlier versions, opened by this one: every value is the one that was put in."""

import numpy as np
import pytest
from make_golden import GOLDEN, HOOKS, LENGTHS, golden_rows, golden_tokens

import fastcache
from fastcache.cache_format.schema import FORMAT_VERSION

CACHES = sorted(path.name for path in GOLDEN.iterdir())


def test_there_is_a_golden_cache_of_this_version():
    assert any(name.startswith(f"{FORMAT_VERSION}-") for name in CACHES)


@pytest.mark.parametrize("name", CACHES)
def test_a_golden_cache_holds_what_was_put_in(name):
    cache = fastcache.open_cache(GOLDEN / name)
    lengths = [n for part in LENGTHS for n in part]
    assert cache.complete
    assert [len(instance) for instance in cache.instances()] == lengths
    for number, (instance, n) in enumerate(zip(cache.instances(), lengths, strict=True)):
        token_ids, token_types = golden_tokens(number, n)
        assert np.array_equal(instance.token_ids, token_ids)
        assert np.array_equal(instance.token_types, token_types)
        assert instance.corpus_rows == [100 + number]
        for hook in HOOKS:
            loss = 0.06 if name.endswith("int8") else 0  # half a step
            assert np.abs(instance.residuals(hook) - golden_rows(hook, number, n)).max() <= loss


@pytest.mark.parametrize("name", [name for name in CACHES if name.startswith(f"{FORMAT_VERSION}-")])
def test_a_golden_cache_is_written_again_to_the_byte(name, tmp_path, monkeypatch):
    import make_golden
    from conftest import tree_bytes

    monkeypatch.setattr(make_golden, "GOLDEN", tmp_path)
    dtype = name.partition("-")[2]
    make_golden.main(dtype)
    made = tmp_path / f"{FORMAT_VERSION}-{dtype}" / "parts"
    assert tree_bytes(made) == tree_bytes(GOLDEN / name / "parts")
