"""A tokenizer's chat template: what it writes for a dialogue, where that comes from, and why it refuses a dialogue.

What it writes is what `apply_chat_template` of transformers returns, on a fixed date. The same template, run by
`TrackingEnvironment`, says where each character comes from; both texts must be equal. Nothing here knows any model's
name.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from fastcache.errors import InputError, ModelError, TemplateRefusalError
from fastcache.llm.dialogue import (
    CALLS,
    CONTENT,
    FOLDED,
    REASONING,
    TOOLS,
    Dialogue,
    Form,
    Source,
    n_visible,
    untracked,
)
from fastcache.llm.provenance import Tracked, TrackedDict, leaves, plain, realigned, runs_of

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerBase

    from fastcache.llm.template_env import TrackingEnvironment

FIXED_DATE = "26 Jul 2024"
"""Templates that print today's date get this one, so that rendering is the same every day."""

MAX_REASON = 200
"""Characters of a refusal that are kept."""

_DAY = datetime(2024, 7, 26)
_DATE_PARTS = {f"%{letter}": _DAY.strftime(f"%{letter}") for letter in "aAbBdHIjmMpSyY"} | {"%-d": "26", "%-m": "7"}
_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace('{part}', '{value}')" for part, value in _DATE_PARTS.items())
    # The plus keeps a newline that the template may begin with.
    + " }}{% endmacro +%}"
)
"""Put before a template, it hides the function of this name that transformers gives to templates."""


def pinned_date(template: str) -> str:
    """The template with `FIXED_DATE` as today."""
    return _DATE_MACRO + template


_ECHO = "{{ messages | tojson }}"
"""A template that says what transformers gives to templates."""


@dataclass(frozen=True)
class Written:
    """What the template wrote for a dialogue."""

    text: Tracked
    dialogue: Dialogue
    changes: tuple[str, ...]
    """How the dialogue was changed to fit."""
    printed_data: bool
    """Whether an object or array stands in the text as Python writes it, which no model was trained on."""

    @cached_property
    def left_out(self) -> dict[str, int]:
        """Characters of the dialogue, blanks aside, that the template left out, by what they are; data count as one."""
        sources = self.dialogue.sources
        kept: list[list[str]] = [[] for _ in sources]
        position, text = 0, plain(self.text)
        for length, code in runs_of(self.text):
            if code >= 0:
                kept[code].append(text[position : position + length])
            position += length
        missing: dict[str, int] = {}
        for source, parts in zip(sources, kept, strict=True):
            name = self._name_of(source)
            if not name or sum(map(len, parts)) >= max(1, len(source.text)):
                continue
            n_missing = (
                n_visible(source.text) - sum(map(n_visible, parts)) if source.text else int(source.field != CONTENT)
            )
            if n_missing > 0:
                missing[name] = missing.get(name, 0) + n_missing
        return missing

    def _name_of(self, source: Source) -> str:
        """What a text is, for the counts; empty for what isn't counted."""
        if source.field == CONTENT and source.turn is not None:
            return f"{self.dialogue.roles[source.turn]} content"
        return source.field if source.field in (REASONING, CALLS, TOOLS) else ""

    @property
    def loses_system(self) -> bool:
        """Whether the first turn is a system turn of which nothing is left."""
        code = next((i for i, s in enumerate(self.dialogue.sources) if s.turn == 0 and s.field == CONTENT), None)
        if code is None or self.dialogue.roles[0] not in ("system", "developer"):
            return False
        return bool(self.dialogue.sources[code].text) and all(c != code for _, c in runs_of(self.text))


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", fold_system: bool = False) -> None:
        """With `fold_system`, a system turn that the template refuses or leaves out goes into the first user turn.

        Raises `ModelError` for a tokenizer without chat template.
        """
        self._tokenizer = tokenizer
        self._fold_system = fold_system
        self._sources = {has_tools: self._find_source(has_tools) for has_tools in (False, True)}
        self._compiled = lru_cache(2)(self._compile)
        self._known_aliases: list[str] | None = None

    def apply(self, dialogue: Dialogue, generation_prompt: bool = False) -> Written:
        """What the template writes for the dialogue, in the first form that it accepts and that loses nothing.

        Raises `TemplateRefusalError` if it refuses the dialogue in every form, with its own words; `ModelError` if the
        template can't be used for any.
        """
        best: Written | None = None
        refusals: list[TemplateRefusalError] = []
        for form in dialogue.forms(self._fold_system):
            try:
                written = self._write(dialogue, form, generation_prompt)
            except TemplateRefusalError as refusal:
                refusals.append(refusal)
                continue
            if not self._flaws(written):
                return written
            if best is None or self._flaws(written) < self._flaws(best):
                best = written
        if best is None:
            raise next((refusal for refusal in refusals if refusal.by_template), refusals[0])
        return best

    def _flaws(self, written: Written) -> int:
        """What another form of the dialogue may do better."""
        loses_system = written.loses_system and FOLDED not in written.changes
        may_fold = self._fold_system or "developer" in written.dialogue.roles
        return int(written.printed_data) + int(loses_system and may_fold)

    @property
    def literals(self) -> list[str]:
        """The texts that stand in the template."""
        from jinja2 import nodes

        texts: list[str] = []
        for has_tools in (False, True):
            self._compiled(has_tools)  # which tells what is wrong with it
            tree = self._environment.parse(self._sources[has_tools])
            texts += [node.data for node in tree.find_all(nodes.TemplateData)]
            texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        return texts

    def _find_source(self, has_tools: bool) -> str:
        """The template, of those a tokenizer may have; raises `ModelError` if there is none."""
        try:
            return pinned_date(str(self._tokenizer.get_chat_template(tools=[{}] if has_tools else None)))
        except ValueError as error:
            raise ModelError(f"The tokenizer has no chat template that can be used: {error}") from error

    @cached_property
    def _environment(self) -> "TrackingEnvironment":
        from fastcache.llm.template_env import TrackingEnvironment

        return TrackingEnvironment()

    def _compile(self, has_tools: bool) -> "jinja2.Template":
        import jinja2

        from fastcache.llm.template_code import TemplateLimitError

        try:
            self._environment.check_constants(self._sources[has_tools])
            return self._environment.from_string(self._sources[has_tools])
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"The model's chat template is no valid Jinja: {error}") from error
        except (TemplateLimitError, RecursionError, MemoryError, ValueError, SyntaxError) as error:
            reason = str(error).splitlines()[0][:MAX_REASON]
            raise ModelError(f"The model's chat template can't be compiled ({reason}). {_ADVICE}") from error

    @property
    def _aliases(self) -> list[str]:
        """Other names that transformers gives to `reasoning_content`."""
        if self._known_aliases is None:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
            text = self._tokenizer.apply_chat_template(probe, chat_template=_ECHO, tokenize=False)
            self._known_aliases = [key for key, value in json.loads(str(text))[1].items() if value == "c"]
        return self._known_aliases

    def _write(self, dialogue: Dialogue, form: Form, generation_prompt: bool) -> Written:
        """What the template writes for one form; raises `TemplateRefusalError` and `ModelError`."""
        traced: Tracked | None = None
        try:
            traced = self._trace(dialogue, form, generation_prompt)
        except _RefusedError as refused:
            self._trace_plain(dialogue, form, generation_prompt, refused)
        printed_data = self._environment.printed_data
        try:
            actual = self._plain(dialogue, form, generation_prompt)
        except _expected_errors() as error:
            raise _refusal(error, None) from error
        if traced is None:
            text = realigned(actual, leaves(form.messages))
        else:
            text = traced if traced == actual else _realigned_to(actual, traced)
        return Written(text, dialogue, form.changes, printed_data)

    def _trace_plain(self, dialogue: Dialogue, form: Form, generation_prompt: bool, refused: "_RefusedError") -> None:
        """The same without codes: raises `TemplateRefusalError` if the template `refused` a dialogue for good."""
        plain_form = replace(form, messages=[untracked(message) for message in form.messages])
        try:
            self._trace(dialogue, plain_form, generation_prompt)
        except _RefusedError as error:
            raise _refusal(error.cause, refused) from error

    def plain_text(self, roles: Sequence[str], contents: Sequence[str]) -> str | None:
        """What is written for a dialogue with the roles of one that was traced before; None if that needs a trace."""
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return self._apply(messages, None, False)
        except _expected_errors():
            return None

    def _plain(self, dialogue: Dialogue, form: Form, generation_prompt: bool) -> str:
        """What transformers writes for one form."""
        tools = untracked(dialogue.tools) if dialogue.tools else None
        return self._apply([untracked(message) for message in form.messages], tools, generation_prompt)

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any] | None, generation_prompt: bool) -> str:
        """What `apply_chat_template` of transformers returns."""
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._sources[bool(tools)],
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        )

    def _trace(self, dialogue: Dialogue, form: Form, generation_prompt: bool) -> Tracked:
        """The same text, with the code of each character; raises `_RefusedError` for what the template refuses."""
        from fastcache.llm.template_code import TemplateLimitError, TemplateTimeError

        messages = [self._with_aliases(message) for message in form.messages]
        variables = {
            **self._tokenizer.special_tokens_map,
            "tools": dialogue.tools,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        turns_of_sources = [source.turn for source in dialogue.sources]
        template = self._compiled(dialogue.tools is not None)
        try:
            return self._environment.render(template, messages, form.turns, turns_of_sources, **variables)
        except TemplateTimeError as error:
            raise _unusable(str(error)) from error
        except (TemplateLimitError, RecursionError, ArithmeticError) as error:
            reason = "it calls itself without end" if isinstance(error, RecursionError) else str(error)
            raise self._broken(reason, dialogue) from error
        except _expected_errors() as error:
            raise _RefusedError(error) from error

    def _with_aliases(self, message: TrackedDict) -> TrackedDict:
        if "reasoning_content" not in message:
            return message
        return TrackedDict({**dict.fromkeys(self._aliases, message["reasoning_content"]), **message})

    def _broken(self, reason: str, dialogue: Dialogue) -> Exception:
        """The error of a template that was stopped: the dialogue's, if the template is fine with a short one."""
        if dialogue.sources != _shortest().sources:
            try:
                self._trace(_shortest(), _shortest().form, False)
            except _RefusedError:
                pass
            except ModelError as error:
                return error
            return TemplateRefusalError(f"it was stopped: {reason}")
        return _unusable(reason)


def _unusable(reason: str) -> ModelError:
    return ModelError(f"The model's chat template can't be used: {reason}. {_ADVICE}")


_ADVICE = (
    "Take the model from its publisher again, or use another one; plain text goes without a template (--method bt-p)."
)


class _RefusedError(Exception):
    """An error of a traced template, with what it quotes of the dialogue taken out."""

    def __init__(self, error: Exception) -> None:
        from fastcache.llm.template_env import without_data

        super().__init__(without_data(error.args[0]) if error.args else "")
        self.cause = error
        self.by_template = _is_by_template(error)


def _expected_errors() -> tuple[type[Exception], ...]:
    """What templates raise at dialogues that they don't take."""
    import jinja2

    return jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError


def _refusal(error: Exception, traced: _RefusedError | None) -> TemplateRefusalError:
    """The refusal of a template that raised `error`; the same error, traced, knows what is quoted of the dialogue."""
    by_template = _is_by_template(error)
    reason = str(traced) if traced and traced.by_template and by_template else str(error)
    reason = "".join(character if character.isprintable() else " " for character in reason)
    reason = " ".join(reason.split()) or "no reason given"
    return TemplateRefusalError(reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…", by_template)


def _is_by_template(error: Exception) -> bool:
    """Whether the template itself raised the error, by `raise_exception`."""
    import jinja2

    return type(error) is jinja2.TemplateError


def _realigned_to(actual: str, traced: Tracked) -> Tracked:
    """The actual text with the codes of a traced one that differs from it."""
    pieces, position = [], 0
    for length, code in runs_of(traced):
        if code >= 0:
            pieces.append(traced[position : position + length])
        position += length
    text = realigned(actual, pieces)
    n_located = sum(length for length, code in runs_of(text) if code >= 0)
    if n_located < sum(map(len, pieces)):
        raise InputError("The chat template changes this dialogue in a way that can't be followed.")
    return text


@lru_cache(1)
def _shortest() -> Dialogue:
    return Dialogue.of([{"role": "user", "content": "a"}])


def probe(*roles: str) -> Dialogue:
    """A dialogue of these roles, which says nothing but letters."""
    messages: list[dict[str, Any]] = [{"role": role, "content": f"probe{turn}"} for turn, role in enumerate(roles)]
    for turn, role in enumerate(roles[1:], 1):
        if role == "tool":
            call = {"id": "probe0001", "type": "function", "function": {"name": "probe", "arguments": {}}}
            messages[turn - 1]["tool_calls"] = [call]
            messages[turn]["tool_call_id"] = "probe0001"
    return Dialogue.of(messages)
