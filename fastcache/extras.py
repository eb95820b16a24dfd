"""Packages of the optional extras: told to be missing before the work that needs them, not in its middle."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastcache.errors import InputError


def require_packages(what: str, extra: str, *names: str) -> None:
    """Raise `InputError` where one of `names`, which `what` needs and the extra `extra` brings, is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(f"{what} needs {' and '.join(missing)}: pip install 'fastcache-sae[{extra}]'.")


@cache
def page_template(path: Path) -> Any:
    """The template of a page, compiled once in a process: that takes longer than to fill it in."""
    import jinja2

    loader = jinja2.FileSystemLoader(path.parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(path.name)
