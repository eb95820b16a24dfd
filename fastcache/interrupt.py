"""Ctrl-C at a moment of our choosing: long loops finish their step, save, and only then stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether the user has asked to stop."""

    requested = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Hold back the first Ctrl-C and note it; a second one interrupts at once.

    Where a script has it ignored, as shells do for what they start in the background, it stays ignored.
    """
    interrupt = Interrupt()
    previous = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()  # only there can handlers be set
    if not in_main_thread or previous is signal.SIG_IGN:
        yield interrupt
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        interrupt.requested = True
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
