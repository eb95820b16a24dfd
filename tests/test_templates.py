"""Published chat templates with dialogues of many shapes: exactly what transformers writes, or the template's own refusal."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES, TOOLS, templates, tokenizer_for, turn

from fastcache.cache_format.schema import TokenType, TurnRole, turn_roles
from fastcache.errors import TemplateRefusalError
from fastcache.llm.chat import ChatRenderer
from fastcache.llm.dialogue import Dialogue
from fastcache.llm.layouts import Layouts
from fastcache.llm.template import pinned_date

NAMES = (
    "CohereForAI-c4ai-command-r7b-12-2024", "HuggingFaceTB-SmolLM3-3B", "LiquidAI-LFM2-8B-A1B", "MiniMaxAI-MiniMax-M2",
    "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Qwen-Qwen3-Coder", "Qwen-Qwen3-Instruct-2507", "Qwen-Qwen3.5-4B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek-ai-DeepSeek-V3.1", "google-gemma-2-2b-it", "google-gemma-3",
    "google-gemma-4-31B-it", "ibm-granite-granite-4.0", "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct", "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Ministral-3-14B-Reasoning-2512", "mistralai-Mistral-Nemo-Instruct-2407",
    "mistralai-Mistral-Small-3.2-24B-Instruct-2506", "moonshotai-Kimi-K2", "nvidia-Nemotron-3-Nano-30B-A3B",
    "nvidia-Nemotron-Nano-v2", "openai-gpt-oss-120b", "swiss-ai-Apertus-8B-Instruct", "zai-GLM-4.6",
)  # fmt: skip
KINDS = TokenType.SPECIAL | TokenType.ROLE_WORD | TokenType.TEMPLATE | TokenType.CONTENT


@pytest.fixture(scope="module")
def known(testdata):
    """Tokenizer and renderer of each template."""
    sources = templates(testdata)
    assert set(sources) == set(NAMES)

    @cache
    def load(name):
        tokenizer = tokenizer_for(sources[name])
        return tokenizer, ChatRenderer(tokenizer)

    return load


def theirs(tokenizer, form, tools):
    """The ids of transformers, on the fixed date."""
    return tokenizer.apply_chat_template(
        form, tools=tools, return_dict=False, chat_template=pinned_date(tokenizer.chat_template)
    )


def of_kind(tokenizer, rendered, role, kind=TokenType.CONTENT):
    mask = (turn_roles(rendered.token_types) == role) & (rendered.token_types & kind != 0)
    return tokenizer.decode(rendered.token_ids[mask])


@pytest.mark.parametrize("name", NAMES)
def test_dialogues_have_the_ids_of_transformers_and_one_kind_a_token(known, name):
    tokenizer, renderer = known(name)
    for shape, messages in SHAPES.items():
        for tools in (None, TOOLS):
            try:
                rendered = renderer.render(messages, tools)
            except TemplateRefusalError:
                continue
            if not rendered.changes:
                assert rendered.token_ids.tolist() == theirs(tokenizer, messages, tools), shape
            kinds = rendered.token_types & KINDS
            assert np.isin(kinds, [1, 2, 4, 8]).all()
            assert (turn_roles(rendered.token_types) <= max(TurnRole)).all()


@pytest.mark.parametrize("name", NAMES)
def test_tracing_finds_every_character_that_transformers_writes(known, name):
    """The way back by comparing texts is for templates that do what nobody foresaw; these don't need it."""
    template = known(name)[1]._template
    for messages in SHAPES.values():
        dialogue = Dialogue.of(messages, TOOLS)
        for form in dialogue.forms(fold_system=True):
            try:
                plain = template._plain(dialogue, form, False)
            except Exception:
                continue
            assert template._trace(dialogue, form, False) == plain


REFUSED = {
    "google-gemma-2-2b-it": ("system", "System role not supported"),
    "google-gemma-3": ("call", "Conversation roles must alternate user/assistant/user/assistant/..."),
    "meta-llama-Llama-3.1-8B-Instruct": ("two calls", "This model only supports single tool-calls at once!"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_the_templates_own(known, name):
    shape, reason = REFUSED[name]
    with pytest.raises(TemplateRefusalError) as caught:
        known(name)[1].render(SHAPES[shape])
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", NAMES)
def test_plain_dialogues_are_never_refused_and_contents_are_found(known, name):
    tokenizer, renderer = known(name)
    for shape in ("plain", "many turns", "ends with user", "blanks"):
        rendered = renderer.render(SHAPES[shape])
        for role, wanted in (("user", TurnRole.USER), ("assistant", TurnRole.ASSISTANT)):
            said = "".join(message["content"] for message in SHAPES[shape] if message["role"] == role)
            assert "".join(of_kind(tokenizer, rendered, wanted).split()) == "".join(said.split())


WORDS = {"MiniMaxAI-MiniMax-M2": {"user", "ai"}, "nvidia-Nemotron-Nano-v2": {"User", "Assistant"}}
WITHOUT_WORDS = ("CohereForAI", "deepseek-ai", "microsoft-Phi", "mistralai", "swiss-ai", "zai-GLM")
"""Their headers are special tokens alone."""


@pytest.mark.parametrize("name", NAMES)
def test_role_words_of_headers_are_known(known, name):
    tokenizer, renderer = known(name)
    rendered = renderer.render(SHAPES["plain"])
    words = of_kind(tokenizer, rendered, TurnRole.USER, TokenType.ROLE_WORD)
    words = {words, of_kind(tokenizer, rendered, TurnRole.ASSISTANT, TokenType.ROLE_WORD)}
    expected = {"user", "model"} if "gemma" in name else WORDS.get(name, {"user", "assistant"})
    assert words == ({""} if name.startswith(WITHOUT_WORDS) else expected)


WHOSE = {
    "openai-gpt-oss-120b": ("many turns", "<|start|>assistant<|channel|>final<|message|>The grey one.<|end|>"),
    "google-gemma-3": ("system", "<start_of_turn>user\n"),
    "swiss-ai-Apertus-8B-Instruct": ("ends with user", "<|assistant_start|>The grey one.<|assistant_end|>"),
    "moonshotai-Kimi-K2": ("plain", "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"),
    "deepseek-ai-DeepSeek-V3.1": ("plain", "<｜User｜>Which owl?"),
}
"""A template -> a dialogue, and the text of one of the stretches that belong to one role."""


@pytest.mark.parametrize("name", WHOSE)
def test_text_between_turns_belongs_to_the_right_one(known, name):
    tokenizer, renderer = known(name)
    shape, text = WHOSE[name]
    rendered = renderer.render(SHAPES[shape])
    roles = turn_roles(rendered.token_types)
    starts = [0, *(np.flatnonzero(np.diff(roles)) + 1).tolist(), len(roles)]
    stretches = [tokenizer.decode(rendered.token_ids[a:b]) for a, b in pairwise(starts)]
    assert text in stretches, stretches


# --- Contents that a template may take for something

hostile = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "\n", " ", "owl", "<|im_end|>", "<｜User｜>", "/think", "[INST]", "é", "<|channel>"]
    ),
    max_size=8,
).map("".join)
TAKEN = ("Qwen-Qwen3-0.6B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "nvidia-Nemotron-3-Nano-30B-A3B", "zai-GLM-4.6")


@pytest.mark.parametrize("name", TAKEN)
def test_no_content_becomes_a_special_token_or_is_lost_without_a_count(known, name):
    tokenizer, renderer = known(name)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(hostile, min_size=2, max_size=4))
    def check(contents):
        messages = [turn(role, text) for role, text in zip(["user", "assistant"] * 2, contents, strict=False)]
        rendered = renderer.render(messages)
        # What is typed special is the template's own: the text of specials is that of the same dialogue in letters.
        of_user = turn_roles(rendered.token_types) == TurnRole.USER
        special = of_user & (rendered.token_types & TokenType.SPECIAL != 0)
        harmless = renderer.render([turn(message["role"], "a") for message in messages])
        assert rendered.token_ids[special].tolist() == [
            int(index)
            for index, flags in zip(harmless.token_ids, harmless.token_types, strict=True)
            if flags & TokenType.SPECIAL and flags >> 5 == TurnRole.USER
        ]
        assert tokenizer.decode(rendered.token_ids) == rendered.text

    check()


odd_words = ["a", " ", "\n", "</think>", "<think>", "/no_think", "é", "<", "user"]
plain = st.lists(st.sampled_from(odd_words), max_size=6).map("".join)


@pytest.mark.parametrize("name", NAMES)
def test_a_dialogue_renders_the_same_without_a_trace(known, name):
    """With the layout of an earlier dialogue of the same roles, which most need no trace of their own."""
    tokenizer, renderer = known(name)
    traced = ChatRenderer(tokenizer)
    renderer.render([turn(role, "probe") for role in ("user", "assistant", "user", "assistant")])

    @settings(max_examples=15, deadline=None)
    @given(st.lists(plain, min_size=4, max_size=4))
    def check(contents):
        messages = [turn(role, text) for role, text in zip(["user", "assistant"] * 2, contents, strict=True)]
        traced._layouts = Layouts()
        outcomes = []
        for one in (renderer, traced):
            try:
                rendered = one.render(messages)
                parts = rendered.text, rendered.token_ids.tolist(), rendered.token_types.tolist(), rendered.turns
                outcomes.append((*parts, rendered.left_out, rendered.changes))
            except TemplateRefusalError as error:
                outcomes.append(error.reason)
        assert outcomes[0] == outcomes[1]

    check()
