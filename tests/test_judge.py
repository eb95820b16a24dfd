"""Scores of latents by a scripted judge, or by answers that were got elsewhere."""

import json
import shutil

import pytest
from judge_server import completion, question, serve
from judging import good, run, scores
from latents import make_results

from fastcache.config import from_mapping
from fastcache.errors import BudgetError, InputError, MismatchError
from fastcache.files import read_json, write_json_atomic
from fastcache.progress import Silent
from fastcache.stages.interpret.config import JudgeConfig
from fastcache.stages.interpret.judge import run as run_module
from fastcache.stages.interpret.judge.prompts import score_prompt
from fastcache.stages.interpret.judge.run import judge
from fastcache.stages.interpret.results import Results

pytestmark = pytest.mark.usefixtures("quick_judge")


def test_scores_are_what_the_judge_said(latents, tmp_path):
    with serve(good) as server:
        summary = run(latents, tmp_path / "out", server)
    rows = scores(tmp_path / "out")
    assert len(rows) == len(server.asked) == summary["scored"] == 12
    assert summary["shares"]["4"] == summary["share_4_5"] == 1
    prompts = {question(body) for body in server.asked}
    for row in rows:
        user = score_prompt(row["latent"], Results(latents).contexts_of([row["latent"]])[row["latent"]]).user
        assert user in prompts
        assert (row["score"], row["name"], row["failure"]) == (4, f"kind {len(user)}", None)


def test_unreadable_answers_are_counted_by_reason_and_kept(latents, tmp_path):
    said = iter(["[[9]] [[x]]", "no form", "[[2]] [[fine]]", "", "no form either"] + ["[[2]] [[fine]]"] * 7)
    with serve(lambda _: next(said)) as server:
        summary = run(latents, tmp_path / "out", server, concurrency=1)
    assert summary["failures"] == {"empty": 1, "no double brackets": 2, "no score from 1 to 5": 1}
    assert summary["scored"] == 8
    assert summary["shares"]["2"] == 1
    assert {row["answer"] for row in scores(tmp_path / "out") if row["failure"]} == {
        "[[9]] [[x]]",
        "no form",
        "",
        "no form either",
    }


def test_half_of_a_surrogate_pair_in_an_answer_is_replaced(latents, tmp_path):
    with serve(lambda _: "[[3]] [[half \ud800]]") as server:
        run(latents, tmp_path / "asked", server, count=1)
    (row,) = scores(tmp_path / "asked")
    assert row["name"] == "half \ufffd"
    line = {"id": f"score-{row['latent']}", "answer": "[[3]] [[half \ud800]]"}
    (tmp_path / "given.jsonl").write_text(json.dumps(line))
    run(latents, tmp_path / "given", judge="none", count=1, answers=[str(tmp_path / "given.jsonl")])
    assert scores(tmp_path / "given")[0]["name"] == "half \ufffd"


@pytest.mark.parametrize(("says", "expected"), [("knows", 1.0), ("none", 0.5)])
def test_detection_scores_the_name(latents, tmp_path, says, expected):
    def answer(body):
        if "Pattern" not in question(body):
            return good(body)
        lines = question(body).splitlines()[2:]
        # make_results: a latent's contexts hold its word, the windows don't.
        return (
            f"[[{', '.join(line.partition(':')[0] for line in lines if 'word' in line)}]]"
            if says == "knows"
            else "[[none]]"
        )

    with serve(answer) as server:
        summary = run(latents, tmp_path / "out", server, detection=True)
    assert summary["detection"]["mean"] == expected
    assert summary["detection"]["scored"] == summary["detection"]["prompts"] == 12
    assert len(server.asked) == 24


def test_detection_can_be_added_later(latents, tmp_path):
    with serve(lambda body: "[[1]]" if "Pattern" in question(body) else good(body)) as server:
        run(latents, tmp_path / "out", server)
        assert run(latents, tmp_path / "out", server, detection=True)["detection"]["scored"] == 12
    assert len(server.asked) == 24


def test_a_stop_in_the_first_round_leaves_the_detection_of_earlier_ones(latents, tmp_path):
    with serve(lambda body: "[[1]]" if "Pattern" in question(body) else good(body)) as server:
        run(latents, tmp_path / "out", server, count=4, detection=True)
        with pytest.raises(BudgetError):
            run(latents, tmp_path / "out", server, count=12, detection=True, max_requests=9)
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert (summary["detection"]["scored"], summary["scored"]) == (4, 5)
        assert run(latents, tmp_path / "out", server, count=5)["detection"]["scored"] == 4
    assert len(server.asked) == 9


def test_exported_prompts_answered_elsewhere_give_the_same_scores(latents, tmp_path):
    def answer(body):
        return "[[1]]" if "Pattern" in question(body) else good(body)

    with serve(answer) as server:
        expected = run(latents, tmp_path / "asked", server, detection=True)
    for form in ("batch", "lines"):
        out = tmp_path / form
        for number in range(3):
            given = [str(path) for path in tmp_path.glob(f"{form}-*.jsonl")]
            summary = run(latents, out, judge="none", detection=True, answers=given)
            requests = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
            assert len(requests) == (12 if number < 2 else 0)
            lines = [answered(form, each, answer(each["body"])) for each in requests]
            (tmp_path / f"{form}-{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert scores(out) == scores(tmp_path / "asked")
        assert {**summary, "requests": 0, "tokens": 0} == {**expected, "requests": 0, "tokens": 0}


def answered(form, request, text):
    if form == "lines":
        return {"id": request["custom_id"], "answer": text}
    return {
        "custom_id": request["custom_id"],
        "error": None,
        "response": {"status_code": 200, "body": completion(text)},
    }


@pytest.mark.parametrize(
    "line",
    [
        '{"id": [1], "answer": "x"}',
        '{"id": "score-1", "response": "x"}',
        '{"id": "score-5", "answer": "x"}',
        '{"id": "score-1"',
        '["score-1"]',
        '{"answer": "x"}',
        '{"id": "score-1", "answer": 5}',
    ],
)
def test_answers_to_nothing_that_was_asked_are_refused(latents, tmp_path, line):
    (tmp_path / "answers.jsonl").write_text('{"id": "score-1", "answer": "[[1]] [[x]]"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl"):
        run(latents, tmp_path / "out", judge="none", count=30, answers=[str(tmp_path / "answers.jsonl")])
    assert not (tmp_path / "out").exists()


def test_the_request_can_be_changed(latents, tmp_path):
    changes = '{"max_tokens": null, "max_completion_tokens": 900, "temperature": null, "seed": 1}'
    with serve(good) as server:
        run(latents, tmp_path / "out", server, count=1, judge_body=changes)
    (body,) = server.asked
    assert body.keys() == {"model", "messages", "max_completion_tokens", "seed"}


def test_the_estimate_is_told_before_anything_is_sent(latents, tmp_path):
    class Told(Silent):
        lines: list

        def say(self, text):
            self.lines.append((len(server.asked), text))

    told = Told()
    told.lines = []
    with serve(lambda body: "[[1]]" if "Pattern" in question(body) else good(body)) as server:
        given = {"latents": str(latents), "judge_url": server.url, "judge_model": "m", "count": 12, "detection": True}
        judge(from_mapping(JudgeConfig, {**given, "price_in": 1, "price_out": 1}, "test"), tmp_path / "out", told)
    ((asked, line),) = told.lines
    assert asked == 0
    assert line.startswith("24 prompts, about ")
    estimate = int(line.split("about ")[1].split(" tokens")[0].replace(",", ""))
    sent = sum(len(message["content"].encode()) for body in server.asked for message in body["messages"])
    assert estimate == pytest.approx(sent / 2.5, rel=0.05)


def test_too_few_contexts_kept_is_told(tmp_path):
    folder = make_results(tmp_path / "few", 6, top=3)
    with serve(good) as server, pytest.raises(InputError, match="--top 5 or more"):
        run(folder, tmp_path / "out", server)


def test_tokens_without_a_tokenizer_are_not_judged(tmp_path):
    folder = make_results(tmp_path / "latents", 10)
    write_json_atomic(folder / "about.json", {**read_json(folder / "about.json"), "readable": False})
    with pytest.raises(InputError, match="no judge can read"):
        run(folder, tmp_path / "out", judge="none")


def test_other_prompts_are_refused(latents, tmp_path):
    with serve(good) as server:
        run(latents, tmp_path / "out", server, count=1)
        with pytest.raises(MismatchError, match="judge_model"):
            run(latents, tmp_path / "out", server, judge_model="another")
    assert len(server.asked) == 1


def test_other_tables_or_other_words_are_other_prompts(tmp_path, monkeypatch):
    folder = make_results(tmp_path / "latents", 10)
    with serve(good) as server:
        run(folder, tmp_path / "out", server)
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "WORDING", "other words")
            with pytest.raises(MismatchError, match="wording"):
                run(folder, tmp_path / "out", server)
        shutil.rmtree(folder)
        make_results(folder, 10, word="other")
        with pytest.raises(MismatchError, match="results_fingerprint"):
            run(folder, tmp_path / "out", server)
