"""A cache that was written without the parity check: `inspect`, `train` and the report say so."""

import pytest
from click.testing import CliRunner
from conftest import run_extract

from fastcache.cache_format.manifest import Manifest
from fastcache.pipeline.cli import cli
from fastcache.progress import Silent

NEVER = "never compared with the plain model"


@pytest.fixture(scope="module")
def unchecked(tiny_qwen, chat_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("unchecked") / "cache"
    run_extract(tiny_qwen, chat_corpus, out, layer=(1, 3), parity=0)
    return out


def manifest(checked, **model):
    identity = {"hook_points": ["resid_post.1", "resid_post.3"], "model": model}
    return Manifest(identity, parity={"hook_points": {hook: {} for hook in checked}})


def test_only_hook_points_without_figures_are_named():
    assert not manifest(["resid_post.1", "resid_post.3"]).unchecked()
    assert manifest(["resid_post.1"]).unchecked() == (
        f"The values at resid_post.3 were {NEVER}: it ran with --parity 0."
    )
    assert not manifest(["resid_post.1"]).unchecked(["resid_post.1"])
    assert "quantised" in manifest([], quantisation={"bits": 4}).unchecked()


def test_inspect_says_so(unchecked, small_cache):
    def shown(cache):
        return " ".join(CliRunner().invoke(cli, ["inspect", str(cache)]).output.split())

    assert NEVER in shown(unchecked)
    assert NEVER not in shown(small_cache)


def test_train_says_so(unchecked, tmp_path, monkeypatch):
    from fastcache.stages.train.config import TrainConfig
    from fastcache.stages.train.run import train

    said = []
    monkeypatch.setattr(Silent, "say", lambda _self, text: said.append(text))
    config = TrainConfig(
        cache=str(unchecked), arch="topk", layer=3, expansion=2, batch_size=64, tokens=640, device="cpu"
    )
    train(config, tmp_path / "sae", Silent())
    assert [text for text in said if NEVER in text and "resid_post.3" in text and "resid_post.1" not in text]


def test_the_report_says_so(unchecked):
    from fastcache.stages.report.run import _cache

    assert NEVER in _cache(unchecked)["unchecked"]
