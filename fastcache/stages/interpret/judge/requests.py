"""What is sent to a judge, and what it costs."""

import json
from typing import Any

from fastcache.errors import FormatError, InputError
from fastcache.files import parse_json
from fastcache.stages.interpret.config import JudgeConfig
from fastcache.stages.interpret.judge.prompts import Prompt
from fastcache.stages.interpret.judge.responses import usage_of

TEMPLATE_BYTES = 1024
"""For the tokens that a chat template adds to a prompt."""
BYTES_OF_TOKEN = 2.5
"""About: prompts are short JSON strings, a line each."""
LIMITS = ("max_tokens", "max_completion_tokens")
FIXED = ("model", "messages", "stream")


def request_body(config: JudgeConfig, prompt: Prompt) -> dict[str, Any]:
    """What is sent for a prompt; raises `InputError` for a --judge-body that can't be used."""
    body: dict[str, Any] = {
        "model": config.judge_model,
        "messages": prompt.messages,
        "temperature": 0,
        "max_tokens": config.max_answer_tokens,
    }
    body |= _changes(config.judge_body) if config.judge_body else {}
    return {name: value for name, value in body.items() if value is not None}


def _changes(text: str) -> dict[str, Any]:
    try:
        changes = parse_json(text, "--judge-body")
    except FormatError as error:
        raise InputError(str(error)) from error
    if not isinstance(changes, dict):
        raise InputError(f"--judge-body should be a JSON object, found {type(changes).__name__}.")
    for name in FIXED:
        if name in changes:
            raise InputError(f"--judge-body can't change {name}.")
    for name in (*LIMITS, "n"):
        value = changes.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError(f"--judge-body: {name} should be a whole number from 1 on, or null; found {value!r}.")
    return changes


class Costs:
    """What requests cost, in the currency of the prices."""

    def __init__(self, config: JudgeConfig) -> None:
        """Raises `InputError` for a limit that can't be kept."""
        self._prices = (config.price_in or 0.0) / 1e6, (config.price_out or 0.0) / 1e6
        self.are_known = None not in (config.price_in, config.price_out)
        if config.max_cost is not None and not self.are_known:
            raise InputError("--max-cost needs --price-in and --price-out, the prices of a million tokens.")
        body = request_body(config, Prompt(0, "", "", ""))
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                "--judge-model or --judge-body holds half of a surrogate pair, which is no text."
            ) from error
        limits = [body[name] for name in LIMITS if name in body]
        if config.max_cost is not None and not limits:
            raise InputError(f"--max-cost needs a limit on answers: leave {' or '.join(LIMITS)} in the body.")
        self.answer_tokens = max(limits, default=config.max_answer_tokens) * body.get("n", 1)

    def at_most(self, prompt: Prompt) -> float:
        """A request's cost is never higher: a token has a byte at least."""
        return self.of(prompt.n_bytes + TEMPLATE_BYTES, self.answer_tokens)

    def of(self, prompt_tokens: float, answer_tokens: float) -> float:
        """The cost of so many tokens."""
        return prompt_tokens * self._prices[0] + answer_tokens * self._prices[1]

    def of_response(self, prompt: Prompt, body: Any) -> float:
        """By the response's own count of tokens; the most it may have cost where it has none."""
        usage = usage_of(body)
        return self.of(usage["prompt_tokens"], usage["completion_tokens"]) if usage else self.at_most(prompt)
