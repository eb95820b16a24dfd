"""Jinja's sandbox for chat templates: it follows each text of a dialogue to the output, and it bounds time and size.

The sandbox of transformers decides what a template writes. This one runs the same template beforehand, on `Tracked`
texts, and learns where each character comes from: which message's text it is or, for text of the template's own, at
which message of its loop the template was when it wrote it. Templates are untrusted programs, so whatever grows or
repeats is counted; a template that exceeds a limit is stopped with `TemplateLimitError`.
"""

import functools
import re
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from fastcache.llm.provenance import (
    Tracked,
    TrackedDict,
    TrackedList,
    code_of,
    joined,
    leaves,
    owner_code,
    plain,
    realigned,
    recoded,
    runs_of,
    to_json,
)
from fastcache.llm.template_code import (
    Generation,
    Generator,
    TemplateDict,
    TemplateLimitError,
    TemplateNamespace,
    TemplateTimeError,
    raise_exception,
    refuse_chance,
)

MAX_STEPS = 2_000_000
"""Loop iterations, calls and outputs of a rendering; long lists count by their length."""
STEPS_OF_MESSAGES = 50
"""More steps for each pair of messages: some templates look at all other messages at each one."""
MAX_CHARACTERS = 1_000_000
CHARACTERS_OF_INPUT = 16
"""A text may have `MAX_CHARACTERS`, and so many more for each character of the dialogue."""
MAX_CPU_SECONDS = 60.0
"""For what the counts miss: a rendering takes milliseconds. It is time of the processor, so that a stopped or busy machine
doesn't count, and it ends the command: which dialogues a template is given up for must not depend on a clock."""
MAX_NUMBER_BITS = 4096
MAX_INDENT = 16
"""Blanks of a level of JSON."""
ITEMS_OF_STEP = 16
"""Items of a list that count as a step."""
STEPS_BETWEEN_LOOKS = 1024
"""Steps from one look at the clock to the next."""

_PADDING = {"ljust", "rjust", "center", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice"}
"""Methods and filters that make as much as a number says."""
_OF_JINJA = ("_loop_vars", "_block_vars")
"""What Jinja adds to the arguments of every call."""
_WIDTH = re.compile(r"[%:{][^%{}]*?(\d{4,})")


class TrackingEnvironment(ImmutableSandboxedEnvironment):
    """Renders one dialogue at a time; not for several threads."""

    code_generator_class = Generator
    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self) -> None:
        extensions = [Generation, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        self.globals |= {"raise_exception": raise_exception, "dict": TemplateDict(), "namespace": TemplateNamespace}
        self.globals["lipsum"] = self.filters["random"] = refuse_chance
        self.filters |= {"tojson": _tojson, "safe": _safe, "join": _join, "string": self.as_text}
        self.filters = {name: self._guarded(name, function) for name, function in self.filters.items()}
        self._turns: dict[int, int] = {}
        self._turns_of_sources: Sequence[int | None] = ()
        self._begin(0, 0)

    def _begin(self, n_messages: int, n_characters: int) -> None:
        self._owners: list[int | None] = [None]
        self._counters: list[int | None] = [None]
        self._steps_left = MAX_STEPS + STEPS_OF_MESSAGES * n_messages**2
        self._next_look = self._steps_left - STEPS_BETWEEN_LOOKS
        self._deadline = time.thread_time() + MAX_CPU_SECONDS
        self._max_characters = MAX_CHARACTERS + CHARACTERS_OF_INPUT * n_characters
        self.printed_data = False

    def check_constants(self, source: str) -> None:
        """Compute what a compiler computes of a template; raises `TemplateLimitError` where that exceeds a limit.

        The sandbox of transformers computes constants while it compiles, even in branches that are never taken.
        """
        self._begin(0, 0)
        for node in self.parse(source).find_all((nodes.BinExpr, nodes.Concat, nodes.Filter)):
            try:
                self._constant(node)
            except TemplateLimitError:
                raise
            except Exception:  # noqa: S112 - nothing that a compiler could compute either
                continue

    def _constant(self, node: nodes.Node) -> Any:
        if isinstance(node, nodes.BinExpr) and node.operator in self.binop_table:
            return self.call_binop(None, node.operator, self._constant(node.left), self._constant(node.right))
        if isinstance(node, nodes.Concat):
            return self.concatenated(self._constant(part) for part in node.nodes)
        if isinstance(node, nodes.Filter) and node.node is not None:
            if hasattr(self.filters[node.name], "jinja_pass_arg"):
                raise nodes.Impossible
            keywords = {str(pair.key): self._constant(pair.value) for pair in node.kwargs}
            return self.filters[node.name](*map(self._constant, (node.node, *node.args)), **keywords)
        if not isinstance(node, nodes.Expr):
            raise nodes.Impossible
        return node.as_const()

    def render(
        self,
        template: jinja2.Template,
        messages: list[TrackedDict],
        turns: Sequence[int],
        turns_of_sources: Sequence[int | None],
        **variables: Any,
    ) -> Tracked:
        """What `template`, compiled by this environment, writes.

        `turns` are the numbers of `messages`, and `turns_of_sources` those of the codes from 0 on (None: of no message).

        Afterwards `printed_data` says whether it wrote an object or array as Python writes it. Raises the errors of
        Jinja and of Python that a template can cause, and `TemplateLimitError`.
        """
        self._turns = {id(message): turn for message, turn in zip(messages, turns, strict=True)}
        self._turns_of_sources = turns_of_sources
        self._begin(len(messages), sum(map(len, leaves(messages))) + sum(map(len, leaves(variables.get("tools")))))
        text = template.render(messages=messages, **variables)
        return text if isinstance(text, Tracked) else Tracked(text)

    # --- Limits

    def _count(self, steps: int = 1) -> None:
        self._steps_left -= steps
        if self._steps_left < self._next_look:
            self._next_look = self._steps_left - STEPS_BETWEEN_LOOKS
            if self._steps_left < 0:
                raise TemplateLimitError("it takes too many steps")
            if time.thread_time() > self._deadline:
                raise TemplateTimeError(f"it takes more than {MAX_CPU_SECONDS:g} s for one dialogue")

    def _check_size(self, size: int) -> None:
        if size > self._max_characters:
            raise TemplateLimitError(f"it makes a text or list of more than {self._max_characters:,} items")

    def _count_items(self, values: Iterable[Any]) -> None:
        self._count(1 + sum(len(value) for value in values if isinstance(value, Sized)) // ITEMS_OF_STEP)

    # --- Where the template is

    def begin_loop(self) -> None:
        """A loop begins; until it knows better, the template stays at the message where it is."""
        self._owners.append(self._owners[-1])
        self._counters.append(None)

    def enter(self, target: Any) -> None:
        """An iteration begins, at `target`."""
        self._count()
        if isinstance(target, tuple):
            target = next((item for item in target if id(item) in self._turns), None)
        if id(target) in self._turns:
            self._owners[-1] = self._turns[id(target)]
        elif isinstance(target, int):
            self._counters[-1] = target
            self._owners[-1] = self._owners[-2]

    def end_loop(self) -> None:
        """A loop has ended or was left."""
        self._owners.pop()
        self._counters.pop()

    def getitem(self, obj: Any, argument: Any) -> Any:
        """A loop over numbers is at the message that it takes with its number."""
        item = super().getitem(obj, argument)
        if self._counters[-1] is not None and argument == self._counters[-1] and id(item) in self._turns:
            self._owners[-1] = self._turns[id(item)]
        return item

    # --- Texts

    def _code(self) -> int:
        return owner_code(self._owners[-1])

    def as_text(self, value: Any) -> str:
        """`str(value)`."""
        if isinstance(value, str):
            return value
        self.printed_data |= isinstance(value, TrackedDict | TrackedList)
        text = str(value)
        code = code_of(value)
        return Tracked(text, ((len(text), code),)) if text and code >= 0 else text

    def written(self, value: Any) -> Tracked:
        """What an output of `value` writes, owned by the message where the template is.

        Outside all loops, it is owned by the message whose text it holds.
        """
        self._count()
        text = self.as_text(value)
        code = self._code()
        if self._owners[-1] is None and isinstance(text, Tracked):
            turns = {self._turns_of_sources[source] for _, source in runs_of(text) if source >= 0}
            if len(turns) == 1:
                code = owner_code(turns.pop())
        return recoded(text, code)

    def concat(self, parts: Iterable[str]) -> Tracked:
        """What a template, a macro or a block wrote."""
        collected: list[str] = []
        size = 0
        for part in parts:
            collected.append(part)
            size += len(part)
            self._check_size(size)
        return joined(collected)

    def concatenated(self, parts: Iterable[Any]) -> str:
        """`a ~ b`."""
        self._count()
        texts = [self.as_text(part) for part in parts]
        self._check_size(sum(map(len, texts)))
        if not any(isinstance(text, Tracked) for text in texts):
            return "".join(texts)
        return joined(texts, code=self._code())

    def call_binop(self, context: Context | None, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `%` and `**`, within limits."""
        self._count()
        if operator == "+":
            if isinstance(left, Tracked) or isinstance(right, Tracked):
                if type(left) in (str, Tracked) and type(right) in (str, Tracked):
                    self._check_size(len(left) + len(right))
                    return joined((left, right), code=self._code())
            elif isinstance(left, Sized) and isinstance(right, Sized):
                self._check_size(len(left) + len(right))
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, Sized) and isinstance(count, int):
                    self._check_size(len(sequence) * count)
            self._check_number(left, 1)
            self._check_number(right, 1)
        elif operator == "**":
            self._check_number(left, right)
        elif isinstance(left, str):
            self._check_widths(left, right)
            return self._aligned(left % right, (left, right))
        return self.binop_table[operator](left, right)

    def _check_number(self, base: Any, exponent: Any) -> None:
        if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_NUMBER_BITS:
            raise TemplateLimitError("it computes with a number of thousands of digits")

    def _check_widths(self, pattern: str, values: Any) -> None:
        """Formats may ask for a width, in the pattern or, with `*`, in the values."""
        widths = [int(width) for width in _WIDTH.findall(pattern)]
        numbers = values if isinstance(values, tuple | list) else (values,)
        if "*" in pattern or "{" in pattern:
            widths += [number for number in numbers if isinstance(number, int)]
        self._check_size(max(widths, default=0))

    def _check_padding(self, values: Sequence[Any]) -> None:
        """A width may be that of each line or tab."""
        n_times = sum(value.count("\n") + value.count("\t") for value in values[:1] if isinstance(value, str))
        self._check_size((1 + n_times) * max((value for value in values[1:] if isinstance(value, int)), default=0))

    def _aligned(self, result: Any, sources: Any) -> Any:
        """The result of an operation that knows nothing of codes, with the codes of its sources."""
        if isinstance(result, str) and not isinstance(result, Tracked) and result:
            self._check_size(len(result))
            if texts := leaves(sources):
                return realigned(result, texts)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call of the template; methods of texts keep codes, and are checked beforehand for what they would make."""
        receiver = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if not isinstance(receiver, str):
            __self._count_items(args)
            result = super().call(__context, __obj, *args, **kwargs)
            if isinstance(result, range):
                __self._count(len(result) // ITEMS_OF_STEP)
            return result
        values = [receiver, *args, *(value for name, value in kwargs.items() if name not in _OF_JINJA)]
        __self._count_items(values)
        name = __obj.__name__
        if name in _PADDING:
            __self._check_padding(values)
        elif name in ("format", "format_map"):
            __self._check_widths(receiver, values[1:])
        elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
            __self._check_size(len(receiver) + receiver.count(args[0]) * len(args[1]))
        elif name == "translate" and args and isinstance(args[0], dict):
            __self._check_size(len(receiver) * max((len(v) for v in args[0].values() if isinstance(v, str)), default=1))
        elif name == "join" and args:
            parts = list(args[0])
            __self._check_size(sum(map(len, parts)) + len(receiver) * len(parts))
            if isinstance(receiver, Tracked) or any(isinstance(part, Tracked) for part in parts):
                return joined(parts, receiver, __self._code())
            return receiver.join(parts)
        return __self._aligned(super().call(__context, __obj, *args, **kwargs), values)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter within limits, whose result has the codes of its arguments."""

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            values = [*args, *kwargs.values()]
            self._count_items(value for value in values if not isinstance(value, Context | jinja2.Environment))
            if name in _PADDING:
                self._check_padding(values)
            elif name == "tojson":
                self._check_size(MAX_CHARACTERS // MAX_INDENT * int(kwargs.get("indent") or 0))
            elif name == "format" and isinstance(values[0], str):
                self._check_widths(values[0], values[1:])
            return self._aligned(function(*args, **kwargs), values)

        return guarded


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> Tracked:
    return to_json(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _safe(value: Any) -> str:
    """Nothing is escaped in chat templates."""
    return value if isinstance(value, Tracked) else Markup(value)  # noqa: S704 - as the filter of Jinja that it stands for


@jinja2.pass_environment
def _join(environment: TrackingEnvironment, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        get = jinja2.filters.make_attrgetter(environment, attribute)
        value = map(get, value)
    parts = [environment.as_text(part) for part in value]
    environment._check_size(sum(map(len, parts)) + len(d) * len(parts))
    return joined(parts, environment.as_text(d), environment._code())


def without_data(message: Any) -> str:
    """A template's own message, with an ellipsis in place of what it quotes of the dialogue."""
    if not isinstance(message, Tracked):
        return str(message)
    parts, position = [], 0
    for length, code in runs_of(message):
        parts.append("…" if code >= 0 else plain(message[position : position + length]))
        position += length
    return "".join(parts)
