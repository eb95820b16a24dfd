"""What `export` and `train --dry-run` write, or don't; that SAELens loads it is tested in `with_saelens`."""

import json

import pytest
import torch
from conftest import tree_bytes
from safetensors.torch import load_file

from fastcache.pipeline.cli import main
from fastcache.sae.architectures import ARCHITECTURES
from fastcache.sae.storage import save_sae

INFO = {
    "hook_point": "resid_post.3",
    "model": {"name": "m"},
    "method": {"name": "bt-f", "block_size": 512},
    "corpus": {"fingerprint": "abc"},
}
KEYS = {
    "standard": {"W_enc", "W_dec", "b_enc", "b_dec"},
    "topk": {"W_enc", "W_dec", "b_enc", "b_dec"},
    "jumprelu": {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"},
    "gated": {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"},
}
AS = {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}


def saved(folder, name):
    sae = ARCHITECTURES[name](8, 16, **({"k": 4} if "topk" in name or name == "matryoshka" else {}))
    for value in sae.parameters():
        value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(0)))
    save_sae(folder, sae, INFO)
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exported_files_have_saelens_keys(name, tmp_path, capsys):
    main(["export", "--sae", str(saved(tmp_path / "sae", name)), "--out", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out/cfg.json").read_text())
    assert config["architecture"] == AS.get(name, name)
    assert set(load_file(tmp_path / "out/sae_weights.safetensors")) == KEYS[config["architecture"]]
    assert config["metadata"]["sae_lens_version"].startswith("6.")  # older, and SAELens drops the metadata in silence
    assert config["normalize_activations"] == "none"
    assert (config["metadata"]["hook_name"], config["metadata"]["context_size"]) == ("blocks.3.hook_resid_post", 512)
    assert "SAE.load_from_disk" in capsys.readouterr().out


def test_an_export_is_left_alone_when_it_is_there(tmp_path, capsys):
    arguments = ["export", "--sae", str(saved(tmp_path / "sae", "jumprelu")), "--out", str(tmp_path / "out")]
    main(arguments)
    before = tree_bytes(tmp_path / "out")
    main(arguments)
    assert tree_bytes(tmp_path / "out") == before
    assert "nothing to do" in capsys.readouterr().out


def test_a_folder_without_an_sae_is_not_exported(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--sae", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "sae.json is missing" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(small_cache, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", "--cache", str(small_cache), "--arch", "topk", "--layer", "1", "--dry-run", "--tokens", "25_600"])
    printed = capsys.readouterr().out
    for text in ("Steps: 100 of 256 tokens", "Memory: about", "Disk: ", "Time: about", "k 8", "Nothing was written"):
        assert text in printed
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_training_would(small_cache, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--cache", str(small_cache), "--arch", "topk", "--dry-run"])
    assert "none was chosen" in " ".join(capsys.readouterr().err.split())


def test_a_batch_larger_than_the_cache_leaves_nothing_behind(small_cache, tmp_path, capsys):
    arguments = ["train", "--cache", str(small_cache), "--arch", "topk", "--layer", "1", "--out", str(tmp_path / "sae")]
    with pytest.raises(SystemExit):
        main([*arguments, "--batch-size", "1_000_000"])
    assert "fewer than one batch" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "sae").exists()
