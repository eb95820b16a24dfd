"""Ctrl-C: held back while a step is done, and left ignored where a script ignores it."""

import os
import signal

import pytest
from processes import hearing_ctrl_c, ignoring_ctrl_c

from fastcache.interrupt import deferred_interrupt


def test_the_first_one_is_noted_and_the_second_one_interrupts():
    with hearing_ctrl_c(), deferred_interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_the_background_of_a_script_it_stays_ignored():
    with ignoring_ctrl_c():
        with deferred_interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        assert not interrupt.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
