"""The train stage: batches from the cache go to those in training; log, checkpoints and the SAE go into their outputs."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastcache.errors import IntegrityError, NonFiniteError
from fastcache.figures import figure, setting
from fastcache.interrupt import deferred_interrupt
from fastcache.progress import Progress
from fastcache.progress import Task as Shown
from fastcache.sae.info import INFO_FILE
from fastcache.sae.init import geometric_median
from fastcache.sae.storage import load_sae
from fastcache.stages.train.checkpoint import checkpoint_steps, load_checkpoint
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.member import Member
from fastcache.stages.train.plan import require_memory
from fastcache.stages.train.recipe import FAST_PAPER, Recipe
from fastcache.stages.train.selection import Selection
from fastcache.stages.train.task import FAILED_FILE, prepare_task, to_tensor

SHORT_RUN_STEPS = 20_000
OnFailure = Callable[[Member, NonFiniteError], None]


def train(config: TrainConfig, out: Path, progress: Progress, fresh: bool = False) -> dict[str, Any]:
    """Train one SAE into `out`, or go on training it; returns its sae.json.

    Raises `InputError` for a cache that can't serve, `MismatchError` if `out` was begun otherwise, `NonFiniteError`.
    """
    task = prepare_task(config)
    if not (out / INFO_FILE).exists():
        require_memory(task)
    with task.output(out, progress, fresh):
        if (out / INFO_FILE).exists():
            progress.say(f"{out} is trained; nothing to do (--fresh starts over).")
            return load_sae(out)[1]
        say_selection(task.selection, progress)
        _say_recipe(task.recipe, progress)
        (out / FAILED_FILE).unlink(missing_ok=True)
        member = Member(task, out, task.buffer())
        begin([member], progress)

        def failed(member: Member, error: NonFiniteError) -> None:
            member.failed(error)
            raise error

        size = task.recipe.batch_size
        done = member.trainer.step_number * size
        with progress.task(f"train {config.arch}", task.recipe.steps * size, "tokens", done) as shown:
            train_together([member], shown, failed)
        if skipped := member.run.buffer.skipped:
            progress.say(f"{len(skipped)} damaged units were left out; sae.json lists them. Run `fastcache verify`.")
        return load_sae(out)[1]


def begin(members: Sequence[Member], progress: Progress) -> None:
    """Load the newest checkpoints that all members have, or initialise them; they share one stream."""
    hooks = dict.fromkeys(member.task.hook for member in members)
    if unchecked := members[0].task.cache.manifest.unchecked(list(hooks)):
        progress.say(f"Note on the cache: {unchecked}")
    changed = _load(members)
    if changed is None:
        sample = members[0].task.sample()
        median = geometric_median(sample)
        for member in members:
            member.trainer.initialise(sample, median)
    elif changed:
        progress.say(f"Note: this resumes on another machine ({', '.join(changed)}), so last bits may differ.")
    notes = [note for member in members for note in member.begin()]
    for note in dict.fromkeys(notes):
        progress.say(note)


def _load(members: Sequence[Member]) -> list[str] | None:
    """Go back to the newest checkpoints of one and the same step; None where there are none.

    A sweep that was killed while it wrote checkpoints has members that are a checkpoint ahead of others.
    """
    common = set.intersection(*(set(checkpoint_steps(member.out)) for member in members))
    for step in sorted(common, reverse=True):
        with suppress(IntegrityError):  # damaged: the one before it will do
            changes = [load_checkpoint(member.out, step, member.run, stream=member is members[0]) for member in members]
            return changes[0]
    if common:
        raise IntegrityError(f"No checkpoint in {members[0].out} can be read. Start over with --fresh.")
    return None


def train_together(members: Sequence[Member], shown: Shown, on_failure: OnFailure) -> None:
    """Give every batch of the stream that the members share to each, until all are trained.

    A member that fails is told to `on_failure`, and unless that raises, the rest goes on.
    """
    task, buffer = members[0].task, members[0].run.buffer
    active = list(members)

    def tried(action: Callable[[Member], None]) -> None:
        for member in list(active):
            try:
                action(member)
            except NonFiniteError as error:
                on_failure(member, error)
                active.remove(member)

    step_number = members[0].trainer.step_number
    with deferred_interrupt() as interrupt:
        while active:
            numbers, rows = buffer.next_batch()
            x = to_tensor(rows, task.cache.manifest.dtype, task.device)
            tried(lambda member: member.step(x, numbers))  # noqa: B023  called at once
            active = [member for member in active if not member.is_trained]
            step_number += 1
            is_stopping = interrupt.requested  # read once: it may be requested while the figures are printed
            if is_stopping or step_number % task.config.checkpoint_every == 0:
                tried(Member.checkpoint)
            shown.advance(len(x), members[0].note() if len(members) == 1 else f"{len(members)} SAEs")
            if is_stopping:
                raise KeyboardInterrupt
        if interrupt.requested:
            raise KeyboardInterrupt


def say_selection(selection: Selection, progress: Progress) -> None:
    """Say which rows are left out."""
    if selection.dropped:
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in selection.dropped.items())
        progress.say(f"Tokens: {selection.n_kept:,} of {selection.n_rows:,} kept; left out: {dropped}")
    if selection.largest_norm is not None:
        progress.say(
            f"Norm filter: rows above {figure(selection.largest_norm)} are left out; "
            f"the median is {figure(selection.median_norm)}"
        )


def _say_recipe(recipe: Recipe, progress: Progress) -> None:
    tokens = recipe.steps * recipe.batch_size
    progress.say(
        f"Recipe {recipe.name}: {recipe.steps:,} steps of {recipe.batch_size:,} tokens ({tokens:,}), d_sae {recipe.d_sae:,}, "
        f"learning rate {setting(recipe.lr)}"
    )
    if recipe.name == "fast-paper" and recipe.steps < SHORT_RUN_STEPS and recipe.lr == FAST_PAPER["lr"]:
        progress.say(
            f"Note: {recipe.steps:,} steps at the paper's learning rate, meant for 320,000, leave an undertrained SAE. "
            "Cache more tokens, raise --lr, or leave --recipe out."
        )
