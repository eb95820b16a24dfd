"""Memory that this process has, and that it can still have."""

import os
import re
import resource
from contextlib import suppress
from pathlib import Path

LACK_OF_MEMORY = (
    "can't allocate memory",
    "annot allocate memory",
    "failed to map segment",  # of a library that is imported
    "can't start new thread",
    "std::bad_alloc",
    "error return without exception set",  # of an extension, when Python couldn't make the exception
)
"""What torch, the dynamic linker and others say when memory is refused."""


def process_bytes() -> int:
    """Resident memory of this process; 0 where the system doesn't tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return 0


def free_memory() -> int | None:
    """Memory that can still be had here, by the machine, the control group and `ulimit -v`; None if unknown."""
    free = []
    with suppress(OSError, AttributeError):
        found = re.search(r"MemAvailable: +([0-9]+) kB", Path("/proc/meminfo").read_text())
        free += [int(found[1]) * 1024] if found else []
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = re.search(r"^inactive_file ([0-9]+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        free.append(limit - used + (int(cached[1]) if cached else 0))
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:  # `ulimit -v`
        with suppress(OSError, ValueError, IndexError):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
            free.append(max(0, limit - used))
    return min(free, default=None)


def is_lack_of_memory(error: Exception) -> bool:
    """Whether memory, or a thread, was refused; torch says so by errors of kinds that have other meanings too."""
    is_known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_known or any(words in str(error) for words in LACK_OF_MEMORY)
