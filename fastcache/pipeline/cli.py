"""The `fastcache` command: finds the commands, and turns errors into one paragraph and an exit code."""

import errno
import importlib
import shlex
import shutil
import sys
import textwrap
from typing import Any, NoReturn

import click

from fastcache import __version__
from fastcache.errors import FastcacheError, first_line, printable, quoted, shortened
from fastcache.memory import is_lack_of_memory
from fastcache.pipeline.command import Group
from fastcache.pipeline.output import standard_streams

COMMANDS = {
    "demo": "The whole pipeline on a small embedded model, in minutes.",
    "prepare": "Make a deduplicated, shuffled, split corpus out of data sets.",
    "extract": "Run the model once over a corpus; cache its residual activations.",
    "plan": "Say what studies cost: disk, arithmetic, hours.",
    "train": "Train a sparse autoencoder from a cache.",
    "sweep": "Train many in one pass over a cache, or run a study with its caches.",
    "evaluate": "Measure SAEs on a held-out cache, by kind of token.",
    "interpret": "Say what each latent is active on, in one pass over a held-out cache.",
    "dashboard": "Browse latents: contexts, densities, scores, in one page.",
    "steer": "Generate with latents turned up, clamped or ablated; find latents to steer with.",
    "export": "Write an SAE as SAELens loads it.",
    "report": "One HTML page with the tables and plots of runs, finished or in training.",
    "verify": "Check every byte, index and count of a cache.",
    "repair": "Compute the damaged parts of a cache again.",
    "inspect": "Show what is in a corpus, a cache or a trained SAE.",
}
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
LONGEST_MESSAGE = 2000

HELP = """Cache an LLM's residual activations over chat dialogues once; train many SAEs from the cache.

\b
Examples:
  fastcache demo
  fastcache extract --model Qwen/Qwen2.5-7B-Instruct --layer 18
  fastcache train --cache DIR --arch jumprelu
"""


class LazyGroup(Group):
    """Lists the commands without importing them: `fastcache --help` stays quick."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Names in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        """Import the module of the command `name`."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"fastcache.pipeline.commands.{name}").command
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in `--help`."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup, help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="fastcache")
def cli() -> None:
    """The root of all commands."""


def fail(message: str) -> NoReturn:
    """Print one paragraph, without its middle where it is very long, and leave."""
    width = min(100, shutil.get_terminal_size().columns)
    text = printable(shortened(message, LONGEST_MESSAGE))
    paragraph = textwrap.fill(f"Error: {text}", width=width, break_long_words=False, break_on_hyphens=False)
    click.echo(paragraph, err=True)
    sys.exit(EXIT_USER_ERROR)


@standard_streams()
def main(arguments: list[str] | None = None, **_extra: Any) -> None:
    """Run the command line: exit code 2 for what a user can mend, 130 for Ctrl-C; bugs are raised."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        _require_text(given)
        if code := cli.main(given, prog_name="fastcache", standalone_mode=False):
            sys.exit(code)  # of a command that ends with `Context.exit`
    except (click.Abort, KeyboardInterrupt):
        resume = shlex.join(["fastcache", *(argument for argument in given if argument != "--fresh")])
        click.echo(f"\nInterrupted. What is finished is kept; to resume, run:\n  {resume}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx:
            click.echo(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} --help' for help.\n", err=True)
        fail(error.format_message())
    except FastcacheError as error:
        fail(str(error))
    except OSError as error:
        fail(_of_the_system(error))
    except (MemoryError, RuntimeError, ImportError, SystemError) as error:
        if not is_lack_of_memory(error):
            raise
        fail(
            f"There is not enough memory for this ({first_line(error)}). What was committed before is kept. Lower what needs "
            "memory, as far as the command has it (--buffer-tokens, --batch-size, --expansion, --pack-tokens, --workers), or "
            "raise the limit (`ulimit -v`, or that of the job), and run the command again."
        )


def _require_text(arguments: list[str]) -> None:
    """Raise `click.UsageError` for an argument that no file name or UTF-8 file can hold."""
    for argument in arguments:
        if "\0" in argument or any("\ud800" <= character <= "\udfff" for character in argument):
            raise click.UsageError(f"The argument {quoted(argument)} is not UTF-8 text without NUL characters.")


ADVICE = {
    errno.EMFILE: " Raise the limit of open files (`ulimit -n`).",
    errno.ENFILE: " Close other programs, or raise the limit of open files.",
    errno.ENOMEM: " Free some memory, or raise the limit.",
    errno.ENOSPC: " Free some space, or use another disk.",
    errno.EDQUOT: " Free some of your quota, or use another disk.",
    errno.EROFS: " Choose an output on a file system that can be written.",
    errno.EACCES: " Choose a path that you have permission for.",
    errno.EPERM: " Choose a path that you have permission for.",
    errno.ENAMETOOLONG: " Choose a shorter path.",
}


def _of_the_system(error: OSError) -> str:
    """An error of files or the network, in one paragraph."""
    place = f" ({shortened(str(error.filename))})" if error.filename else ""
    advice = ADVICE.get(error.errno or 0, "")
    return (
        f"{error.strerror or first_line(error)}{place}.{advice} What was committed before is kept; mend it and run the same "
        "command to resume."
    )
