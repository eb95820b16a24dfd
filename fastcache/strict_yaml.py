"""YAML as settings need it: mappings, lists, text and finite numbers, each key once, of bounded depth and size.

PyYAML by itself lets the last of two equal keys win, recurses as deep as the text does, expands aliases without limit and
builds dates, sets and bytes. Here the first three are refused with the line that they are on, and a date is text.
"""

import math
import re
from typing import Any

import yaml

from fastcache.errors import InputError, first_line, quoted

MAX_DEPTH = 64
MAX_VALUES = 1_000_000
"""Values of a document, those that an alias repeats counted every time."""

LONGEST_INTEGER = 1000
"""Digits; Python itself converts at most 4,300."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without dates, octal numbers and numbers to the base of 60: those stay text.

    `from_mapping` then reads them as it reads the command line, where 010 is ten and 1:30 is no number.
    """


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] not in ("timestamp", "int", "float", "value")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document: None, bool, int, float, str, lists and dicts with text as keys.

    Raises `InputError`, which begins with `where`, for what is no YAML or not of this kind.
    """
    try:
        _check_events(text, where)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _check_tree(root, where)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is not valid YAML{_reason(error)}.") from error


def _reason(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f" (line {mark.line + 1})" if mark else ""
    return f"{line}: {problem or first_line(error)}"


def _line(part: Any) -> int:
    """The line, from 1, that a node or an event begins on."""
    return int(part.start_mark.line) + 1


def _check_events(text: str, where: str) -> None:
    """Refuse tags, and depth before anything recurses."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
            if depth > MAX_DEPTH:
                raise InputError(
                    f"{where}: line {_line(event)} is nested deeper than {MAX_DEPTH} levels: no setting is."
                )
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        if tag := getattr(event, "tag", None):
            raise InputError(
                f"{where}: line {_line(event)} has the tag {quoted(tag)}. Settings have no tags: "
                "write the value without it, and text between quotes."
            )


def _check_tree(root: yaml.Node, where: str) -> None:
    """Refuse equal keys, keys that aren't text, numbers that aren't finite, and aliases that repeat too much or themselves."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise InputError(f"{where}: line {_line(node)} holds an alias of itself.")
        if known:
            return known
        sizes[id(node)] = None
        total = 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, where)
            total += sum(size(value) for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(map(size, node.value))
        else:
            _check_scalar(node, where)
        if total > MAX_VALUES:
            raise InputError(
                f"{where}: line {_line(node)} stands for more than {MAX_VALUES:,} values, most by its aliases."
            )
        sizes[id(node)] = total
        return total

    size(root)


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = _line(key)
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            shown = quoted(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise InputError(f"{where}: line {line} has {shown} as a key. Keys are names of settings, which are text.")
        if key.value in seen:
            raise InputError(
                f"{where}: the key {quoted(key.value)} stands twice in one mapping, on lines {seen[key.value]} and {line}. "
                "Leave one of them out."
            )
        seen[key.value] = line


def _check_scalar(node: yaml.Node, where: str) -> None:
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "int" and len(text) > LONGEST_INTEGER:
        raise InputError(f"{where}: line {_line(node)} has a number of {len(text):,} digits, {quoted(text)}.")
    if kind == "float" and ("n" in text.lower() or math.isinf(float(text.replace("_", "")))):  # .inf, .nan, 1.0e400
        raise InputError(f"{where}: line {_line(node)} has {quoted(text)}. Numbers must be finite.")
