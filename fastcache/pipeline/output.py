"""Standard output as other Unix tools treat it: when the reader of a pipe goes away, the command ends.

`fastcache verify C | head -1` ends with 141, what a shell reports of a process that SIGPIPE killed, and prints nothing more.
The signal itself would be wrong here: it would also kill a command whose worker or network connection went away. Instead the
command is interrupted as by Ctrl-C, so that training writes a checkpoint and nothing that is finished is lost.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

EXIT_UNWRITABLE = 2
EXIT_CLOSED = 128 + signal.SIGPIPE
"""Exit code of a command whose standard output was closed."""


class Output:
    """A text stream that interrupts the command when it can't be written; everything else is the stream's own."""

    def __init__(self, stream: TextIO, messages: "Output | None" = None) -> None:
        """`messages`: where errors are printed; None for that stream itself, whose failure doesn't end the command."""
        self._stream, self._messages = stream, messages
        self.ends_command = messages is not None
        with suppress(
            AttributeError, ValueError, OSError
        ):  # a character that the terminal can't show is no reason to fail
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
        self.error: OSError | None = None
        """Why nothing can be written any more."""

    def write(self, text: str) -> int:
        """Write text, or nothing after an error."""
        if self.error is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._stop(error)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._stop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _stop(self, error: OSError) -> None:
        self.error = error
        with suppress(OSError, ValueError):  # what the stream still holds goes nowhere, also when Python ends
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self._messages and self.ends_command:
            self._messages.error = error  # "Interrupted" and the like would be wrong
            interrupt()


def interrupt() -> None:
    """What Ctrl-C does, also where it is ignored, as in the background of a script."""
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.SIG_DFL, None):
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Give the command a standard output whose failure ends it; raises `SystemExit` with the exit code for that.

    Streams that were closed before the command began (`>&-`) become /dev/null: otherwise the next file that is opened would
    take their numbers, and messages would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    before = sys.stdout, sys.stderr
    errors = Output(before[1] or open(2, "w", closefd=False))  # noqa: SIM115
    output = Output(before[0] or open(1, "w", closefd=False), errors)  # noqa: SIM115
    sys.stdout, sys.stderr = output, errors
    try:
        yield
    finally:
        output.ends_command = False  # it ends anyway
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
        if output.error is not None:
            if output.error.errno in (errno.EPIPE, errno.ECONNRESET):
                raise SystemExit(EXIT_CLOSED)
            reason = f"Error: standard output can't be written: {output.error.strerror}."
            with suppress(OSError):
                print(reason, "What is finished is kept; the same command resumes.", file=before[1], flush=True)
            raise SystemExit(EXIT_UNWRITABLE)
