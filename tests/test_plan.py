"""Before the start: what a run will take is said, and what can't fit is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import edit_manifest, make_dialogues, run_extract

from fastcache.errors import SpaceError
from fastcache.progress import Silent
from fastcache.stages.extract import plan
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.extract.run import extract

CHILD = """
    import re, sys
    from pathlib import Path
    sys.path[:0] = [sys.argv[1]]
    from conftest import run_extract
    from fastcache.stages.extract import plan
    estimate, said = plan.estimate_memory, []
    plan.estimate_memory = lambda *given: said.append(estimate(*given)) or said[0]
    run_extract(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), unit_tokens=3000, parity=int(sys.argv[5]))
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    print(said[0].total, peak)
"""


class Recorder(Silent):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def begin(model, corpus, out, force=False, fresh=False, **settings):
    """What an extract run says."""
    recorder = Recorder()
    defaults = {"layer": (1,), "dtype": "float32", "parity": 2, "unit_tokens": 400}
    extract(ExtractConfig(model=str(model), **{**defaults, **settings}), lambda: corpus, out, recorder, fresh, force)
    return recorder.said


def planned_and_peak(model, corpus, out, parity=2):
    """Bytes that the plan named, and those of the process at its peak."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the system doesn't tell a process's peak memory")
    arguments = [str(Path(__file__).parent), str(model), str(corpus), str(out), str(parity)]
    code = "\n".join(line[4:] for line in CHILD.splitlines())
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return map(int, done.stdout.split()[-2:])


@pytest.fixture(scope="module")
def larger_model(tmp_path_factory):
    """A random model whose weights are a good part of a process."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from fastcache.assets import DEMO

    folder = tmp_path_factory.mktemp("larger") / "model"
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=4096, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(folder)
    return folder


def test_memory_is_estimated_within_a_fifth(larger_model, chat_corpus, tmp_path):
    planned, peak = planned_and_peak(larger_model, chat_corpus, tmp_path / "cache")
    assert 0.8 < planned / peak < 1.2


def corpus_of(folder, n_dialogues):
    from fastcache.stages.prepare.config import PrepareConfig
    from fastcache.stages.prepare.run import prepare

    source = folder / f"{n_dialogues}.jsonl"
    source.write_text("".join(json.dumps({"messages": one}) + "\n" for one in make_dialogues(n_dialogues, seed=5)))
    settings = {"ngram": 0, "eval_rows": 0, "interpret_rows": 0, "steer_rows": 0}
    prepare(PrepareConfig(source=(str(source),), **settings), folder / str(n_dialogues), Silent())
    return folder / str(n_dialogues)


@pytest.mark.long
def test_memory_stays_the_same_over_ten_times_the_dialogues(tiny_qwen, tmp_path):
    peaks = [
        list(planned_and_peak(tiny_qwen, corpus_of(tmp_path, n), tmp_path / f"cache-{n}", parity=0))[1]
        for n in (1500, 15_000)  # the corpus is read in batches of 1,024 rows
    ]
    assert peaks[1] < 1.04 * peaks[0]


def test_the_plan_comes_first_and_the_time_once_it_is_measured(tiny_qwen, chat_corpus, tmp_path):
    said = begin(tiny_qwen, chat_corpus, tmp_path / "cache")
    assert said[0].startswith("Plan (estimates): ")
    assert " tokens, " in said[0]
    assert " of memory (" in said[0]
    assert any("tokens/s, measured on" in line for line in said)


def test_the_plan_of_a_resumed_run_is_what_is_left(tiny_qwen, chat_corpus, tmp_path):
    out = tmp_path / "cache"
    begin(tiny_qwen, chat_corpus, out)
    assert not any("Plan" in line for line in begin(tiny_qwen, chat_corpus, out))
    log = (out / "parts.jsonl").read_bytes().splitlines(keepends=True)
    (out / "parts.jsonl").write_bytes(b"".join(log[:2]))
    edit_manifest(out, state="writing")
    assert " tokens to go, " in begin(tiny_qwen, chat_corpus, out)[0]
    assert " tokens, " in begin(tiny_qwen, chat_corpus, out, fresh=True)[0]


@pytest.mark.parametrize("lacking", ["disk", "memory"])
def test_what_does_not_fit_is_refused_but_for_force(lacking, tiny_qwen, chat_corpus, tmp_path, monkeypatch):
    if lacking == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    else:
        monkeypatch.setattr(plan, "free_memory", lambda: 1000)
        monkeypatch.setattr(plan, "process_bytes", lambda: 0)
    with pytest.raises(SpaceError, match="--force begins all the same"):
        begin(tiny_qwen, chat_corpus, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    said = begin(tiny_qwen, chat_corpus, tmp_path / "cache", force=True)
    assert any("Going on, as --force says" in line for line in said)
    settings = json.loads((tmp_path / "cache/run.json").read_text())["settings"]
    assert "force" not in settings


def test_memory_is_asked_for_every_worker(tiny_qwen, chat_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda: 1000)
    monkeypatch.setattr(plan, "process_bytes", lambda: 0)
    with pytest.raises(SpaceError, match="Use fewer --workers"):
        begin(tiny_qwen, chat_corpus, tmp_path / "cache", workers=3, parity=0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (360_000, "100 h 00 min")]
)
def test_durations_are_for_people(seconds, text):
    assert plan.duration(seconds) == text


def test_a_part_of_a_cache_in_use_is_not_counted_twice(tiny_qwen, chat_corpus, tmp_path):
    run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", unit_tokens=400)
    assert plan._committed_tokens(tmp_path / "cache", 77) == 77
    assert plan._committed_tokens(tmp_path / "none", 77) == 0
