"""Many SAEs from one reading of the cache.

Members that train on the same rows in the same order share a stream: each batch is read, mixed and brought to the device
once, and every member takes it. What doesn't fit into the memory together takes turns. Each member has an output of its
own, the same that `train` would give it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache.cache_format.reader import open_cache
from fastcache.config import as_dict
from fastcache.errors import InputError, NonFiniteError, SpaceError
from fastcache.figures import size
from fastcache.files import read_json, write_json_atomic
from fastcache.memory import free_memory
from fastcache.progress import Progress
from fastcache.rundir import output_directory
from fastcache.sae.info import INFO_FILE
from fastcache.stages.train.config import FREE_ON_RESUME
from fastcache.stages.train.member import Member
from fastcache.stages.train.plan import buffer_bytes, member_bytes
from fastcache.stages.train.run import begin, say_selection, train_together
from fastcache.stages.train.sweep_config import SweepConfig
from fastcache.stages.train.task import FAILED_FILE, Task, prepare_task
from fastcache.stages.train.threads import THREADS_FILE, kept_threads

SWEEP_FILE = "sweep.json"
SHARE_OF_FREE = 0.8
"""Of the free memory, what a sweep takes where it isn't told."""

Tasks = dict[str, Task]


@dataclass
class Plan:
    """Which members are trained together, in turn."""

    tasks: Tasks
    passes: list[list[str]]

    @property
    def memory(self) -> int:
        """Bytes that the largest pass takes."""
        return max(_bytes([self.tasks[name] for name in names]) for names in self.passes)

    def lines(self) -> list[str]:
        """The plan in words."""
        lines = [
            f"Sweep: {len(self.tasks)} SAEs in {len(self.passes)} passes over the cache, at most {size(self.memory)}"
        ]
        for names in self.passes:
            task = self.tasks[names[0]]
            steps = max(self.tasks[name].recipe.steps for name in names)
            rows = f"{task.hook}, {task.selection.n_kept:,} rows, batches of {task.recipe.batch_size:,}"
            lines.append(f"  {rows}: {len(names)} SAEs, {steps:,} steps")
        return lines


def plan_sweep(config: SweepConfig) -> Plan:
    """Check all members and put those together that share a stream and fit.

    Raises `InputError` for settings that can't serve, `SpaceError` for a member that doesn't fit alone.
    """
    tasks = _prepare(config)
    limit = config.memory or (free_memory() or float("inf")) * SHARE_OF_FREE
    streams: dict[Any, list[str]] = {}
    for name, task in tasks.items():
        streams.setdefault(_stream_key(task), []).append(name)
    passes = [names for together in streams.values() for names in _fitting(together, tasks, limit)]
    return Plan(tasks, passes)


def _prepare(config: SweepConfig) -> Tasks:
    """The tasks; the cache is opened once, and each selection of its rows made once."""
    cache = open_cache(next(iter(config.members.values())).cache)
    tasks: Tasks = {}
    selections: dict[Any, Any] = {}
    for name, member in config.members.items():
        key = (member.layer, member.tokens_of, member.skip_first_position, member.norm_filter)
        try:
            tasks[name] = prepare_task(member, cache, selections.get(key))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        selections[key] = tasks[name].selection
    return tasks


def _stream_key(task: Task) -> Any:
    config = task.config
    rows = (task.hook, config.tokens_of, config.skip_first_position, config.norm_filter)
    return (*rows, config.stream_seed, config.buffer_tokens, task.recipe.batch_size)


def _bytes(tasks: Sequence[Task]) -> int:
    return buffer_bytes(tasks[0]) + sum(member_bytes(task.recipe) for task in tasks)


def _fitting(names: list[str], tasks: Tasks, limit: float) -> Iterator[list[str]]:
    """Cut members that share a stream into passes that fit into `limit` bytes."""
    together: list[str] = []
    for name in names:
        if _bytes([tasks[name]]) > limit:
            raise SpaceError(
                f"{name} needs about {size(_bytes([tasks[name]]))}, which is more than the {size(limit)} that "
                "the sweep may take. Raise --memory, or lower buffer_tokens or expansion."
            )
        if together and _bytes([tasks[each] for each in (*together, name)]) > limit:
            yield together
            together = []
        together.append(name)
    yield together


def sweep(config: SweepConfig, out: Path, progress: Progress, fresh: bool = False) -> dict[str, Any]:
    """Train all members, each into a folder of its name in `out`, or go on; returns what stands in sweep.json.

    A member that fails stops alone; the reason is kept in its folder. Raises what `plan_sweep` raises.
    """
    settings = {"members": {name: as_dict(member) for name, member in config.members.items()}}
    owned = (SWEEP_FILE, THREADS_FILE, *config.members)
    plan = plan_sweep(config)  # what is wrong is told before anything is written
    free = [f"members.{name}.{setting}" for name in config.members for setting in FREE_ON_RESUME]
    with output_directory(out, "sweep", settings, owned, free=free, fresh=fresh), kept_threads(out, progress):
        path = out / SWEEP_FILE
        if path.exists():  # those who were trained together go on together, whatever is free now
            plan = Plan(plan.tasks, read_json(path)["passes"])
        _write(path, plan, out)
        for line in plan.lines():
            progress.say(line)
        for number, names in enumerate(plan.passes, 1):
            _train_pass({name: plan.tasks[name] for name in names}, out, progress, f"{number}/{len(plan.passes)}")
            _write(path, plan, out)
        return read_json(path)


def _write(path: Path, plan: Plan, out: Path) -> None:
    states = {name: _state(out / name) for name in plan.tasks}
    write_json_atomic(path, {"passes": plan.passes, "members": states})


def _state(folder: Path) -> dict[str, Any]:
    if (folder / INFO_FILE).exists():
        return {"state": "trained"}
    if (folder / FAILED_FILE).exists():
        return {"state": "failed", **read_json(folder / FAILED_FILE)}
    return {"state": "waiting"}


def _train_pass(tasks: Tasks, out: Path, progress: Progress, number: str) -> None:
    """Train the members that aren't done yet on one stream."""
    with ExitStack() as stack:
        for name, task in tasks.items():
            stack.enter_context(task.output(out / name, progress))
        todo = [name for name in tasks if _state(out / name)["state"] == "waiting"]
        if not todo:
            return
        first = tasks[todo[0]]
        say_selection(first.selection, progress)
        buffer = first.buffer()
        members = [Member(tasks[name], out / name, buffer) for name in todo]
        begin(members, progress)

        def failed(member: Member, error: NonFiniteError) -> None:
            member.failed(error)
            progress.say(f"{member.out.name} failed; the others go on. {error}")

        steps, batch = max(member.trainer.n_steps for member in members), first.recipe.batch_size
        with progress.task(f"pass {number}", steps * batch, "tokens", members[0].trainer.step_number * batch) as shown:
            train_together(members, shown, failed)
        for member in members:
            if _state(member.out)["state"] == "trained":
                progress.say(f"{member.out.name}: {member.note()}")
