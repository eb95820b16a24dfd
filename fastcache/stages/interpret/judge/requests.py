"""What is sent to a judge, and what it costs."""

from typing import Any

from fastcache.errors import FormatError, InputError
from fastcache.files import parse_json
from fastcache.stages.interpret.config import JudgeConfig
from fastcache.stages.interpret.judge.prompts import Prompt

TEMPLATE_BYTES = 1024
"""For the tokens that a chat template adds to a prompt."""


def request_body(config: JudgeConfig, prompt: Prompt) -> dict[str, Any]:
    """What is sent for a prompt; raises `InputError` for a --judge-body that is no JSON object."""
    body: dict[str, Any] = {
        "model": config.judge_model or "",
        "messages": prompt.messages,
        "temperature": 0,
        "max_tokens": config.max_answer_tokens,
    }
    if config.judge_body:
        try:
            changes = parse_json(config.judge_body, "--judge-body")
        except FormatError as error:
            raise InputError(str(error)) from error
        if not isinstance(changes, dict):
            raise InputError(f"--judge-body should be a JSON object, found {type(changes).__name__}.")
        body |= changes
    return {name: value for name, value in body.items() if value is not None}


class Costs:
    """What requests cost, in the currency of the prices."""

    def __init__(self, config: JudgeConfig) -> None:
        """Raises `InputError` for a limit that can't be kept."""
        self._prices = (config.price_in or 0.0) / 1e6, (config.price_out or 0.0) / 1e6
        self.are_known = None not in (config.price_in, config.price_out)
        if config.max_cost is not None and not self.are_known:
            raise InputError("--max-cost needs --price-in and --price-out, the prices of a million tokens.")
        body = request_body(config, Prompt(0, "", "", ""))
        limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
        if config.max_cost is not None and not limits:
            raise InputError(
                "--max-cost needs a limit on answers: leave max_tokens or max_completion_tokens in the body."
            )
        self.answer_tokens = max(limits, default=config.max_answer_tokens) * body.get("n", 1)

    def at_most(self, prompt: Prompt) -> float:
        """A request's cost is never higher: a token has a byte at least."""
        return self.of(prompt.n_bytes + TEMPLATE_BYTES, self.answer_tokens)

    def of(self, prompt_tokens: int, answer_tokens: int) -> float:
        """The cost of so many tokens."""
        return prompt_tokens * self._prices[0] + answer_tokens * self._prices[1]

    def of_usage(self, usage: Any) -> float | None:
        """By the response's own count; None where it has none."""
        match usage:
            case {"prompt_tokens": int(prompt), "completion_tokens": int(answer)} if min(prompt, answer) >= 0:
                return self.of(prompt, answer)
        return None
