"""What a judge may cost, and that its key goes nowhere else."""

import json

import pytest
from judge_server import Reply, completion, question, serve
from judging import KEY, good, run

from fastcache.errors import BudgetError, EndpointError, InputError
from fastcache.pipeline.cli import main

pytestmark = pytest.mark.usefixtures("quick_judge")


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


def test_more_latents_cost_only_themselves(latents, tmp_path):
    with serve(good) as server:
        run(latents, tmp_path / "out", server, count=4)
        assert run(latents, tmp_path / "out", server, count=9)["scored"] == 9
    assert len(server.asked) == 9


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.11])
def test_the_cost_never_passes_its_limit(latents, tmp_path, limit):
    usage = {"prompt_tokens": 2000, "completion_tokens": 512}
    with serve(lambda body: Reply(good(body), usage=usage)) as server, pytest.raises(BudgetError, match="max-cost"):
        run(latents, tmp_path / "out", server, price_in=2.5, price_out=10, max_cost=limit)
    paid = len(server.asked) * (2000 * 2.5 + 512 * 10) / 1e6
    assert 0 < paid <= limit
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["cost"] == pytest.approx(paid)


def test_a_gateway_that_gives_up_may_have_cost_the_answer(latents, tmp_path):
    prices = {"price_in": 0, "price_out": 1e6 / 512, "max_cost": 2.5}
    with serve(lambda _: Reply(b"", 504)) as server, pytest.raises(BudgetError):
        run(latents, tmp_path / "out", server, **prices, concurrency=1)
    assert len(server.asked) == 2


def test_a_request_without_an_answer_counts_with_the_most_it_may_have_cost(latents, tmp_path):
    with serve(lambda body: Reply(good(body), after=4)) as server, pytest.raises(BudgetError):
        run(latents, tmp_path / "out", server, price_in=0, price_out=1e6 / 512, max_cost=2.5, timeout=1, concurrency=1)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "usage",
    [
        [1],
        "x",
        None,
        {"prompt_tokens": "12"},
        {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": 10**400, "completion_tokens": 5},
        {"prompt_tokens": True, "completion_tokens": 5},
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


def test_what_was_never_sent_costs_nothing(latents, tmp_path):
    with serve(good) as server:
        pass
    with pytest.raises(EndpointError, match="no connection"):
        run(latents, tmp_path / "out", server, price_in=1, price_out=1, retries=1)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["cost"] == 0


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
        ({"judge_url": "http://[::1]x/v1"}, "no address"),
        ({"judge_url": "https://loc\u2603/v1"}, "no address"),
        ({"judge_body": '{"user": "\\ud800"}'}, "surrogate pair"),
        ({"judge_model": "\udcff"}, "expected text in UTF-8"),
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


def test_a_key_that_no_header_can_hold_is_told(latents, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e4-secret")
    with serve(good) as server, pytest.raises(InputError, match="characters that a key") as error:
        run(latents, tmp_path / "out", server)
    assert "secret" not in str(error.value)


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
