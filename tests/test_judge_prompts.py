"""What a judge is asked, and how its answers are read: nothing is guessed."""

import json
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.stages.interpret.judge.answers import (
    Score,
    UnparsedError,
    balanced_accuracy,
    parse_detection,
    parse_score,
)
from fastcache.stages.interpret.judge.prompts import SHOWN, choose, detection_prompt, score_prompt
from fastcache.stages.interpret.results import Results


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


def test_contexts_that_the_judge_has_seen_word_by_word_are_no_test_of_it(latents):
    results = Results(latents)
    contexts = results.contexts_of([7])[7]
    repeated = contexts[:SHOWN] + [{**row, "text": contexts[0]["text"]} for row in contexts[SHOWN:]]
    assert detection_prompt(7, "a name", repeated, results.windows(), 3) is None
    twins = contexts[:SHOWN] + [{**row, "text": "twin" if n % 2 else "other"} for n, row in enumerate(contexts[SHOWN:])]
    assert Counter(detection_prompt(7, "a name", twins, results.windows(), 3).active) == {True: 2, False: 5}
