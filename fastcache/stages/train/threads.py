"""The number of threads of a run. Sums are cut up by it, so the last bits of an SAE depend on it.

A run writes it down before its first step and obeys it whenever it is resumed, on however many cores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastcache.errors import FormatError
from fastcache.files import read_json, require_fields, write_json_atomic
from fastcache.progress import Progress

THREADS_FILE = "threads.json"
MOST_THREADS = 1024


@contextmanager
def kept_threads(out: Path, progress: Progress) -> Iterator[None]:
    """Within the block, torch computes with as many threads as the run in `out` began with; `out` must be held.

    Raises `FormatError` if the file that says how many is damaged.
    """
    path, now = out / THREADS_FILE, torch.get_num_threads()
    if not path.exists():
        write_json_atomic(path, {"threads": now})
    n_threads = _read(path)
    if n_threads != now:
        progress.say(
            f"{out} was begun with {n_threads} threads, not {now}, and goes on with as many for the same bits."
        )
    torch.set_num_threads(n_threads)  # where it is the same too: this also forbids MKL to take fewer
    try:
        yield
    finally:
        torch.set_num_threads(now)


def _read(path: Path) -> int:
    values = read_json(path)
    require_fields(values, {"threads": int}, path)
    n_threads: int = values["threads"]
    if not 1 <= n_threads <= MOST_THREADS:
        raise FormatError(
            f"{path}: expected 1 to {MOST_THREADS} threads, found {n_threads}. Start over with --fresh, or restore the file."
        )
    return n_threads
