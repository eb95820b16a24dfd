"""Which CPU this is, as far as the operating system says."""

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Cpu(NamedTuple):
    """A kind of CPU; empty where nothing is known."""

    vendor: str = ""
    """Such as AuthenticAMD."""
    family: int = 0
    model: str = ""
    """The name that it is sold under."""
    features: frozenset[str] = frozenset()
    """Linux's names of its extensions, such as avx512f."""


def parse_cpuinfo(text: str) -> Cpu:
    """The first CPU that Linux's /proc/cpuinfo lists."""
    first = text.partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    values = {name.strip(): value.strip() for name, _, value in pairs}
    family = values.get("cpu family", "")
    return Cpu(
        vendor=values.get("vendor_id", ""),
        family=int(family) if family.isdecimal() else 0,
        model=values.get("model name", ""),
        features=frozenset((values.get("flags") or values.get("Features") or "").split()),
    )


@cache
def this_cpu() -> Cpu:
    """The CPU of this machine."""
    with suppress(OSError):
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    return Cpu()
