"""Judging: latents are drawn, a judge is asked about each, and what it said is read into a table of scores."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastcache.config import as_dict
from fastcache.errors import BudgetError, InputError
from fastcache.files import canonical_json, write_bytes_atomic
from fastcache.progress import Progress
from fastcache.rundir import output_directory
from fastcache.stages.interpret.config import JUDGE_FREE_ON_RESUME, JudgeConfig
from fastcache.stages.interpret.judge.answers import UnparsedError, parse_score
from fastcache.stages.interpret.judge.endpoint import Endpoint, check_endpoint
from fastcache.stages.interpret.judge.log import LOG_FILE, AnswerLog, read_answers
from fastcache.stages.interpret.judge.prompts import SHOWN, Prompt, choose, detection_prompt, score_prompt
from fastcache.stages.interpret.judge.requests import Costs, request_body
from fastcache.stages.interpret.judge.tables import SCORE_FILES, Judged, write_scores
from fastcache.stages.interpret.results import Results

PROMPTS_FILE = "prompts.jsonl"
OWNED = (LOG_FILE, PROMPTS_FILE, *SCORE_FILES)
BYTES_OF_TOKEN = 4
"""About, for the estimate of tokens."""


def judge(config: JudgeConfig, out: Path, progress: Progress, fresh: bool = False) -> dict[str, Any]:
    """Score latents and write `scores.parquet`, `scores.csv` and `summary.json` into `out`; returns the summary.

    Raises `InputError` where a judge can't be asked, `EndpointError` where it refuses or keeps failing, `BudgetError` at a
    limit of the user's. What was answered until then is kept and in the tables.
    """
    _check(config)
    results = Results(Path(config.latents))
    qualifying = results.active_in_dialogues(SHOWN)
    if not qualifying:
        raise InputError(
            f"No latent of {results.folder} is active in {SHOWN} different dialogues: there is nothing to judge."
        )
    chosen = choose(qualifying, config.count, config.seed)
    answers = _given_answers(config, chosen)
    settings = {**as_dict(config), "results_fingerprint": results.fingerprint}
    with output_directory(out, "interpret judge", settings, OWNED, free=JUDGE_FREE_ON_RESUME, fresh=fresh):
        log = AnswerLog(out)
        _import(log, answers, progress)
        rounds = Rounds(results, config, chosen, log)
        try:
            for prompts in rounds:
                if config.judge == "api":
                    _ask(config, log, prompts, progress)
        finally:
            judged = Judged(results.about, config, len(qualifying), rounds.prompts, log)
            summary = write_scores(out, judged)
        if config.judge == "none":
            lines = [_batch_line(config, prompt) for prompt in rounds.prompts if prompt.name not in log.answers]
            write_bytes_atomic(out / PROMPTS_FILE, "".join(lines).encode())
    return summary


def _check(config: JudgeConfig) -> None:
    if config.judge == "api":
        check_endpoint(config)
        if config.answers:
            raise InputError("--answers goes with --judge none.")
    Costs(config)


def _given_answers(config: JudgeConfig, chosen: Sequence[int]) -> dict[str, list[tuple[str, str]]]:
    known = {f"{kind}-{latent}" for kind in ("score", "detection") for latent in chosen}
    return {path: read_answers(Path(path), known) for path in config.answers}


def _import(log: AnswerLog, answers: dict[str, list[tuple[str, str]]], progress: Progress) -> None:
    for path, found in answers.items():
        new = {name: text for name, text in reversed(found) if name not in log.answers}  # of two, the first
        for name, text in new.items():
            log.imported(name, text, path)
        progress.say(f"{path}: {len(new):,} new answers")


class Rounds:
    """Prompts for scores, then those for detection, which need the names that the scores came with."""

    def __init__(self, results: Results, config: JudgeConfig, chosen: Sequence[int], log: AnswerLog) -> None:
        """For the `chosen` latents."""
        self._results, self._config, self._log = results, config, log
        self._contexts = results.contexts_of(chosen)
        self.prompts = [score_prompt(latent, self._contexts[latent]) for latent in chosen]

    def __iter__(self) -> Iterator[list[Prompt]]:
        """Each round's, made when the one before was answered."""
        yield list(self.prompts)
        if self._config.detection:
            found = self._detection()
            self.prompts += found
            yield found

    def _detection(self) -> list[Prompt]:
        windows = self._results.windows()
        silent = self._results.latents(["silent_windows"])["silent_windows"]
        found = []
        for latent in list(self._contexts):
            if name := self._name(latent):
                others = [windows[number] for number in silent[latent].as_py()]
                found.append(detection_prompt(latent, name, self._contexts[latent], others, self._config.seed))
        return [prompt for prompt in found if prompt]

    def _name(self, latent: int) -> str | None:
        try:
            return parse_score(self._log.answers.get(f"score-{latent}", "")).name
        except UnparsedError:
            return None


def _ask(config: JudgeConfig, log: AnswerLog, prompts: list[Prompt], progress: Progress) -> None:
    todo = [prompt for prompt in prompts if prompt.name not in log.answers]
    if not todo:
        return
    progress.say(_estimate(config, todo))
    try:
        failed = Endpoint(config, log).ask(todo, progress)
    except BudgetError as error:
        left = sum(prompt.name not in log.answers for prompt in todo)
        raise BudgetError(f"{error} {left:,} prompts are left; the command with a higher limit goes on.") from error
    if failed:
        progress.say(f"{failed:,} prompts failed in all their requests; the same command asks them again.")


def _estimate(config: JudgeConfig, prompts: Sequence[Prompt]) -> str:
    """What is about to be asked, and its cost where the prices are known."""
    costs = Costs(config)
    tokens = sum(prompt.n_bytes for prompt in prompts) // BYTES_OF_TOKEN
    at_most = len(prompts) * costs.answer_tokens
    text = f"{len(prompts):,} prompts, about {tokens:,} tokens; answers of at most {at_most:,} tokens"
    if not costs.are_known:
        return text + " (--price-in and --price-out give the cost)"
    return text + f". Cost: at most about {costs.of(tokens, at_most):.4g}, without failed requests"


def _batch_line(config: JudgeConfig, prompt: Prompt) -> str:
    """A request of OpenAI's batch files, which `vllm run-batch` takes too."""
    request = {"custom_id": prompt.name, "method": "POST", "url": "/v1/chat/completions"}
    return canonical_json({**request, "body": request_body(config, prompt)}) + "\n"
