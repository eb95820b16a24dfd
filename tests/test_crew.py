"""Worker processes that die, fail and hang on to their jobs."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from fastcache.crew import Advance, Crew, CrewError, Done, Failed
from fastcache.errors import InputError, NonFiniteError


def _begin(folder, number):
    """Jobs: a number is doubled; `kill n` and `fail n` do so the first n times; `raise` raises for good."""

    def work(job, report):
        report(1)
        verb, _, count = str(job).partition(" ")
        if verb in ("kill", "fail"):
            tries = folder / verb
            done = len(tries.read_text()) if tries.exists() else 0
            if done < int(count):
                tries.write_text("x" * (done + 1))
                if verb == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("no luck")
        if verb == "raise":
            raise NonFiniteError("NaN at token 3")
        return job if verb in ("kill", "fail") else 2 * int(job)

    return work


def _begin_and_die(number):
    os._exit(3)


def _begin_and_refuse(number):
    raise InputError("there is no such model")


def results(jobs, tmp_path, n_workers=2, **options):
    crew = Crew(partial(_begin, Path(tmp_path)), n_workers, **options)
    return [message for message in crew.run(enumerate(jobs)) if not isinstance(message, Advance)]


@pytest.mark.parametrize("n_workers", [1, 3])
def test_every_job_is_done_once(n_workers, tmp_path):
    assert sorted(results(range(10), tmp_path, n_workers)) == [Done(key, 2 * key) for key in range(10)]


def test_progress_is_reported(tmp_path):
    crew = Crew(partial(_begin, tmp_path), 2)
    assert sum(m.amount for m in crew.run(enumerate(range(5))) if isinstance(m, Advance)) == 5


@pytest.mark.parametrize("verb", ["kill", "fail"])
def test_a_job_that_failed_is_tried_again(verb, tmp_path):
    found = results([1, f"{verb} 2", 2, 3], tmp_path)
    assert sorted(found)[1] == Done(1, f"{verb} 2")
    assert len(found) == 4


@pytest.mark.parametrize(("verb", "reason"), [("kill", "SIGKILL"), ("fail", "no luck")])
def test_a_job_that_fails_three_times_is_given_up_and_the_rest_done(verb, reason, tmp_path):
    found = sorted(results([1, f"{verb} 9", 2, 3], tmp_path), key=lambda message: message.key)
    assert isinstance(found[1], Failed)
    assert reason in found[1].reason
    assert [message.result for message in (found[0], *found[2:])] == [2, 4, 6]
    assert (tmp_path / verb).read_text() == "xxx"


def test_an_error_that_is_meant_to_stop_stops(tmp_path):
    with pytest.raises(NonFiniteError, match="token 3"):
        results([1, "raise", 2], tmp_path, raised=(NonFiniteError,))


def test_workers_that_can_not_begin_are_told():
    with pytest.raises(CrewError, match="code 3"):
        list(Crew(_begin_and_die, 2).run(enumerate([1])))


def test_what_a_worker_refuses_to_begin_with_is_raised():
    with pytest.raises(InputError, match="no such model"):
        list(Crew(_begin_and_refuse, 2).run(enumerate([1])))
