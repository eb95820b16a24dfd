"""Judging: latents are drawn, a judge is asked about each, and what it said is read into a table of scores."""

from collections.abc import Sequence
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
from fastcache.stages.interpret.judge.log import LOG_FILE, AnswerLog
from fastcache.stages.interpret.judge.prompts import (
    SHOWN,
    WORDING,
    Prompt,
    choose,
    detection_prompt,
    score_prompt,
)
from fastcache.stages.interpret.judge.requests import BYTES_OF_TOKEN, Costs, request_body
from fastcache.stages.interpret.judge.responses import read_answers
from fastcache.stages.interpret.judge.tables import SCORE_FILES, Judged, write_scores
from fastcache.stages.interpret.results import Results

PROMPTS_FILE = "prompts.jsonl"
OWNED = (LOG_FILE, PROMPTS_FILE, *SCORE_FILES)
USUAL_NAME = "words for the months of a year"


def judge(config: JudgeConfig, out: Path, progress: Progress, fresh: bool = False) -> dict[str, Any]:
    """Score latents and write `scores.parquet`, `scores.csv` and `summary.json` into `out`; returns the summary.

    Raises `InputError` where a judge can't be asked, `EndpointError` where it refuses or keeps failing, `BudgetError` at a
    limit of the user's. What was answered until then is kept and in the tables.
    """
    _check(config)
    results = Results(Path(config.latents))
    if not results.about.get("readable"):
        raise InputError(
            f"{results.folder} shows tokens by their numbers, which no judge can read. Run `fastcache interpret` again with "
            "--fresh, and with --model where the tokenizer isn't found."
        )
    qualifying = results.active_in_dialogues(SHOWN)
    if not qualifying:
        raise InputError(
            f"No latent of {results.folder} is active in {SHOWN} different dialogues: there is nothing to judge."
        )
    chosen = choose(qualifying, config.count, config.seed)
    answers = _given_answers(config, chosen)
    settings = {**as_dict(config), "results_fingerprint": results.fingerprint, "wording": WORDING}
    with output_directory(out, "interpret judge", settings, OWNED, free=JUDGE_FREE_ON_RESUME, fresh=fresh):
        log = AnswerLog(out)
        _import(log, answers, progress)
        questions = Questions(results, config, chosen, log)
        try:
            if config.judge == "api":
                _ask_all(config, questions, log, progress)
        finally:
            judged = Judged(results.about, config, len(qualifying), questions.all(), questions.n_too_few(), log)
            summary = write_scores(out, judged)
        if config.judge == "none":
            lines = [_batch_line(config, prompt) for prompt in questions.all() if prompt.name not in log.answers]
            write_bytes_atomic(out / PROMPTS_FILE, "".join(lines).encode())
    return summary


def _check(config: JudgeConfig) -> None:
    if not config.judge_model:
        raise InputError("--judge-model is needed: the judge's name, which stands in every request.")
    if config.judge == "api":
        check_endpoint(config)
        if config.answers:
            raise InputError("--answers goes with --judge none.")
    Costs(config)


def _given_answers(config: JudgeConfig, chosen: Sequence[int]) -> dict[str, dict[str, str]]:
    known = {f"{kind}-{latent}" for kind in ("score", "detection") for latent in chosen}
    return {path: read_answers(Path(path), known) for path in config.answers}


def _import(log: AnswerLog, answers: dict[str, dict[str, str]], progress: Progress) -> None:
    for path, found in answers.items():
        new = {name: text for name, text in found.items() if name not in log.answers}
        for name, text in new.items():
            log.imported(name, text, path)
        progress.say(f"{path}: {len(new):,} new answers")


class Questions:
    """Prompts for scores, and those for detection, which need the names that the scores came with."""

    def __init__(self, results: Results, config: JudgeConfig, chosen: Sequence[int], log: AnswerLog) -> None:
        """For the `chosen` latents."""
        self._config, self._log = config, log
        # What was answered in an earlier run stays in the tables.
        self._detects = config.detection or any(name.startswith("detection-") for name in log.answers)
        self._contexts = results.contexts_of(chosen)
        self._windows = results.windows() if self._detects else []
        self._silent = results.latents(["silent_windows"])["silent_windows"] if self._detects else []
        self.scores = [score_prompt(latent, self._contexts[latent]) for latent in chosen]

    def detection(self) -> list[Prompt]:
        """Of the latents that have a name by now, and contexts enough."""
        return [prompt for latent, name in self._named() if (prompt := self._detection(latent, name))]

    def n_too_few(self) -> int:
        """Latents that have a name, but not contexts enough."""
        return len(self._named()) - len(self.detection())

    def all(self) -> list[Prompt]:
        """As far as they can be known."""
        return [*self.scores, *self.detection()]

    def ahead(self) -> list[Prompt]:
        """All that is still to be asked, with a name of usual length where there is none yet."""
        found = list(self.scores)
        for latent in self._contexts if self._config.detection else ():
            name = self._name(latent) if f"score-{latent}" in self._log.answers else USUAL_NAME
            if name and (prompt := self._detection(latent, name)):
                found.append(prompt)
        return [prompt for prompt in found if prompt.name not in self._log.answers]

    def _detection(self, latent: int, name: str) -> Prompt | None:
        silent = [self._windows[number] for number in self._silent[latent].as_py()]
        return detection_prompt(latent, name, self._contexts[latent], silent, self._config.seed)

    def _named(self) -> list[tuple[int, str]]:
        return [(latent, name) for latent in self._contexts if self._detects and (name := self._name(latent))]

    def _name(self, latent: int) -> str | None:
        try:
            return parse_score(self._log.answers.get(f"score-{latent}", "")).name
        except UnparsedError:
            return None


def _ask_all(config: JudgeConfig, questions: Questions, log: AnswerLog, progress: Progress) -> None:
    if ahead := questions.ahead():
        progress.say(_estimate(config, ahead))
    _ask(config, log, questions.scores, progress)
    if config.detection:
        _ask(config, log, questions.detection(), progress)


def _ask(config: JudgeConfig, log: AnswerLog, prompts: list[Prompt], progress: Progress) -> None:
    todo = [prompt for prompt in prompts if prompt.name not in log.answers]
    if not todo:
        return
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
    tokens = int(sum(prompt.n_bytes for prompt in prompts) / BYTES_OF_TOKEN)
    at_most = len(prompts) * costs.answer_tokens
    text = f"{len(prompts):,} prompts, about {tokens:,} tokens; answers of at most {at_most:,} tokens"
    if not costs.are_known:
        return text + " (--price-in and --price-out give the cost)"
    return text + f". Cost: about {costs.of(tokens, at_most):.4g} at most, without requests that fail"


def _batch_line(config: JudgeConfig, prompt: Prompt) -> str:
    """A request of OpenAI's batch files, which `vllm run-batch` takes too."""
    request = {"custom_id": prompt.name, "method": "POST", "url": "/v1/chat/completions"}
    return canonical_json({**request, "body": request_body(config, prompt)}) + "\n"
