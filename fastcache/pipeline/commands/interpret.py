"""`fastcache interpret`, `fastcache interpret judge` and `fastcache interpret scores`."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from fastcache.pipeline.command import Group
from fastcache.pipeline.console import RichProgress, make_console
from fastcache.pipeline.names import RUNS, output_name
from fastcache.pipeline.options import output_options, resolve, settings_options
from fastcache.pipeline.show_latents import show_latents, show_scores
from fastcache.stages.interpret.config import InterpretConfig, JudgeConfig, ScoresConfig

HELP = """Say what every latent of an SAE is active on, in one pass over a held-out cache.

Writes contexts.parquet (the highest activations of each latent, each of another dialogue, and one drawn from about each
quantile of its activations) and latents.parquet (how often and how strongly it is active, by kind of token and turn;
similar latents). Then `fastcache dashboard` shows them, and `interpret judge` has a language model score them.

\b
Examples:
  fastcache extract --model demo --layer 2 --split interpret
  fastcache interpret --sae DIR --cache fastcache-runs/cache-demo-fast-interpret-layer-2
  fastcache interpret --sae DIR --cache DIR --unembedding
  fastcache interpret judge --latents DIR --judge-url http://localhost:8000/v1 --judge-model NAME
  fastcache interpret scores --judged DIR --judged DIR
"""

JUDGE_HELP = """Have a language model score how clear latents are, from 1 to 5, and name them: the paper's protocol.

Draws --count of the latents that are active in 5 dialogues, shows the judge the 5 highest contexts of each, and writes
scores.parquet, scores.csv and summary.json, by default to judge/ below the latents. The endpoint's key is taken from the
environment. Every raw answer is kept in answers.jsonl; started again, nothing is asked twice.

\b
Examples:
  vllm serve MODEL    # in another terminal
  fastcache interpret judge --latents DIR --judge-url http://localhost:8000/v1 --judge-model MODEL
  fastcache interpret judge --latents DIR --judge-url https://api.openai.com/v1 --judge-model gpt-4o-2024-11-20 \\
      --price-in 2.5 --price-out 10 --max-cost 2 --detection
  fastcache interpret judge --latents DIR --judge none --judge-model MODEL
  fastcache interpret judge --latents DIR --judge none --judge-model MODEL --answers batch_output.jsonl
"""

SCORES_HELP = """Compare judged SAEs: the shares of the scores, and their distribution by data method, as a page and a table.

\b
Examples:
  fastcache interpret scores --judged A/judge --judged B/judge --html scores.html
"""


@click.group(cls=Group, help=HELP, invoke_without_command=True)
@output_options
@settings_options(InterpretConfig)
@click.pass_context
def command(context: click.Context, /, out: Path | None, fresh: bool, **given: Any) -> None:
    """Run the interpret stage."""
    if context.invoked_subcommand:
        return
    config = resolve(InterpretConfig, given)
    from fastcache.stages.interpret.run import interpret

    place = out or RUNS / f"latents-{output_name(str(config.sae))}"
    console = make_console()
    progress = RichProgress(console)
    interpret(config, place, progress, fresh)
    show_latents(console, place)
    progress.say(f"Latents: {place}")
    progress.say_commands("Next:", [["fastcache", "dashboard", "--latents", str(place)]])


@command.command(name="judge", help=JUDGE_HELP)
@partial(output_options, default="judge/ below the latents")
@settings_options(JudgeConfig)
def judge_command(out: Path | None, fresh: bool, **given: Any) -> None:
    """Score latents."""
    config = resolve(JudgeConfig, given)
    from fastcache.stages.interpret.judge.run import PROMPTS_FILE, judge

    console = make_console()
    progress = RichProgress(console)
    place = out or Path(config.latents) / "judge"
    summary = judge(config, place, progress, fresh)
    show_scores(console, [summary])
    unanswered = summary["failures"].get("unanswered", 0) + summary["detection"]["failures"].get("unanswered", 0)
    if config.judge == "none" and unanswered:
        progress.say(f"Prompts to answer: {place / PROMPTS_FILE} ({unanswered:,}); give the answers with --answers.")
    progress.say(f"Scores: {place}")
    judged = [] if out is None else ["--judged", str(place)]
    progress.say_commands("Next:", [["fastcache", "dashboard", "--latents", config.latents, *judged]])


@command.command(name="scores", help=SCORES_HELP)
@settings_options(ScoresConfig)
def scores_command(**given: Any) -> None:
    """Compare judged SAEs."""
    config = resolve(ScoresConfig, given)
    from fastcache.stages.interpret.judge.compare import compare

    console = make_console()
    show_scores(console, compare(config))
    RichProgress(console).say(f"Page: {config.html}\nTable: {config.csv}")
