"""Pools of worker processes that end with the process that made them, however it ends."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread


def end_with_parent() -> None:
    """End this process with its parent: a SIGKILL of that one gives its workers no word, so watch for its end."""
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        Thread(target=watch, daemon=True).start()


def process_pool(n_workers: int) -> ProcessPoolExecutor:
    """A pool of fresh processes, which start with the first work."""
    return ProcessPoolExecutor(n_workers, mp_context=get_context("spawn"), initializer=end_with_parent)
