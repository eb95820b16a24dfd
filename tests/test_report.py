"""The page of runs that are in training, trained but not evaluated, failed, or many. test_demo.py has evaluated ones."""

import json
import re
import shutil
import threading
import time
from itertools import pairwise

import pytest

from fastcache.errors import FormatError, InputError, NonFiniteError
from fastcache.files import read_json_lines
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.stages.report.config import ReportConfig
from fastcache.stages.report.run import watch_report, write_report
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.member import Member
from fastcache.stages.train.run import train
from fastcache.stages.train.sweep import sweep
from fastcache.stages.train.sweep_config import sweep_config

BASE = {
    "layer": 1, "batch_size": 64, "tokens": 64 * 40, "buffer_tokens": 512, "expansion": 4, "log_every": 5, "dead_window": 20,
}  # fmt: skip
REASON = "Training became NaN <b>or</b> infinite at step 12."


def page_of(*folders, html):
    write_report(ReportConfig(sae=tuple(map(str, folders)), html=str(html)))
    return html.read_text()


def row_of(page, name):
    """The cells of a run's row of the table."""
    row = next(row for row in re.findall(r'<tr id="r\d+">.*?</tr>', page, re.DOTALL) if f"</span>{name}</td>" in row)
    return [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]


def failing_at(name, at, error):
    step = Member.step

    def failing(self, x, numbers):
        if self.out.name == name and self.trainer.step_number == at:
            raise error
        step(self, x, numbers)

    return failing


@pytest.fixture(scope="module")
def trained(small_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "sae"
    train(TrainConfig(cache=str(small_cache), arch="topk", k=4, **BASE), out, Silent())
    return out


@pytest.fixture(scope="module")
def interrupted(small_cache, tmp_path_factory):
    """A sweep of which one member failed, and that was interrupted in its first pass of two."""
    out = tmp_path_factory.mktemp("interrupted") / "sweep"
    runs = [{"arch": "topk", "k": 4}, {"arch": "standard"}, {"arch": "standard", "tokens_of": "content"}]
    config = sweep_config({"cache": str(small_cache), "base": BASE, "runs": runs})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Member, "step", failing_at("standard", 12, NonFiniteError(REASON)))
        patch.setattr(Member, "step", failing_at("topk-k-4", 22, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            sweep(config, out, Silent())
    return out


def test_a_run_that_is_trained_but_not_evaluated_is_shown(trained, tmp_path):
    page = page_of(trained, html=tmp_path / "page.html")
    last = read_json_lines(trained / "metrics.jsonl")[-1]
    figures = [f"{last['loss']:.4g}", f"{last['fvu']:.4f}", f"{last['l0']:.1f}", f"{last['dead_latents']:,}"]
    assert row_of(page, "sae")[1:9] == ["trained", "40", "40", "", *figures]
    assert "Reconstruction on held-out" not in page
    assert page.count("<svg") == 1
    for name in ("loss", "fvu", "l0", "dead_latents"):
        assert f'id="{name}-r0"' in page


def test_a_sweep_shows_each_member_as_it_stands(interrupted, tmp_path):
    page = page_of(interrupted, html=tmp_path / "page.html")
    assert row_of(page, "topk-k-4")[1:4] == ["training", "20", "40"]
    assert row_of(page, "standard")[1:4] == ["failed", "10", "40"]
    assert row_of(page, "standard-tokens-of-content")[1:4] == ["waiting", "0", ""]
    assert "standard failed at step 12: Training became NaN &lt;b&gt;or&lt;/b&gt; infinite" in page


def test_settings_are_those_that_the_recipe_said(trained, interrupted, tmp_path):
    page = page_of(trained, interrupted, html=tmp_path / "page.html")
    resolved = json.loads((trained / "run.json").read_text())["settings"]["resolved"]
    assert f"lr {resolved['lr']}" in page
    assert "<th>tokens_of</th>" in page


def test_a_page_of_runs_in_training_needs_nothing_from_elsewhere(interrupted, tmp_path):
    page = page_of(interrupted, html=tmp_path / "page.html")
    assert re.findall(r'(?:src|href)\s*=\s*"([^"#][^"]*)"', page) == []
    assert "<script" not in page


def test_the_page_follows_a_run_until_it_is_done(small_cache, tmp_path):
    out, html = tmp_path / "sae", tmp_path / "page.html"
    config = TrainConfig(cache=str(small_cache), arch="topk", **BASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Member, "step", failing_at("sae", 22, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train(config, out, Silent())
    watching = threading.Thread(target=watch_report, args=(ReportConfig(sae=(str(out),), html=str(html)), 0.05))
    watching.start()
    while not html.exists():
        time.sleep(0.01)
    first = html.read_text()
    assert 'http-equiv="refresh" content="1"' in first
    assert row_of(first, "sae")[1:4] == ["training", "20", "40"]
    train(config, out, Silent())
    watching.join(60)
    assert not watching.is_alive()
    assert "http-equiv" not in html.read_text()
    assert row_of(html.read_text(), "sae")[1:4] == ["trained", "40", "40"]


def test_watching_ends_at_once_where_all_is_done(trained, tmp_path, capsys):
    main(["report", "--sae", str(trained), "--watch", "100", "--html", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {tmp_path / 'page.html'}"


def test_a_run_that_fails_says_why_and_tries_again(small_cache, tmp_path, monkeypatch):
    out = tmp_path / "sae"
    config = TrainConfig(cache=str(small_cache), arch="topk", **BASE)
    with monkeypatch.context() as patch:
        patch.setattr(Member, "step", failing_at("sae", 12, NonFiniteError(REASON)))
        with pytest.raises(NonFiniteError):
            train(config, out, Silent())
    assert row_of(page_of(out, html=tmp_path / "page.html"), "sae")[1:3] == ["failed", "10"]
    train(config, out, Silent())
    assert row_of(page_of(out, html=tmp_path / "page.html"), "sae")[1:3] == ["trained", "40"]


def test_loss_spikes_are_marked_and_listed(trained, tmp_path):
    out = tmp_path / "spiky"
    shutil.copytree(trained, out)
    event = {"event": "loss spike", "step": 17, "loss": 812.5, "mean": 2.0, "largest_norm": 99.5, "part": 1, "unit": 2}
    (out / "events.jsonl").write_text(json.dumps({**event, "row": 513}) + "\n")
    page = page_of(out, html=tmp_path / "page.html")
    assert 'id="spikes-r0"' in page
    assert re.search(r"<td>17</td><td>812.5</td><td>2</td>\s*<td>99.5</td><td>1</td><td>513</td>", page)


def test_many_runs_make_a_page_of_a_few_megabytes(trained, tmp_path):
    out = tmp_path / "sweep"
    run = json.loads((trained / "run.json").read_text())
    steps = 50_000
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    members = {}
    for number in range(120):
        member = out / f"topk-seed-{number}"
        member.mkdir(parents=True)
        run["settings"]["seed"], run["settings"]["resolved"]["steps"] = number, steps
        (member / "run.json").write_text(json.dumps(run))
        logged = (
            {**line, "step": step, "loss": 1.2345 + (step * 7919 + number) % 101} for step in range(50, steps, 50)
        )
        (member / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in logged))
        members[member.name] = {name: value for name, value in run["settings"].items() if name != "resolved"}
    (out / "run.json").write_text(json.dumps({"command": "sweep", "settings": {"members": members}}))
    page = page_of(out, html=tmp_path / "page.html")
    assert len(page) < 3_000_000
    assert {f"loss-r{number}" for number in range(120)} <= set(re.findall(r'id="([^"]*)"', page))
    assert row_of(page, "topk-seed-119")[1:4] == ["training", "49,950", "50,000"]


def test_text_from_files_is_escaped(trained, tmp_path):
    attack = r"<script>alert(1)</script> $\frac$"
    out = tmp_path / "sweep"
    config = {"arch": attack, "cache": attack, "lr": attack}
    (out / "members").mkdir(parents=True)
    run = {"command": "sweep", "settings": {"members": {"members/<script>x<": config}}}
    (out / "run.json").write_text(json.dumps(run))
    other = tmp_path / "sae<script>"
    shutil.copytree(trained, other)
    begun = json.loads((other / "run.json").read_text())
    begun["settings"] |= {"arch": attack}
    begun["settings"]["resolved"]["arch"] = attack
    (other / "run.json").write_text(json.dumps(begun))
    page = page_of(out, other, html=tmp_path / "page.html")
    assert "<script" not in page
    assert "alert(1)" in page


def test_a_log_is_thinned_with_its_ends_kept(tmp_path):
    (tmp_path / "log").write_text("".join(f'{{"step": {n}}}\n' for n in range(1000)) + '{"step": 1')
    steps = [line["step"] for line in read_json_lines(tmp_path / "log", 7)]
    assert (len(steps), steps[0], steps[-1]) == (7, 0, 999)
    assert len({b - a for a, b in pairwise(steps)}) <= 2
    assert len(read_json_lines(tmp_path / "log", 1000)) == len(read_json_lines(tmp_path / "log")) == 1000


def test_what_is_no_run_is_refused(trained, small_cache, tmp_path):
    with pytest.raises(InputError, match=r"no run\.json"):
        page_of(tmp_path, html=tmp_path / "page.html")
    with pytest.raises(InputError, match="output of `fastcache extract`"):
        page_of(small_cache, html=tmp_path / "page.html")
    out = tmp_path / "damaged"
    shutil.copytree(trained, out)
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": "low"}\n')
    with pytest.raises(FormatError, match="loss should be a number, found 'low'"):
        page_of(out, html=tmp_path / "page.html")
