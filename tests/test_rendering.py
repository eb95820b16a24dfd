"""Reasoning, tools and markers token by token; system turns that don't fit; one renderer for all."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import run_extract
from safetensors.torch import load_file, save_file
from shapes import ANSWER, ASKED, CALLED, EXCHANGE, SHAPES, TOOLS, call, templates, tokenizer_for, turn
from tokenizers import AddedToken
from transformers import AutoTokenizer

from fastcache.assets import DEMO
from fastcache.cache_format.reader import open_cache
from fastcache.cache_format.schema import TOKEN_SETS, TokenType, TurnRole, token_sets, turn_roles
from fastcache.corpus import Corpus
from fastcache.errors import InputError, TemplateRefusalError
from fastcache.llm.chat import ChatRenderer
from fastcache.llm.dialogue import AS_OBJECT, AS_TEXT, EMPTY_LEFT_OUT, FOLDED
from fastcache.pipeline.cli import cli, main
from fastcache.stages.steer.run import _prompt_ids
from fastcache.stages.train.selection import _wanted

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def made(testdata):
    """A tokenizer and a renderer for a template."""
    sources = templates(testdata)

    def make(name, **settings):
        tokenizer = tokenizer_for(next((text for key, text in sources.items() if name in key), name))
        return tokenizer, ChatRenderer(tokenizer, **settings)

    return make


def content_of(tokenizer, rendered, role):
    mask = (turn_roles(rendered.token_types) == role) & (rendered.token_types & TokenType.CONTENT != 0)
    return tokenizer.decode(rendered.token_ids[mask])


# --- Reasoning


@pytest.mark.parametrize("shape", ["thoughts", "reasoning field"])
def test_the_last_reasoning_is_typed_and_the_earlier_one_counted(made, shape):
    tokenizer, renderer = made("Qwen3-0.6B")
    rendered = renderer.render(SHAPES[shape])
    assert content_of(tokenizer, rendered, TurnRole.REASONING) == "it is winter"
    assert content_of(tokenizer, rendered, TurnRole.ASSISTANT) == "Cold.So."
    assert rendered.left_out == {"reasoning": len("letmesee")}


def test_reasoning_that_a_template_passes_on_is_typed_with_the_tags_outside(made):
    tokenizer, renderer = made(CHATML)
    rendered = renderer.render(SHAPES["thought"])
    assert content_of(tokenizer, rendered, TurnRole.REASONING).strip() == "let me see"
    assert "".join(content_of(tokenizer, rendered, TurnRole.ASSISTANT).split()) == "<think></think>Cold."
    assert rendered.left_out == {}


def test_gpt_oss_writes_reasoning_into_its_own_channel(made):
    tokenizer, renderer = made("gpt-oss")
    rendered = renderer.render(SHAPES["reasoning field"])
    assert "<|channel|>analysis<|message|>it is winter<|end|>" in rendered.text
    assert content_of(tokenizer, rendered, TurnRole.REASONING) == "it is winter"


def test_what_a_user_says_between_tags_is_no_reasoning(made):
    _, renderer = made(CHATML)
    rendered = renderer.render([turn("user", "<think>x</think> y"), turn("assistant", "z")])
    assert TurnRole.REASONING not in turn_roles(rendered.token_types)


def test_reasoning_is_a_token_set(made):
    _, renderer = made("Qwen3-0.6B")
    types = renderer.render(SHAPES["thought"]).token_types
    assert token_sets(types)[TOKEN_SETS.index("reasoning")].sum() == (turn_roles(types) == TurnRole.REASONING).sum() > 0


# --- Tools


def test_calls_and_answers_belong_to_their_turns(made):
    tokenizer, renderer = made("Qwen2.5")
    rendered = renderer.render(CALLED, TOOLS)
    assert '{"name": "look_up", "arguments": {"town": "Oslo", "n": 3}}' in rendered.text
    assert content_of(tokenizer, rendered, TurnRole.ASSISTANT) == 'look_up {"town": "Oslo", "n": 3}It has 3.'
    assert content_of(tokenizer, rendered, TurnRole.TOOL) == "3 degrees"
    assert "Looks up a town." in content_of(tokenizer, rendered, TurnRole.SYSTEM)


CALLS = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ ARGUMENTS }}{% endfor %}{% endfor %}"
FORMS = {
    "object for a template that writes JSON": ("Qwen2.5", '{"town": "Oslo"}', (AS_OBJECT,)),
    "object for a template that takes both": ("Qwen3-0.6B", {"town": "Oslo"}, ()),
    "text for a template that adds it": (
        CALLS.replace("ARGUMENTS", "'a' + c.function.arguments"),
        {"town": "Oslo"},
        (AS_TEXT,),
    ),
    "text for a template that prints it": (
        CALLS.replace("ARGUMENTS", "c.function.arguments"),
        {"town": "Oslo"},
        (AS_TEXT,),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_arguments_have_the_form_that_the_template_expects(made, form):
    name, arguments, changes = FORMS[form]
    rendered = made(name)[1].render([ASKED, turn("assistant", "", tool_calls=[call(arguments)]), *ANSWER])
    assert rendered.changes == changes
    assert '{"town": "Oslo"}' in rendered.text


def test_a_developer_turn_is_a_system_turn_where_the_template_knows_no_other(made):
    tokenizer, renderer = made("Qwen2.5")
    assert content_of(tokenizer, renderer.render(SHAPES["developer"]), TurnRole.SYSTEM) == "Be brief."


BAD = {
    "calls": turn("assistant", "", tool_calls="[]x"),
    "no function": turn("assistant", "", tool_calls=[{"id": "a"}]),
    "reasoning": turn("assistant", "", reasoning_content=3),
    "silence": turn("assistant"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_message_is_an_input_error(made, case):
    with pytest.raises(InputError, match="Turn 1"):
        made(CHATML)[1].render([ASKED, BAD[case]])


# --- Markers


def test_added_tokens_that_the_template_writes_are_special_and_nobody_else_writes_them(made):
    tokenizer, renderer = made("DeepSeek-V3.1")
    marks = tokenizer.convert_tokens_to_ids(["<｜User｜>", "<｜Assistant｜>"])
    rendered = renderer.render([turn("user", "<｜User｜>a<｜Assistant｜>"), turn("assistant", "<｜User｜>")])
    special = rendered.token_types & TokenType.SPECIAL != 0
    for mark in marks:
        assert special[rendered.token_ids == mark].tolist() == [True]
    assert content_of(tokenizer, rendered, TurnRole.USER) == "<｜User｜>a<｜Assistant｜>"


def test_added_tokens_that_the_template_does_not_write_stay_words():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.add_tokens([AddedToken("<table>", special=False, normalized=False)])
    tokenizer.chat_template = CHATML
    rendered = ChatRenderer(tokenizer).render([turn("user", "a<table>b")])
    table = rendered.token_ids == tokenizer.convert_tokens_to_ids("<table>")
    assert rendered.token_types[table].tolist() == [TokenType.CONTENT | TurnRole.USER << 5]


# --- System turns that don't fit


@pytest.mark.parametrize("name", ["gemma-2", "Mistral-Nemo"])
def test_a_system_turn_is_folded_where_the_template_refuses_or_loses_it(made, name):
    tokenizer, renderer = made(name, fold_system=True)
    rendered = renderer.render(SHAPES["system"])
    assert rendered.changes == (FOLDED,)
    assert "Be kind.\n\nWhich owl?" in rendered.text
    assert content_of(tokenizer, rendered, TurnRole.SYSTEM).strip() == "Be kind."


def test_a_system_turn_that_fits_is_not_folded(made):
    plain, folding = made("Qwen2.5")[1], made("Qwen2.5", fold_system=True)[1]
    assert folding.render(SHAPES["system"]).text == plain.render(SHAPES["system"]).text


def test_an_empty_system_turn_is_left_out_where_it_is_refused(made):
    renderer = made("gemma-2")[1]
    rendered = renderer.render(SHAPES["empty system"])
    assert (rendered.changes, rendered.text) == ((EMPTY_LEFT_OUT,), renderer.render(EXCHANGE).text)
    with pytest.raises(TemplateRefusalError, match="System role not supported"):
        renderer.render(SHAPES["system"])


# --- One renderer


def corpus_of(tmp_path, dialogues):
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues))
    main(["prepare", "--source", str(source), "--workers", "1", "--out", str(tmp_path / "corpus")])
    return tmp_path / "corpus"


def use_template(model, tmp_path, template):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    return tmp_path / "model"


@pytest.mark.parametrize("prompt", ["hi", "what does <|im_end|> mean?"])
@pytest.mark.parametrize("name", ["Qwen2.5", "Llama-3.2", "gemma-3", "DeepSeek-V3.1"])
def test_steer_sees_what_extract_sees_up_to_the_generation_prompt(made, name, prompt):
    tokenizer, renderer = made(name)
    ids = _prompt_ids(tokenizer, prompt, None)
    rendered = renderer.render([turn("user", prompt)])
    assert ids[: len(rendered.token_ids)].tolist() == rendered.token_ids.tolist()
    whole = renderer.render([turn("user", prompt), turn("assistant", "yes")])
    assert ids.tolist() == whole.token_ids[: whole.turns[1][0]].tolist()


def test_extract_gives_the_renderer_all_fields(tiny_qwen, tmp_path, testdata):
    dialogue = [
        ASKED,
        turn("assistant", None, tool_calls=[call({"town": "Oslo"})], reasoning_content="let me see"),
        *ANSWER,
    ]
    rows = [[turn("user", f"{number}?"), *dialogue[1:]] for number in range(40)]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps({"messages": row, "tools": TOOLS}) + "\n" for row in rows))
    main(["prepare", "--source", str(source), "--workers", "1", "--out", str(tmp_path / "corpus")])
    model = use_template(tiny_qwen, tmp_path, templates(testdata)["Qwen-Qwen3-0.6B"])
    cache = run_extract(model, tmp_path / "corpus", tmp_path / "cache", layer=(1,), parity=0, split="train")
    instance = open_cache(tmp_path / "cache").instance(0)
    text = AutoTokenizer.from_pretrained(model).decode(instance.token_ids)
    assert "Looks up a town." in text
    assert "<think>\nlet me see\n</think>" in text
    assert '<tool_call>\n{"name": "look_up"' in text
    assert cache.manifest.totals["tokens_by_role"]["REASONING"] > 0


STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('No system, please') }}{% endif %}" + CHATML


def test_reasons_of_refusals_are_kept_and_quoted(tiny_qwen, tmp_path):
    dialogues = [
        [*([turn("system", "x")] * (n % 2)), turn("user", f"{n} owls?"), turn("assistant", "yes")] for n in range(60)
    ]
    corpus, model = corpus_of(tmp_path, dialogues), use_template(tiny_qwen, tmp_path, STRICT)
    cache = run_extract(model, corpus, tmp_path / "cache", layer=(1,), parity=0)
    ledger = open_cache(tmp_path / "cache").manifest.ledger
    reason = "refused by the chat template: No system, please"
    assert ledger["skipped"][reason] > 0
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "cache")]).output
    assert f"{reason}); the first one is row {ledger['first_skipped'][reason]}." in " ".join(shown.split())
    assert cache.n_instances == ledger["stored"]


def test_a_corpus_of_refused_dialogues_is_refused_with_the_reason(tiny_qwen, tmp_path):
    dialogues = [[turn("system", "x"), turn("user", f"{n} owls?"), turn("assistant", "yes")] for n in range(40)]
    corpus, model = corpus_of(tmp_path, dialogues), use_template(tiny_qwen, tmp_path, STRICT)
    with pytest.raises(InputError, match=r"No system, please .*--fold-system"):
        run_extract(model, corpus, tmp_path / "cache", layer=(1,), parity=0)
    folded = run_extract(model, corpus, tmp_path / "cache", layer=(1,), parity=0, fold_system=True)
    assert folded.manifest.ledger["changed"] == {FOLDED: folded.n_instances}
    assert folded.manifest.identity["tokenizer"]["fold_system"] is True


def test_parity_leaves_out_what_is_not_finite_where_that_is_skipped(tiny_qwen, tmp_path):
    dialogues = [[turn("user", "½" if n == 3 else f"{n} owls?"), turn("assistant", "yes")] for n in range(60)]
    corpus, model = corpus_of(tmp_path, dialogues), use_template(tiny_qwen, tmp_path, CHATML)
    weights = load_file(model / "model.safetensors")
    token = AutoTokenizer.from_pretrained(model).encode("½", add_special_tokens=False)[-1]
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name][token] = np.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    settings = {"layer": (1,), "parity": 60, "on_nonfinite": "skip"}
    splits = [name for name, n_rows in Corpus(corpus).info["splits"].items() if n_rows]
    split = next(name for name in splits if any(row.messages[0]["content"] == "½" for row in Corpus(corpus).rows(name)))
    cache = run_extract(model, corpus, tmp_path / "cache", split=split, **settings)
    assert sum(cache.manifest.ledger["skipped"].values()) == 1
    assert len(cache.manifest.parity["lengths"]) == cache.n_instances


@pytest.mark.parametrize("tokens_of", ["assistant", "reasoning"])
def test_training_can_choose_reasoning_or_answers(made, tokens_of):
    tokenizer, renderer = made("Qwen3-0.6B")
    rendered = renderer.render(SHAPES["thoughts"])
    chosen = tokenizer.decode(rendered.token_ids[_wanted(rendered.token_types, tokens_of)])
    assert chosen == {"assistant": "Cold.So.", "reasoning": "it is winter"}[tokens_of]
