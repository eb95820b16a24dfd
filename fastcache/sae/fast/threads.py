"""Loops compiled by numba, run on as many threads as torch uses.

The threads are Python's: numba's own would be a second OpenMP beside torch's, and one of its layers may not be entered
twice. What a loop computes never depends on how it was cut up, so the number of threads changes no bit of it.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar, cast

import torch

numba: Any
try:
    import numba
except ImportError:  # everything here also runs in torch alone
    numba = None

F = TypeVar("F", bound=Callable[..., object])

PIECES_PER_THREAD = 4
"""More than one: a core that something else needs gets fewer."""

compiles: bool = numba is not None and not numba.config.DISABLE_JIT
"""Whether loops can be compiled here."""


def compiled(function: F) -> F:
    """`function`, compiled; the compiled code is kept where numba finds a folder that it may write to.

    Sums may be reordered, which is what lets them use vector instructions; NaN, infinity and -0.0 stay what they are.
    """
    if numba is None:
        return function
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}
    try:
        fast = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no such folder: compile it in every process
        fast = numba.njit(**options)(function)
    return cast(F, fast)


@cache
def _pool(_process: int, n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, "fastcache-loops")


def spread(loop: Callable[..., None], n: int, *arguments: Any) -> None:
    """Call `loop(first, last, *arguments)` for pieces of range(n), side by side."""
    n_threads = torch.get_num_threads()
    n_pieces = min(n, PIECES_PER_THREAD * n_threads)
    if n_threads == 1 or n_pieces < 2:
        loop(0, n, *arguments)
        return
    bounds = [n * i // n_pieces for i in range(n_pieces + 1)]
    pool = _pool(os.getpid(), n_threads)
    waiting = [pool.submit(loop, *bounds[i : i + 2], *arguments) for i in range(n_pieces)]
    for future in waiting:
        future.result()
