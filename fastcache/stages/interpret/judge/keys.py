"""The endpoint's key: where it comes from, whom it is sent to, and that it is in nothing that is written or printed."""

import json
import os
import re
from typing import Any
from urllib.parse import urlsplit

from fastcache.errors import InputError
from fastcache.files import check_depth
from fastcache.stages.interpret.config import JudgeConfig

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
UNREADABLE = "[nested too deeply to be read]"
SHORTEST = 8
"""Characters of a key; less, such as the `none` that local servers are given, is no secret and may be a word of an answer."""


class Key:
    """A key, or none."""

    def __init__(self, config: JudgeConfig) -> None:
        """Raises `InputError` for a variable that can't be one, and for a key that no header can hold."""
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", config.judge_key_env):
            raise InputError("--judge-key-env is the name of a variable of the environment, such as OPENAI_API_KEY.")
        self._key = os.environ.get(config.judge_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError(f"The key in {config.judge_key_env} has characters that a key can't have. Set it again.")

    def __bool__(self) -> bool:
        return bool(self._key)

    @property
    def headers(self) -> dict[str, str]:
        """Of a request."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def hidden(self, text: str) -> str:
        """`text`, should a server send the key back, without it, however JSON may have written it there."""
        if len(self._key) < SHORTEST:
            return text
        try:
            value = json.loads(text)
        except ValueError:
            return text.replace(self._key, "[key]")
        except RecursionError:
            return UNREADABLE
        if _is_deep(value):
            return UNREADABLE
        hidden = self._hidden_in(value)
        return text if hidden == value else json.dumps(hidden)

    def _hidden_in(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._hidden_in(name): self._hidden_in(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._hidden_in(each) for each in value]
        return value.replace(self._key, "[key]") if isinstance(value, str) else value


def _is_deep(value: Any) -> bool:
    try:
        check_depth(value)
    except ValueError:
        return True
    return False


def check_address(config: JudgeConfig) -> None:
    """Raise `InputError` for an address that can't be used, that holds a secret, or that a key would go to unencrypted."""
    try:
        url = urlsplit(config.judge_url or "")
        host, _ = url.hostname, url.port
    except ValueError as error:
        raise InputError(
            f"--judge-url is no address ({error}); expected one such as http://localhost:8000/v1."
        ) from error
    if url.scheme not in ("http", "https") or not host:
        raise InputError(f"--judge-url should begin with https:// or http://, found {url.scheme or 'no'} scheme.")
    if url.username or url.password or url.query or url.fragment:
        raise InputError(
            f"--judge-url must hold neither a password nor a query; the key goes into the variable {config.judge_key_env}."
        )
    if url.scheme == "http" and host not in LOCAL and Key(config):
        raise InputError(
            f"--judge-url {url.scheme}://{host}: the key in {config.judge_key_env} would be sent unencrypted. Use https, or "
            "name an unset variable by --judge-key-env where the endpoint needs no key."
        )
