"""What all commands share: no option is dropped without a word, and a misspelt command gets a suggestion."""

from collections import Counter
from typing import Any

import click

from fastcache.config import nearest
from fastcache.errors import quoted
from fastcache.pipeline.spelling import spelling_errors


class Command(click.Command):
    """A command that refuses an option with one value where it is given twice: click would keep the last."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse `args`, after a look at how often each option is there."""
        _refuse_repeats(self.make_parser(ctx).parse_args(args=list(args))[2], ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; its errors name options as it spells them."""
        with spelling_errors(ctx):
            return super().invoke(ctx)


class Group(click.Group):
    """A command with commands below it; options stand behind the command that they are of."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse `args`; raises `click.UsageError` for options that the command below would never see."""
        _, rest, order = self.make_parser(ctx).parse_args(args=list(args))
        _refuse_repeats(order, ctx)
        options = [param for param in order if isinstance(param, click.Option) and not param.is_eager]
        if rest and options and rest[0] in self.commands:
            name, path = options[0].opts[0], ctx.command_path
            raise click.UsageError(
                f"{name} is given to `{path}`, not to `{path} {rest[0]}`. Put the options behind {quoted(rest[0])}.",
                ctx,
            )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it, or the command below it; its errors name options as it spells them."""
        with spelling_errors(ctx):
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first of `args` names; an unknown name gets the nearest known one as a hint."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            hint = nearest(name, known) or f" Commands are {', '.join(known)}."
            raise click.UsageError(f"There is no command {quoted(name)}.{hint}", ctx)
        return super().resolve_command(ctx, args)


def _refuse_repeats(order: list[click.Parameter], ctx: click.Context) -> None:
    """Raise `click.UsageError` for an option that is in the parsed `order` twice and takes one value."""
    for option, times in Counter(param for param in order if isinstance(param, click.Option)).items():
        if times > 1 and not (option.multiple or option.count or option.is_eager):
            raise click.UsageError(
                f"{option.opts[0]} is given {times} times, but it takes one value. Leave out the others.", ctx
            )
