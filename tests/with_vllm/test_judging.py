"""A judge served by real vLLM: it knows nothing, so that what it says is mostly unreadable; all of it is kept and counted."""

import json

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm` has an environment with it")

import pyarrow.parquet as pq
from latents import make_results

from fastcache.config import from_mapping
from fastcache.errors import EndpointError
from fastcache.progress import Silent
from fastcache.stages.interpret.config import JudgeConfig
from fastcache.stages.interpret.judge.run import judge


@pytest.fixture
def asked(served_demo, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", served_demo.key)
    results = make_results(tmp_path / "latents", 30)

    def ask(**settings):
        given = {
            "latents": str(results),
            "judge_url": served_demo.base_url,
            "judge_model": served_demo.model,
            "count": 12,
        }
        config = from_mapping(JudgeConfig, {**given, "max_answer_tokens": 24, **settings}, "test")
        return judge(config, tmp_path / "judge", Silent()), tmp_path / "judge"

    return ask


def test_every_answer_is_kept_and_read_or_counted(asked):
    summary, out = asked()
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    assert len(rows) == summary["chosen"] == summary["requests"] == 12
    assert summary["scored"] + sum(summary["failures"].values()) == 12
    assert "unanswered" not in summary["failures"]
    assert all(row["answer"] for row in rows)
    assert all((row["score"] is None) == bool(row["failure"]) for row in rows)
    answered = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    answered = [line for line in answered if line["event"] == "answered"]
    assert sum(line["usage"]["completion_tokens"] for line in answered) == summary["tokens"]["completion_tokens"] > 12
    again, _ = asked()
    assert again == summary  # nothing is asked again


def test_an_answer_can_be_forced_into_the_form(asked):
    body = {"structured_outputs": {"regex": r"\[\[[1-5]\]\] \[\[[a-z]{3,9}\]\]"}}
    summary, _ = asked(judge_body=json.dumps(body), detection=True)
    assert summary["scored"] == 12
    assert summary["detection"]["prompts"] == 12


def test_a_wrong_key_is_refused_at_once(asked, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    with pytest.raises(EndpointError, match="401"):
        asked()


def test_a_prompt_that_is_too_long_is_told(asked):
    with pytest.raises(
        EndpointError, match=r"3 prompts in a row, the last score-\d+: status 400, .*max_model_len=2048"
    ):
        asked(max_answer_tokens=5000)
