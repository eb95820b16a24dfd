"""What `train` prints and logs at the end is measured on the SAE that it saves; what isn't known yet is said so."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import fastcache
from fastcache.figures import figure
from fastcache.files import read_json_lines
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.stages.train.config import ARCHES, TrainConfig
from fastcache.stages.train.run import train
from fastcache.stages.train.sweep import sweep
from fastcache.stages.train.sweep_config import sweep_config

HOOK = "resid_post.1"
STEPS = 60
SETTINGS = {"layer": 1, "batch_size": 64, "tokens": 64 * STEPS, "log_every": 10, "dead_window": 25, "lr": 2e-3}


def latents_of(folder, x):
    """Latent activations of x `[n, d_in]` in float64, from the saved weights and the architectures' published equations."""
    info = json.loads((folder / "sae.json").read_text())
    w = {name: value.astype(np.float64) for name, value in load_file(folder / "sae.safetensors").items()}
    if info["architecture"] == "gated":
        gate = x @ w["W_enc"] + w["b_gate"] > 0
        return gate * np.maximum((x @ w["W_enc"]) * np.exp(w["r_mag"]) + w["b_mag"], 0), w
    z = x @ w["W_enc"] + w["b_enc"]
    if info["architecture"] == "topk":
        k = info["options"]["k"]
        return np.where(z >= np.sort(z, axis=1)[:, -k, None], np.maximum(z, 0), 0), w
    return np.maximum(z, 0) * (z > w.get("threshold", 0)), w


@pytest.mark.parametrize("arch", ARCHES)
def test_the_last_line_is_measured_on_the_saved_sae(small_cache, tmp_path, arch):
    train(TrainConfig(cache=str(small_cache), arch=arch, **SETTINGS), tmp_path / "sae", Silent())
    cache = fastcache.open_cache(small_cache)
    x = cache.residuals(HOOK, 0, cache.n_tokens).astype(np.float64)
    latent_acts, w = latents_of(tmp_path / "sae", x)
    squared_error = np.square(latent_acts @ w["W_dec"] + w["b_dec"] - x).sum()
    line = read_json_lines(tmp_path / "sae/metrics.jsonl")[-1]
    assert line["step"] == STEPS
    assert line["saved_sae_rows"] == cache.n_tokens  # a sample of so small a cache is all of it
    assert line["l0"] == pytest.approx((latent_acts > 0).sum(1).mean(), rel=1e-4)
    assert line["mse"] == pytest.approx(squared_error / x.size, rel=1e-4)
    assert line["fvu"] == pytest.approx(squared_error / np.square(x - x.mean(0)).sum(), rel=1e-4)


def test_lines_before_the_last_are_of_training_batches(small_cache, tmp_path):
    train(TrainConfig(cache=str(small_cache), arch="batchtopk", k=4, **SETTINGS), tmp_path / "sae", Silent())
    lines = read_json_lines(tmp_path / "sae/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(10, STEPS + 1, 10))
    assert ["saved_sae_rows" in line for line in lines] == [False] * 5 + [True]
    assert {line["l0"] for line in lines[:-1]} == {4.0}


def words_of(line):
    return f"L0 {figure(line['l0'])}, FVU {figure(line['fvu'])}"


def test_train_prints_the_figures_of_the_saved_sae(small_cache, tmp_path, capsys):
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    main(["train", "--cache", str(small_cache), "--arch", "matryoshka", *settings, "--out", str(tmp_path / "sae")])
    printed = " ".join(capsys.readouterr().out.split())
    line = read_json_lines(tmp_path / "sae/metrics.jsonl")[-1]
    assert printed.count(f"saved SAE: {words_of(line)}, dead {line['dead_latents']:,}") >= 1
    assert f"(on {line['saved_sae_rows']:,} of the rows that it was trained on)" in printed


class Said(Silent):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_a_sweep_prints_the_figures_of_each_saved_sae(small_cache, tmp_path):
    config = sweep_config({"cache": str(small_cache), "base": SETTINGS, "grid": {"arch": ["batchtopk", "standard"]}})
    said = Said()
    sweep(config, tmp_path / "sweep", said)
    for name in config.members:
        line = read_json_lines(tmp_path / "sweep" / name / "metrics.jsonl")[-1]
        assert f"{name}: saved SAE: {words_of(line)}, dead {line['dead_latents']:,}" in said.lines


def test_dead_latents_are_unknown_until_the_window_has_passed(small_cache, tmp_path):
    train(TrainConfig(cache=str(small_cache), arch="topk", **SETTINGS), tmp_path / "sae", Silent())
    dead = [line["dead_latents"] for line in read_json_lines(tmp_path / "sae/metrics.jsonl")]
    assert dead[:2] == [None, None]
    assert all(isinstance(count, int) for count in dead[2:])


def test_a_run_shorter_than_the_window_says_that_dead_latents_are_unknown(small_cache, tmp_path, capsys):
    """On the screen, when it is inspected, and in a report."""
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | {"dead_window": STEPS}).items()]
    out, page = tmp_path / "sae", tmp_path / "page.html"
    main(["train", "--cache", str(small_cache), "--arch", "jumprelu", *settings, "--out", str(out)])
    assert "dead not known yet" in " ".join(capsys.readouterr().out.split())
    main(["inspect", str(out)])
    assert "dead not known yet" in " ".join(capsys.readouterr().out.split())
    main(["report", "--sae", str(out), "--html", str(page)])
    assert "<td>not known yet</td>" in page.read_text()
    assert read_json_lines(out / "metrics.jsonl")[-1]["dead_latents"] is None
