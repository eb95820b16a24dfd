"""How chat templates are compiled, and what they are given beside the dialogue, as transformers has it."""

from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame


class TemplateLimitError(Exception):
    """A template that goes on too long, or writes too much; no error of Jinja's, so that no template handles it."""


class TemplateTimeError(TemplateLimitError):
    """A template that takes too much of the processor's time."""


class Generator(CodeGenerator):
    """Compiles outputs, `~` and loops to calls of the environment."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        raise nodes.Impossible  # a constant's owner is known when it is written

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("environment.written(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        loaded = _loaded(node.target)
        enter = nodes.Call(nodes.EnvironmentAttribute("enter"), [loaded], [], None, None)
        node.body.insert(0, nodes.ExprStmt(enter))
        self.writeline("environment.begin_loop()")
        super().visit_For(node, frame)
        self.writeline("environment.end_loop()")

    def visit_Call(self, node: nodes.Call, frame: Frame, **options: Any) -> None:  # type: ignore[override]
        if isinstance(node.node, nodes.EnvironmentAttribute) and node.node.name == "enter":
            self.write("environment.enter(")
            self.visit(node.args[0], frame)
            self.write(")")
        else:
            super().visit_Call(node, frame, **options)


def _loaded(target: nodes.Node) -> nodes.Expr:
    """A loop's target as an expression."""
    if isinstance(target, nodes.Name):
        return nodes.Name(target.name, "load")
    if isinstance(target, nodes.Tuple):
        return nodes.Tuple([_loaded(item) for item in target.items], "load")
    return nodes.Const(None)


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which transformers uses to mark what the assistant says; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class TemplateNamespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` works
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template stores {name!r} in a namespace")


class TemplateDict:
    """`dict`, of which transformers gives templates this much."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def refuse_chance(*_args: Any, **_kwargs: Any) -> None:
    """Replaces the functions that make random texts."""
    raise TemplateLimitError("it writes something else each time")


def raise_exception(message: Any) -> None:
    """A template's own refusal."""
    raise jinja2.TemplateError(message)
