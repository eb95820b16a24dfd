"""A judge that is slow, fails or refuses: what can be answered is, and what was answered stays."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from judge_server import Reply, question, serve
from judging import KEY, good, run

from fastcache.errors import EndpointError
from fastcache.stages.interpret.judge.prompts import SHOWN, choose, score_prompt
from fastcache.stages.interpret.results import Results

DEEP = b"[" * 600 + b"]" * 600

pytestmark = pytest.mark.usefixtures("quick_judge")


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
    slow, asked_again = iter([True]), threading.Event()

    def answer(body):
        if next(slow, False):
            asked_again.wait()  # longer than anybody waits
        elif len(server.asked) == 3:
            asked_again.set()
        return good(body)

    with serve(answer) as server:
        summary = run(latents, tmp_path / "out", server, count=2, timeout=3)
    assert summary["scored"] == 2
    assert len(server.asked) == 3
    assert "no answer in 3 s" in (tmp_path / "out" / "answers.jsonl").read_text()


@pytest.mark.parametrize(
    "body",
    [
        b"<html>busy</html>",
        b"",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": [1]}}]}',
        b"[NaN]",
        DEEP,
    ],
)
def test_a_response_that_is_no_completion_is_kept_and_tried_again(latents, tmp_path, body):
    bad = iter([body])
    with serve(lambda asked: Reply(found, 200) if (found := next(bad, None)) is not None else good(asked)) as server:
        summary = run(latents, tmp_path / "out", server, count=3)
    assert summary["scored"] == 3
    assert len(server.asked) == 4
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    kept = [line["body"] for line in lines if line["event"] == "failed"]
    assert kept == ["[nested too deeply to be read]" if body == DEEP else body.decode()]


def test_a_response_that_can_not_be_decoded_is_tried_again(latents, tmp_path):
    broken = iter([Reply(b"no gzip", headers=(("Content-Encoding", "gzip"),))])
    with serve(lambda body: next(broken, None) or good(body)) as server:
        assert run(latents, tmp_path / "out", server)["scored"] == 12
    assert len(server.asked) == 13


def test_at_most_so_many_requests_are_under_way(latents, tmp_path):
    with serve(lambda body: Reply(good(body), after=0.05)) as server:
        run(latents, tmp_path / "out", server, concurrency=3)
    assert 1 < server.at_once <= 3


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


def test_prompts_that_are_always_refused_do_not_block_the_rest(latents, tmp_path):
    bad = {
        score_prompt(n, Results(latents).contexts_of([n])[n]).user
        for n in choose(Results(latents).active_in_dialogues(SHOWN), 12, 42)[::3]
    }

    def answer(body):
        return (
            Reply(b"refused", 400) if question(body) in bad else "[[1]]" if "Pattern" in question(body) else good(body)
        )

    with serve(answer) as server:
        assert run(latents, tmp_path / "out", server, concurrency=1)["scored"] == 8
        summary = run(latents, tmp_path / "out", server, detection=True, concurrency=1)
    assert summary["detection"]["scored"] == summary["detection"]["prompts"] == 8
    assert summary["detection"]["too_few_contexts"] == 0


def test_an_endpoint_that_refuses_all_prompts_is_given_up(latents, tmp_path):
    given_up = pytest.raises(EndpointError, match=r"3 prompts in a row.*unsupported parameter")
    with serve(lambda _: Reply(b"unsupported parameter", 400)) as server, given_up:
        run(latents, tmp_path / "out", server, concurrency=1)
    assert len(server.asked) == 3


def test_a_refused_request_stops_at_once_and_hides_the_key(latents, tmp_path):
    refuses = pytest.raises(EndpointError, match=r"401.*no such key: \[key\]")
    with serve(lambda _: Reply(f"no such key: {KEY}".encode(), 401)) as server, refuses:
        run(latents, tmp_path / "out", server, concurrency=2)
    assert len(server.asked) <= 2


def test_a_stop_does_not_wait_for_those_that_wait(latents, tmp_path):
    replies = iter([Reply(b"later", 429, headers=(("Retry-After", "60"),)), Reply(b"no", 401, after=0.2)])
    with serve(lambda _: next(replies)) as server, pytest.raises(EndpointError, match="401"):
        run(latents, tmp_path / "out", server, concurrency=2)
    assert time.monotonic() - server.times[-1] < 30  # it would be 60


def test_an_endpoint_that_is_down_is_given_up(latents, tmp_path):
    with serve(good) as server:
        pass
    with pytest.raises(EndpointError, match=r"3 prompts in a row.*again to go on"):
        run(latents, tmp_path / "out", server, retries=1, concurrency=1)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failures"] == {"unanswered": 12}


def test_a_killed_run_asks_only_for_what_is_missing(latents, tmp_path):
    first, killed = threading.Semaphore(4), threading.Event()

    def answer(body):
        if not first.acquire(blocking=False):
            killed.wait()
        return good(body)

    with serve(answer) as server:
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
        killed.set()
        before = len(server.asked)
        summary = run(latents, tmp_path / "out", server)
    assert summary["scored"] == 12
    assert before <= 6  # 4 were answered, and 2 are asked at a time
    assert len(server.asked) <= 12 + 2  # those that were under way
    assert len(server.asked) <= summary["requests"] <= len(server.asked) + 2  # noted before it is sent
