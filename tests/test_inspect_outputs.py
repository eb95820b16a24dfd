"""What `inspect` and progress say of real outputs, of older ones too."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import edit_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fastcache.cache_format.statistics import Moments
from fastcache.pipeline import console as screen
from fastcache.pipeline.cli import main
from fastcache.pipeline.show import _norms

OPTIONAL = ("truncated_by_source", "failed", "not reached", "skipped", "truncated", "rows", "stored")


def inspected(path, capsys):
    capsys.readouterr()
    main(["inspect", str(path)])
    return capsys.readouterr().out


@pytest.fixture
def copied(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "copy")
    return tmp_path / "copy", json.loads((small_cache / "manifest.json").read_text())


@pytest.mark.parametrize("missing", OPTIONAL)
def test_a_ledger_without_a_key_is_shown(copied, capsys, missing):
    path, manifest = copied
    edit_manifest(path, ledger={key: value for key, value in manifest["ledger"].items() if key != missing})
    printed = inspected(path, capsys)
    assert "ledger" in printed
    assert "None" not in printed


@pytest.mark.parametrize("field", ["ledger", "parity", "statistics", "totals"])
def test_a_manifest_without_a_section_is_shown(copied, capsys, field):
    path, manifest = copied
    counts = {key: manifest["totals"][key] for key in ("n_parts", "n_tokens", "n_instances")}  # these are compared
    edit_manifest(path, **{field: counts if field == "totals" else {}})
    assert "None" not in inspected(path, capsys)


def test_an_identity_without_names_is_shown(copied, capsys):
    path, manifest = copied
    edit_manifest(path, identity={**manifest["identity"], "model": {}, "corpus": {}, "model_dtype": None})
    assert "unknown, run in unknown dtype" in inspected(path, capsys)


def with_norms(norms):
    moments = Moments.empty(4)
    rows = np.zeros((len(norms), 4), np.float32)
    rows[:, 0] = norms
    moments.add(rows, np.full(len(norms), 8, np.uint8))
    return moments


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=60))
def test_estimated_norms_agree_with_each_other_and_with_the_mean(norms):
    exact = np.sort(np.float32(norms).astype(np.float64))
    spread = with_norms(norms).norm_spread("content", 5)
    assert spread.percentile_1 <= spread.median <= spread.percentile_99 <= spread.maximum
    assert spread.percentile_1 <= exact.mean() * (1 + 1e-9) or len(norms) > 100
    assert exact.mean() <= spread.maximum * (1 + 1e-9)
    assert spread.maximum == pytest.approx(exact[-1], rel=0.045)
    assert spread.median == pytest.approx(exact[(len(exact) - 1) // 2], rel=0.045)


def test_norms_of_one_bin_are_their_mean_and_far_ones_are_counted():
    moments = with_norms([98_629.0] * 50)
    assert moments.norm_spread("content", 5)[:4] == pytest.approx([98_629.0] * 4)
    far = with_norms([11_000.0] * 99 + [100_500.0, 54_000.0, 56_000.0]).norm_spread("content", 5)
    assert far.n_far in (2, 3)  # 54,000 is within a bin of 5 times the median
    assert far.maximum == pytest.approx(100_500, rel=0.045)


@pytest.mark.parametrize("width", [40, 80, 120, None])
def test_norms_of_real_models_are_whole(width):
    def group(count, mean):
        quantiles = {"0.01": mean * 0.8, "0.5": mean, "0.99": mean * 1.3}
        return {"count": count, "norm_mean": mean, "norm_quantiles": quantiles, "top_dimensions": [(2570, 1), (458, 1)]}

    groups = {"all": group(40_959_876, 312.44), "special_not_first": group(80_123, 98_629.12)}
    console = Console(file=io.StringIO(), width=width, force_terminal=width is not None, color_system=None)
    console.print(_norms("resid_post.18", groups))
    shown = console.file.getvalue()
    assert "…" not in shown
    for figure in ("40,959,876", "312", "80,123", "98,600", "2570, 458", "special, not first"):
        assert figure in shown


def test_special_tokens_that_are_never_first_are_explained(small_cache, capsys):
    printed = inspected(small_cache, capsys)
    counts = [re.search(rf"^{name} +([\d,]+)", printed, re.M)[1] for name in ("special", "special, not first")]
    assert ('"special" equals "special, not first"' in printed) == (counts[0] == counts[1])
    assert "maximum" in printed


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "40"}])
def test_a_pipe_gets_no_escape_codes_and_nothing_is_cut(small_cache, variables):
    run = [sys.executable, "-c", "from fastcache.pipeline.cli import main; main()"]
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [*run, "verify", str(small_cache)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout
    assert re.search(r"verify: [\d.]+ [kM]B of [\d.]+ [kM]B, in [\d.]+ s, [\d.]+ [kMG]B/s\n", done.stdout)


def test_a_notebooks_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert screen.make_console().is_terminal
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert not screen.make_console().is_terminal


class Clock:
    """Time as a test wants it."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(screen.time, "monotonic", lambda: self.now)


def test_rates_are_of_what_this_run_did_and_none_is_zero(monkeypatch):
    clock, console = Clock(monkeypatch), Console(file=io.StringIO(), force_terminal=False)
    with screen.RichProgress(console).task("evaluate", 1000, "dialogues", done=400) as task:
        clock.now += 21
        task.advance(0)
        clock.now += 29
        task.advance(100, "note")
        clock.now += 10
        task.advance(500)
    assert console.file.getvalue().splitlines() == [
        "evaluate: 400 of 1,000 dialogues, 21 s",
        "evaluate: 500 of 1,000 dialogues, 50 s, 2.00 dialogues/s, 4 min 10 s left, note",
        "evaluate: 1,000 of 1,000 dialogues, in 1 min 00 s, 10.0 dialogues/s, note",
    ]


@pytest.mark.parametrize("width", [30, 40, 80, 120])
def test_a_bar_shows_every_figure_whole(monkeypatch, width):
    clock = Clock(monkeypatch)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    with screen.RichProgress(console).task("evaluate with the model", 2_070_839_736, "bytes") as task:
        clock.now += 2
        task.advance(1_000_000_000, "loss 24.1, L0 41.9, FVU 0.137")
        task._bars.refresh()
        last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", console.file.getvalue())
    assert "…" not in last
    for word in ("1.00", "GB", "2.07", "500", "MB/s,", "24.1,", "41.9,", "0.137", "model"):
        assert word in last.split()
