"""Asking an OpenAI-compatible endpoint: several requests at a time, failures tried again, and never more than was allowed."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from fastcache.errors import BudgetError, EndpointError, FastcacheError, InputError
from fastcache.extras import require_packages
from fastcache.figures import figure
from fastcache.files import parse_json
from fastcache.progress import Progress, Task
from fastcache.stages.interpret.config import JudgeConfig
from fastcache.stages.interpret.judge.event_loop import run_coroutine
from fastcache.stages.interpret.judge.keys import Key, check_address
from fastcache.stages.interpret.judge.log import AnswerLog
from fastcache.stages.interpret.judge.prompts import Prompt
from fastcache.stages.interpret.judge.requests import Costs, request_body
from fastcache.stages.interpret.judge.responses import text_of

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before a request is sent again, doubled each time."""
GIVES_UP_AFTER = 3
"""Prompts, one after the other, that failed in all their requests."""
FOR_NOW = frozenset({408, 409, 425, 429})
"""Besides those from 500 on, status codes of requests that may succeed later."""
OF_THE_PROMPT = frozenset({400, 413, 422})
"""Of requests that won't, such as for a prompt that is too long; all others, such as for a wrong key, hold for every prompt."""
SHOWN = 300
"""Characters of a response, in an error."""


class _FailedError(Exception):
    """A request that brought no answer: why, what came instead, whether to try again, and how long the server asked to wait."""

    def __init__(
        self, reason: str, body: str = "", *, again: bool = True, wait: float = 0.0, may_cost: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.body, self.again, self.wait, self.may_cost = reason, body, again, wait, may_cost


def check_endpoint(config: JudgeConfig) -> None:
    """Raise `InputError` for an address or a key that can't be used."""
    require_packages("A judge", "judge", "httpx2")
    if not config.judge_url:
        raise InputError("A judge needs --judge-url; --judge none writes the prompts to a file instead.")
    Key(config)
    check_address(config)
    import httpx2

    try:
        httpx2.URL(config.judge_url)
    except httpx2.InvalidURL as error:
        raise InputError(f"--judge-url is no address ({error}).") from error


class Endpoint:
    """Puts prompts to a judge and its answers into the log."""

    def __init__(self, config: JudgeConfig, log: AnswerLog) -> None:
        """For settings that `check_endpoint` has let pass."""
        self._config, self._log, self._costs = config, log, Costs(config)
        self._key = Key(config)
        self._stop: FastcacheError | None = None
        self._stopped = asyncio.Event()
        self._failed_in_a_row = self._n_failed = 0

    def ask(self, prompts: Sequence[Prompt], progress: Progress) -> int:
        """Ask them all, and return how many failed in all their requests.

        Raises `EndpointError` where the endpoint refuses or keeps failing, `BudgetError` at a limit of the user's. Requests
        that are under way then are still waited for.
        """
        with progress.task("judge", len(prompts), "prompts") as task:
            run_coroutine(self._ask(iter(prompts), task))
        if self._stop:
            raise self._stop
        return self._n_failed

    async def _ask(self, prompts: Iterator[Prompt], task: Task) -> None:
        import httpx2

        client = httpx2.AsyncClient(
            headers=self._key.headers,
            timeout=httpx2.Timeout(self._config.timeout, pool=None),
            limits=httpx2.Limits(max_connections=self._config.concurrency),
            trust_env=str(self._config.judge_url).startswith("https"),  # a proxy would see the key of plain http
        )

        async def work() -> None:
            for prompt in prompts:  # shared: each takes the next
                if not self._stop:
                    await self._until_answered(client, prompt)
                if self._stop:
                    return
                task.advance(1, f"cost {figure(self._log.cost)}" if self._costs.are_known else "")

        async with client:
            await asyncio.gather(*(work() for _ in range(self._config.concurrency)))

    async def _until_answered(self, client: Any, prompt: Prompt) -> None:
        for attempt in range(self._config.retries + 1):
            if self._stop:
                return
            try:
                await self._request(client, prompt)
                self._failed_in_a_row = 0
                return
            except _FailedError as failure:
                if not failure.again or attempt == self._config.retries:
                    self._give_up(prompt, failure)
                    return
                wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), max(wait, failure.wait))
            except FastcacheError as error:
                self._end(error)

    def _end(self, error: FastcacheError) -> None:
        self._stop = self._stop or error
        self._stopped.set()

    def _give_up(self, prompt: Prompt, failure: _FailedError) -> None:
        self._n_failed += 1
        if failure.again or not self._log.answers:  # one that is refused for itself says nothing of the endpoint
            self._failed_in_a_row += 1
        if self._failed_in_a_row >= GIVES_UP_AFTER:
            error = EndpointError(
                f"The judge at {self._config.judge_url} failed for {self._failed_in_a_row} prompts in a row, the last "
                f"{prompt.name}: {failure.reason}. All answers so far are kept: run the command again to go on."
            )
            self._end(error)

    async def _request(self, client: Any, prompt: Prompt) -> None:
        """One request; raises `_FailedError`, and `EndpointError` and `BudgetError` for what won't pass."""
        reserved = self._reserve(prompt)
        number = self._log.sent(prompt, reserved)
        try:
            text = await self._send(client, prompt)
        except _FailedError as failure:
            self._log.failed(number, prompt, reserved if failure.may_cost else 0.0, failure.reason, failure.body)
            raise
        except EndpointError as error:
            self._log.failed(number, prompt, 0.0, str(error))
            raise
        try:
            body = parse_json(text, "The response")
            answer = text_of(body)
        except ValueError as error:
            self._log.failed(number, prompt, reserved, str(error), text)
            raise _FailedError(str(error)) from error
        self._log.answered(number, prompt, self._costs.of_response(prompt, body), answer, body)

    def _reserve(self, prompt: Prompt) -> float:
        config, reserved = self._config, self._costs.at_most(prompt)
        if config.max_requests is not None and self._log.n_requests >= config.max_requests:
            raise BudgetError(f"{self._log.n_requests:,} requests were sent, as many as --max-requests allows.")
        if config.max_cost is not None and self._log.cost + reserved > config.max_cost:
            raise BudgetError(
                f"{self._log.cost:.4g} was spent, and the next request might cost {reserved:.4g}: more than --max-cost allows."
            )
        return reserved

    async def _send(self, client: Any, prompt: Prompt) -> str:
        """The response's text; the key is in none of what this gives or raises."""
        import httpx2

        address = f"{str(self._config.judge_url).rstrip('/')}/chat/completions"
        try:
            response = await client.post(address, json=request_body(self._config, prompt))
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _FailedError(f"no connection ({self._key.hidden(str(error))})") from error
        except httpx2.TimeoutException as error:
            raise _FailedError(f"no answer in {self._config.timeout:g} s", may_cost=True) from error
        except httpx2.RequestError as error:
            reason = self._key.hidden(str(error)) or type(error).__name__
            raise _FailedError(f"the connection broke ({reason})", may_cost=True) from error
        text, status = self._key.hidden(response.text), response.status_code
        if status == httpx2.codes.OK:
            return text
        if status >= httpx2.codes.INTERNAL_SERVER_ERROR or status in FOR_NOW:
            # A gateway's 502 or 504 says nothing of the model behind it, which may have answered.
            worked = status >= httpx2.codes.INTERNAL_SERVER_ERROR and status != httpx2.codes.SERVICE_UNAVAILABLE
            wait = _seconds(response.headers.get("retry-after"))
            raise _FailedError(f"status {status}", text, wait=wait, may_cost=worked)
        if status in OF_THE_PROMPT:
            raise _FailedError(f"status {status}, {text[:SHOWN]}", text, again=False)
        raise EndpointError(
            f"The judge at {self._config.judge_url} refused the request of {prompt.name}: status {status}, {text[:SHOWN]}. All "
            "answers so far are kept."
        )


def _seconds(header: str | None) -> float:
    """What a retry-after header asks for in seconds; dates are rare, and the usual wait does for them."""
    try:
        return min(max(float(header or 0), 0.0), 10 * LONGEST_WAIT)
    except ValueError:
        return 0.0
