"""A judge is asked from within a running event loop too, as a notebook has one."""

import asyncio
import threading
import time

import pytest
from judge_server import Reply, serve
from judging import good, run

from fastcache.errors import EndpointError
from fastcache.stages.interpret.judge.event_loop import run_coroutine

pytestmark = pytest.mark.usefixtures("quick_judge")


def in_a_loop(action):
    async def cell():
        return action()

    return asyncio.run(cell())


def test_a_judge_is_asked_from_a_notebook(latents, tmp_path):
    with serve(good) as server:
        summary = in_a_loop(lambda: run(latents, tmp_path / "out", server))
    assert summary["scored"] == 12


def test_errors_of_the_endpoint_arrive_in_the_notebook(latents, tmp_path):
    with serve(lambda _: Reply(b"no", 401)) as server, pytest.raises(EndpointError):
        in_a_loop(lambda: run(latents, tmp_path / "out", server))


def test_ctrl_c_ends_what_a_notebook_waits_for(monkeypatch):
    """The interrupt arrives in the thread that waits; the work, which would take an hour, is cancelled."""
    cancelled = threading.Event()

    async def work():
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupted(_self, _timeout=None):
        time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_a_loop(lambda: run_coroutine(work()))
    assert cancelled.is_set()
