"""Packages of the optional extras: told to be missing before the work that needs them, not in its middle."""

from importlib.util import find_spec

from fastcache.errors import InputError


def require_packages(what: str, extra: str, *names: str) -> None:
    """Raise `InputError` where one of `names`, which `what` needs and the extra `extra` brings, is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(f"{what} needs {' and '.join(missing)}: pip install 'fastcache-sae[{extra}]'.")
