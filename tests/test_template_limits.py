"""Chat templates that never end or write without measure: one sentence, whatever they do."""

import pytest
from transformers import AutoTokenizer

from fastcache.assets import DEMO
from fastcache.errors import ModelError, TemplateRefusalError
from fastcache.llm import template_env
from fastcache.llm.chat import ChatRenderer

MESSAGES = [{"role": "user", "content": "owl"}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture
def few_steps(monkeypatch):
    """The limit of steps, in the time that a test has."""
    monkeypatch.setattr(template_env, "MAX_STEPS", 20_000)


def loop(body):
    return (
        f"{{% set ns = namespace(x='ab', n=2, l=[1]) %}}{{% for i in range(9999) %}}{body}{{% endfor %}}{{{{ ns.x }}}}"
    )


BROKEN = {
    "division": "{{ 1/0 }}",
    "macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "nested loops": loop("{% for j in range(99999) %}{% endfor %}"),
    "loops that write": loop("{% for j in range(99999) %}a{% endfor %}"),
    "long lists": loop("{% set y = range(99999)|list %}"),
    "times": "{{ 'a' * 10**8 }}",
    "times, where it is never taken": "{% if false %}{{ 'a' * 10**10 }}{% endif %}owl",
    "times in two steps": "{{ ('a' * 10000) * 10000 }}",
    "power": "{{ 9**99999999 }}",
    "numbers": loop("{% set ns.n = ns.n * ns.n %}"),
    "doubling": loop("{% set ns.x = ns.x + ns.x %}"),
    "doubling with ~": loop("{% set ns.x = ns.x ~ ns.x %}"),
    "doubling lists": loop("{% set ns.l = ns.l + ns.l %}"),
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width in values": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "replace": "{{ ('a' * 1000).replace('a', 'b' * 100000) }}",
    "join": "{{ (['a' * 1000] * 10000)|join }}",
    "indent": "{{ ('a\n' * 1000)|indent(1000000) }}",
    "indented JSON": "{{ (range(99)|list)|tojson(indent=1000000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "tabs": "{{ ('\t' * 10000).expandtabs(1000000) }}",
    "chance": "{{ lipsum() }}",
    "one of many": "{{ [1, 2]|random }}",
    "deep nesting": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "no Jinja": "{% for m in messages %}",
}


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_a_template_that_exceeds_a_limit_is_a_model_error(tokenizer, few_steps, source):
    tokenizer.chat_template = source
    with pytest.raises(ModelError, match="chat template"):
        ChatRenderer(tokenizer).render(MESSAGES)


def test_a_limit_that_only_one_dialogue_exceeds_is_its_refusal(tokenizer, few_steps):
    endless = loop("{% for j in range(999) %}{% endfor %}")
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if 'loop' in messages[0].content %}" + endless + "{% endif %}"
    )
    renderer = ChatRenderer(tokenizer)
    assert renderer.render(MESSAGES).text == "owl"
    with pytest.raises(TemplateRefusalError, match="too many steps"):
        renderer.render([{"role": "user", "content": "loop"}])


def test_the_clock_stops_what_the_counts_miss_and_never_refuses_one_dialogue(tokenizer, monkeypatch):
    monkeypatch.setattr(template_env, "MAX_CPU_SECONDS", 0.0)
    long = "{% for i in range(2000) %}{% endfor %}"
    tokenizer.chat_template = "{% if messages[0].content == 'slow' %}" + long + "{% endif %}"
    renderer = ChatRenderer(tokenizer)
    assert renderer.render(MESSAGES).text == ""
    with pytest.raises(ModelError, match="more than 0 s for one dialogue"):
        renderer.render([{"role": "user", "content": "slow"}])


def test_a_machine_without_memory_refuses_no_dialogue(tokenizer, monkeypatch):
    def fail(*_args, **_keywords):
        raise MemoryError

    renderer = ChatRenderer(tokenizer)
    monkeypatch.setattr(template_env.TrackingEnvironment, "render", fail)
    with pytest.raises(MemoryError):
        renderer.render(MESSAGES)


ESCAPES = ["{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{{ messages.append(1) }}"]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_is_that_of_transformers(tokenizer, source):
    tokenizer.chat_template = source
    with pytest.raises(TemplateRefusalError):
        ChatRenderer(tokenizer).render(MESSAGES)


def test_a_template_may_write_nothing(tokenizer):
    tokenizer.chat_template = "{# nothing #}"
    rendered = ChatRenderer(tokenizer).render(MESSAGES)
    assert (rendered.text, len(rendered.token_ids), rendered.left_out) == ("", 0, {"user content": 3})


def test_reasons_do_not_quote_the_dialogue(tokenizer):
    """So that the same refusal of many dialogues is counted as one."""
    tokenizer.chat_template = (
        "{{ raise_exception('No ' + messages[0].role + ' may say ' + messages[0].content + '!') }}"
    )
    with pytest.raises(TemplateRefusalError) as caught:
        ChatRenderer(tokenizer).render(MESSAGES)
    assert caught.value.reason == "No user may say …!"
