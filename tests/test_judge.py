"""The judge: asked through a scripted endpoint that answers well, badly, slowly or not at all; never paid twice."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import Reply, completion, question, serve
from latents import make_results

from fastcache.config import from_mapping
from fastcache.errors import BudgetError, EndpointError, InputError, MismatchError
from fastcache.files import read_json, write_json_atomic
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.stages.interpret.config import JudgeConfig
from fastcache.stages.interpret.judge import endpoint
from fastcache.stages.interpret.judge import run as run_module
from fastcache.stages.interpret.judge.answers import (
    Score,
    UnparsedError,
    balanced_accuracy,
    parse_detection,
    parse_score,
)
from fastcache.stages.interpret.judge.prompts import SHOWN, choose, detection_prompt, score_prompt
from fastcache.stages.interpret.judge.run import judge
from fastcache.stages.interpret.results import Results

KEY = "sk-very-secret/0123456789"


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Latents 0 to 29; those that 5 divides are active in 4 dialogues, too few to qualify."""
    return make_results(tmp_path_factory.mktemp("results") / "latents", 30)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def run(latents, out, server=None, **settings):
    given = {"latents": str(latents), "judge_model": "scripted", "count": 12, **settings}
    if server:
        given["judge_url"] = server.url
    return judge(from_mapping(JudgeConfig, given, "test"), out, Silent())


def good(body):
    return "Tokens of one kind.\n[[4]]\n[[kind " + str(len(question(body))) + "]]"


def scores(out):
    return pq.read_table(out / "scores.parquet").to_pylist()


def test_a_well_formed_answer_is_a_score_and_a_name():
    assert parse_score("Clear.\n[[5]]\n[[names of months]]") == Score(5, "names of months")
    assert parse_score("[[ 1 ]] and [[ a [nested] name ]]") == Score(1, "a [nested] name")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("5, names of months", "no double brackets"),
        ("[5] [names]", "no double brackets"),
        ("[[5]]", "fewer"),
        ("[[5]] [[a]] [[b]]", "more"),
        ("The form is [[3]] [[name]]. Mine: [[5]] [[months]]", "more"),
        ("[[0]] [[months]]", "no score"),
        ("[[6]] [[months]]", "no score"),
        ("[[4.5]] [[months]]", "no score"),
        ("[[score: 4]] [[months]]", "no score"),
        ("[[months]] [[5]]", "no score"),
        ("[[5]] [[ ]]", "no short name"),
        ("[[5]] [[two\nlines]]", "no short name"),
        (f"[[5]] [[{'x' * 500}]]", "no short name"),
    ],
)
def test_a_malformed_answer_is_not_guessed(text, reason):
    with pytest.raises(UnparsedError, match=reason):
        parse_score(text)


@given(st.text(alphabet="[]123450 nameone,\n"))
def test_any_answer_is_a_score_or_unparsed(text):
    for parse in (parse_score, lambda t: parse_detection(t, 10)):
        with suppress(UnparsedError):
            found = parse(text)
            assert isinstance(found, frozenset) or (found.score in range(1, 6) and found.name)


def test_detection_answers_are_numbers_of_texts_or_none():
    assert parse_detection("They do. [[1, 4,5]]", 6) == {1, 4, 5}
    assert parse_detection("[[None]]", 6) == frozenset()
    for text in ("[[0]]", "[[7]]", "[[1, 1]]", "[[]]", "[[a]]", "1, 2", "[[1]] [[2]]"):
        with pytest.raises(UnparsedError):
            parse_detection(text, 6)


def test_balanced_accuracy_of_always_and_never_is_chance():
    active = (True, False, False, True, False)
    assert balanced_accuracy(frozenset({1, 4}), active) == 1
    assert balanced_accuracy(frozenset(), active) == balanced_accuracy(frozenset(range(1, 6)), active) == 0.5
    assert balanced_accuracy(frozenset({2, 3, 5}), active) == 0


def test_qualifying_latents_are_active_in_five_dialogues(latents):
    assert Results(latents).active_in_dialogues(SHOWN) == [latent for latent in range(30) if latent % 5]


def test_a_larger_count_draws_the_same_latents_and_more():
    assert choose(range(100), 5, 1) == choose(range(100), 20, 1)[:5]
    assert choose(range(100), 20, 1) != choose(range(100), 20, 2)
    assert sorted(choose(range(10), 128, 1)) == list(range(10))


def test_the_judge_sees_the_highest_contexts_with_their_activations(latents):
    contexts = Results(latents).contexts_of([7])[7]
    shown = score_prompt(7, contexts).user
    for row in contexts[:SHOWN]:
        lines = [
            json.dumps(token) + (f"\t{value:.2f}" if value > 0 else "")
            for token, value in zip(row["tokens"], row["activations"], strict=True)
        ]
        assert "\n".join(lines) in shown
    assert f"Context {SHOWN + 1}" not in shown


def test_detection_shows_dialogues_that_the_judge_has_not_seen(latents):
    results = Results(latents)
    contexts = results.contexts_of([7])[7]
    prompt = detection_prompt(7, "a name", contexts, results.windows(), 3)
    seen = {"".join(row["tokens"]) for row in contexts[:SHOWN]}
    texts = [json.loads(line.partition(": ")[2]) for line in prompt.user.splitlines()[2:]]
    of_latent = {"".join(row["tokens"]) for row in contexts}
    assert not seen & set(texts)
    assert [text in of_latent for text in texts] == list(prompt.active)
    assert Counter(prompt.active) == {True: 5, False: 5}
    assert detection_prompt(7, "a name", contexts, results.windows()[:1], 3) is None


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


def test_failures_for_the_time_being_are_tried_again(latents, tmp_path):
    seen = Counter()

    def answer(body):
        seen[question(body)] += 1
        statuses = {1: 500, 2: 429, 3: 503}
        status = statuses.get(seen[question(body)], 200)
        return good(body) if status == 200 else Reply(b"busy", status)

    with serve(answer) as server:
        summary = run(latents, tmp_path / "out", server)
    assert summary["scored"] == 12
    assert summary["requests"] == len(server.asked) == 48


def test_retry_after_is_waited_for(latents, tmp_path):
    replies = iter([Reply(b"later", 429, headers=(("Retry-After", "0.4"),))])
    with serve(lambda body: next(replies, None) or good(body)) as server:
        run(latents, tmp_path / "out", server, count=1)
    assert server.times[1] - server.times[0] >= 0.4


def test_a_slow_answer_is_given_up_and_asked_for_again(latents, tmp_path):
    slow = iter([1.0])
    with serve(lambda body: Reply(good(body), after=next(slow, 0.0))) as server:
        summary = run(latents, tmp_path / "out", server, count=2, timeout=0.3)
    assert summary["scored"] == 2
    assert len(server.asked) == 3
    assert "no answer in 0.3 s" in (tmp_path / "out" / "answers.jsonl").read_text()


@pytest.mark.parametrize(
    "body",
    [b"<html>busy</html>", b"", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": [1]}}]}', b"[NaN]"],
)
def test_a_response_that_is_no_completion_is_kept_and_tried_again(latents, tmp_path, body):
    bad = iter([body])
    with serve(lambda asked: Reply(found, 200) if (found := next(bad, None)) is not None else good(asked)) as server:
        summary = run(latents, tmp_path / "out", server, count=3)
    assert summary["scored"] == 3
    assert len(server.asked) == 4
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["body"] for line in lines if line["event"] == "failed"] == [body.decode()]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_refused_for_itself_is_left_and_the_others_go_on(latents, tmp_path, status):
    refused = []

    def answer(body):
        refused.append(question(body))
        return Reply(b"too long", status) if question(body) == refused[0] else good(body)

    with serve(answer) as server:
        summary = run(latents, tmp_path / "out", server, concurrency=1)
    assert summary["scored"] == 11
    assert len(server.asked) == 12


def test_at_most_so_many_requests_are_under_way(latents, tmp_path):
    with serve(lambda body: Reply(good(body), after=0.05)) as server:
        run(latents, tmp_path / "out", server, concurrency=3)
    assert 1 < server.at_once <= 3


def test_a_refused_request_stops_at_once_and_hides_the_key(latents, tmp_path):
    refuses = pytest.raises(EndpointError, match=r"401.*no such key: \[key\]")
    with serve(lambda _: Reply(f"no such key: {KEY}".encode(), 401)) as server, refuses:
        run(latents, tmp_path / "out", server, concurrency=2)
    assert len(server.asked) <= 2


def test_an_endpoint_that_is_down_is_given_up(latents, tmp_path):
    with serve(good) as server:
        pass
    with pytest.raises(EndpointError, match=r"3 prompts in a row.*again to go on"):
        run(latents, tmp_path / "out", server, retries=1, concurrency=1)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failures"] == {"unanswered": 12}


def test_one_prompt_that_always_fails_does_not_stop_the_others(latents, tmp_path):
    first = []

    def answer(body):
        first.append(question(body))
        return Reply(b"", 500) if question(body) == first[0] else good(body)

    with serve(answer) as server:
        summary = run(latents, tmp_path / "out", server, concurrency=1, retries=2)
        assert summary["scored"] == 11
        assert len(server.asked) == 14
        first[0] = ""
        assert run(latents, tmp_path / "out", server)["scored"] == 12
        assert len(server.asked) == 15


def test_never_more_requests_than_allowed_and_none_is_paid_twice(latents, tmp_path):
    with serve(good) as server:
        with pytest.raises(BudgetError, match=r"5 requests were sent.*7 prompts are left"):
            run(latents, tmp_path / "out", server, max_requests=5)
        assert len(server.asked) == 5
        with pytest.raises(BudgetError):
            run(latents, tmp_path / "out", server, max_requests=5)
        assert len(server.asked) == 5
        assert run(latents, tmp_path / "out", server, max_requests=12)["scored"] == 12
        assert len(server.asked) == 12
        run(latents, tmp_path / "out", server)
    assert len(server.asked) == len({question(body) for body in server.asked}) == 12


def test_failed_requests_count_against_the_limit(latents, tmp_path):
    with serve(lambda _: Reply(b"", 500)) as server, pytest.raises(BudgetError):
        run(latents, tmp_path / "out", server, max_requests=7, retries=100)
    assert len(server.asked) == 7


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.11])
def test_the_cost_never_passes_its_limit(latents, tmp_path, limit):
    usage = {"prompt_tokens": 2000, "completion_tokens": 512}
    with serve(lambda body: Reply(good(body), usage=usage)) as server, pytest.raises(BudgetError, match="max-cost"):
        run(latents, tmp_path / "out", server, price_in=2.5, price_out=10, max_cost=limit)
    paid = len(server.asked) * (2000 * 2.5 + 512 * 10) / 1e6
    assert 0 < paid <= limit
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["cost"] == pytest.approx(paid)


def test_a_request_without_an_answer_counts_with_the_most_it_may_have_cost(latents, tmp_path):
    with serve(lambda body: Reply(good(body), after=0.5)) as server, pytest.raises(BudgetError):
        run(
            latents, tmp_path / "out", server, price_in=0, price_out=1e6 / 512, max_cost=2.5, timeout=0.1, concurrency=1
        )
    assert len(server.asked) == 2


def test_a_killed_run_asks_only_for_what_is_missing(latents, tmp_path):
    with serve(lambda body: Reply(good(body), after=0.1)) as server:
        command = [
            sys.executable,
            "-c",
            "from fastcache.pipeline.cli import main; main()",
            "interpret",
            "judge",
            "--latents",
            latents,
            "--judge-url",
            server.url,
        ]
        command += ["--judge-model", "scripted", "--count", "12", "--concurrency", "2", "--out", tmp_path / "out"]
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while len(server.asked) < 5:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.3)
        before = len(server.asked)
        summary = run(latents, tmp_path / "out", server)
    assert summary["scored"] == 12
    assert before <= 7
    assert len(server.asked) <= 12 + 2  # those that were under way
    assert len(server.asked) <= summary["requests"] <= len(server.asked) + 2  # noted before it is sent


def test_more_latents_cost_only_themselves(latents, tmp_path):
    with serve(good) as server:
        run(latents, tmp_path / "out", server, count=4)
        assert run(latents, tmp_path / "out", server, count=9)["scored"] == 9
    assert len(server.asked) == 9


def test_other_prompts_are_refused(latents, tmp_path):
    with serve(good) as server:
        run(latents, tmp_path / "out", server, count=1)
        with pytest.raises(MismatchError, match="judge_model"):
            run(latents, tmp_path / "out", server, judge_model="another")
    assert len(server.asked) == 1


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


def test_the_key_is_sent_and_nowhere_else(latents, tmp_path, capsys):
    escaped = [json.dumps(completion(KEY)).replace("/", form).encode() for form in ("\\/", "\\u002f")]
    said = iter([Reply(f"your key {KEY}".encode(), 500), f"I know {KEY} [[2]] [[{KEY}]]", *map(Reply, escaped)])
    with serve(lambda body: next(said, None) or good(body)) as server:
        arguments = [
            "--latents",
            str(latents),
            "--judge-url",
            server.url,
            "--judge-model",
            "scripted",
            "--out",
            str(tmp_path / "out"),
        ]
        main(["interpret", "judge", *arguments])
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert not [path for path in files if b"0123456789" in path.read_bytes()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge_url": None}, "needs --judge-url"),
        ({"judge_model": None}, "--judge-model is needed"),
        ({"judge_url": "ftp://x/v1"}, "should begin with https"),
        ({"judge_url": "https://me:secret@x/v1"}, "neither a password nor a query"),
        ({"judge_url": "https://x/v1?key=secret"}, "neither a password nor a query"),
        ({"judge_url": "http://[::1/v1"}, "no address"),
        ({"judge_url": "http://localhost:99999/v1"}, "no address"),
        ({"judge_url": "http://localhost:abc/v1"}, "no address"),
        ({"judge_key_env": "sk-secret-key"}, "name of a variable"),
        ({"judge_url": "http://judge.example/v1"}, "unencrypted"),
        ({"judge_body": "{"}, "--judge-body"),
        ({"judge_body": "[1]"}, "JSON object"),
        ({"judge_body": '{"max_tokens": -1}'}, "max_tokens should be a whole number"),
        ({"judge_body": '{"max_tokens": "x"}'}, "max_tokens should be a whole number"),
        ({"judge_body": '{"n": 1.5}'}, "n should be a whole number"),
        ({"judge_body": '{"model": "another"}'}, "can't change model"),
        ({"judge_body": '{"stream": true}'}, "can't change stream"),
        ({"max_cost": 1}, "--price-in"),
        ({"max_cost": 1, "price_in": 1, "price_out": 1, "judge_body": '{"max_tokens": null}'}, "limit on answers"),
        ({"answers": ["x"]}, "--judge none"),
    ],
)
def test_a_judge_that_can_not_be_asked_is_refused_before_anything(latents, tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as error:
        run(latents, tmp_path / "out", **{"judge_url": "http://localhost:1/v1", **settings})
    assert "secret" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_key_that_no_header_can_hold_is_told(latents, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e4-secret")
    with serve(good) as server, pytest.raises(InputError, match="characters that a key") as error:
        run(latents, tmp_path / "out", server)
    assert "secret" not in str(error.value)


def test_the_request_can_be_changed(latents, tmp_path):
    changes = '{"max_tokens": null, "max_completion_tokens": 900, "temperature": null, "seed": 1}'
    with serve(good) as server:
        run(latents, tmp_path / "out", server, count=1, judge_body=changes)
    (body,) = server.asked
    assert body.keys() == {"model", "messages", "max_completion_tokens", "seed"}


def test_too_few_contexts_kept_is_told(tmp_path):
    folder = make_results(tmp_path / "few", 6, top=3)
    with serve(good) as server, pytest.raises(InputError, match="--top 5 or more"):
        run(folder, tmp_path / "out", server)


def test_a_key_that_is_a_word_leaves_the_answers_as_they_are(latents, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serve(lambda body: "[[none]]" if "Pattern" in question(body) else good(body)) as server:
        summary = run(latents, tmp_path / "out", server, detection=True)
    assert summary["detection"]["scored"] == 12


def test_plain_http_never_goes_through_a_proxy(latents, tmp_path, monkeypatch):
    with serve(good) as server, serve(good) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("ALL_PROXY", proxy.url.removesuffix("/v1"))
        run(latents, tmp_path / "out", server)
    assert (len(server.asked), len(proxy.asked)) == (12, 0)


@pytest.mark.parametrize(
    "usage",
    [
        [1],
        "x",
        None,
        {"prompt_tokens": "12"},
        {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": 1.5, "completion_tokens": 5},
    ],
)
def test_an_odd_count_of_tokens_counts_with_the_most_it_may_be(latents, tmp_path, usage):
    body = json.dumps({**completion("[[3]] [[fine]]"), "usage": usage}).encode()
    prices = {"price_in": 0, "price_out": 1e6 / 512}
    with serve(lambda _: Reply(body)) as server:
        summary = run(latents, tmp_path / "out", server, **prices)
        assert summary["cost"] == summary["scored"] == 12
        assert run(latents, tmp_path / "out", server, **prices) == summary
    assert len(server.asked) == 12


def test_half_of_a_surrogate_pair_in_an_answer_is_replaced(latents, tmp_path):
    with serve(lambda _: "[[3]] [[half \ud800]]") as server:
        run(latents, tmp_path / "asked", server, count=1)
    (row,) = scores(tmp_path / "asked")
    assert row["name"] == "half \ufffd"
    line = {"id": f"score-{row['latent']}", "answer": "[[3]] [[half \ud800]]"}
    (tmp_path / "given.jsonl").write_text(json.dumps(line))
    run(latents, tmp_path / "given", judge="none", count=1, answers=[str(tmp_path / "given.jsonl")])
    assert scores(tmp_path / "given")[0]["name"] == "half \ufffd"


def test_prompts_that_are_always_refused_do_not_block_the_rest(latents, tmp_path):
    bad = {score_prompt(n, Results(latents).contexts_of([n])[n]).user for n in choose(qualifying(latents), 12, 42)[::3]}

    def answer(body):
        return (
            Reply(b"refused", 400) if question(body) in bad else "[[1]]" if "Pattern" in question(body) else good(body)
        )

    with serve(answer) as server:
        assert run(latents, tmp_path / "out", server, concurrency=1)["scored"] == 8
        summary = run(latents, tmp_path / "out", server, detection=True, concurrency=1)
    assert summary["detection"]["scored"] == summary["detection"]["prompts"] == 8
    assert summary["detection"]["too_few_contexts"] == 0


def qualifying(latents):
    return Results(latents).active_in_dialogues(SHOWN)


def test_an_endpoint_that_refuses_all_prompts_is_given_up(latents, tmp_path):
    given_up = pytest.raises(EndpointError, match=r"3 prompts in a row.*unsupported parameter")
    with serve(lambda _: Reply(b"unsupported parameter", 400)) as server, given_up:
        run(latents, tmp_path / "out", server, concurrency=1)
    assert len(server.asked) == 3


def test_what_was_never_sent_costs_nothing(latents, tmp_path):
    with serve(good) as server:
        pass
    with pytest.raises(EndpointError, match="no connection"):
        run(latents, tmp_path / "out", server, price_in=1, price_out=1, retries=1)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["cost"] == 0


def test_a_response_that_can_not_be_decoded_is_tried_again(latents, tmp_path):
    broken = iter([Reply(b"no gzip", headers=(("Content-Encoding", "gzip"),))])
    with serve(lambda body: next(broken, None) or good(body)) as server:
        assert run(latents, tmp_path / "out", server)["scored"] == 12
    assert len(server.asked) == 13


def test_a_stop_does_not_wait_for_those_that_wait(latents, tmp_path):
    replies = iter([Reply(b"later", 429, headers=(("Retry-After", "60"),)), Reply(b"no", 401, after=0.2)])
    with serve(lambda _: next(replies)) as server, pytest.raises(EndpointError, match="401"):
        run(latents, tmp_path / "out", server, concurrency=2)
    assert time.monotonic() - server.times[-1] < 30  # it would be 60


def test_contexts_that_the_judge_has_seen_word_by_word_are_no_test_of_it(latents):
    results = Results(latents)
    contexts = results.contexts_of([7])[7]
    repeated = contexts[:SHOWN] + [{**row, "text": contexts[0]["text"]} for row in contexts[SHOWN:]]
    assert detection_prompt(7, "a name", repeated, results.windows(), 3) is None
    twins = contexts[:SHOWN] + [{**row, "text": "twin" if n % 2 else "other"} for n, row in enumerate(contexts[SHOWN:])]
    assert Counter(detection_prompt(7, "a name", twins, results.windows(), 3).active) == {True: 2, False: 5}


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


def test_tokens_without_a_tokenizer_are_not_judged(tmp_path):
    folder = make_results(tmp_path / "latents", 10)
    write_json_atomic(folder / "about.json", {**read_json(folder / "about.json"), "readable": False})
    with pytest.raises(InputError, match="no judge can read"):
        run(folder, tmp_path / "out", judge="none")
