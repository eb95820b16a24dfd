"""How numbers are written for people: on the screen, in reports, in messages.

A figure has three or four significant digits, because none of ours is known better; a number that doesn't exist is a dash.
Files for programs (CSV, JSON) keep every digit and don't use this module.
"""

from collections.abc import Mapping
from math import isfinite, isnan
from typing import Any

NONE = "-"
"""Stands where there is no number."""
LARGEST, SMALLEST = 9, -4
"""A figure is written with an exponent from 10^9 on, and below 10^-4."""
TALLEST = 6
"""From 10^6 on, a number has no digits after the point that mean anything."""
BYTE_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")
KILO = 1000


def figure(value: float | None, digits: int = 3) -> str:
    """A measured number with so many significant digits: 98,600, 12.3, 0.0450, 9.90e+09; a dash for None and NaN."""
    if value is None or isnan(value):
        return NONE
    if not isfinite(value):
        return "infinite" if value > 0 else "-infinite"
    text = f"{value:.{digits - 1}e}"
    exponent = int(text.partition("e")[2])
    if value == 0:
        return "0"
    if not SMALLEST <= exponent < LARGEST:
        return text
    return f"{float(text):,.{max(0, digits - 1 - exponent)}f}"


def logarithm(value: float | None) -> str:
    """A logarithm: its digits after the point are what a ratio is known to, so at most three: -0.231, -10.12."""
    if value is None or not isfinite(value):
        return NONE if value is None or isnan(value) else figure(value)
    places = 3 if abs(value) < 9.9995 else 2
    return f"{round(value, places) or 0.0:,.{places}f}"


def fixed(value: float | None, places: int) -> str:
    """A number with so many digits after the point, for columns whose numbers are of one size; others as figures."""
    if value is None or not isfinite(value) or abs(value) >= 10**TALLEST:
        return figure(value, 4)
    return f"{value:,.{places}f}"


def count(value: int | None) -> str:
    """A whole number, all of its digits: 40,959,876."""
    return NONE if value is None else f"{value:,}"


def percent(share: float | None, digits: int = 3) -> str:
    """A share as 12.3 %; only what is nothing is 0 %, and only what is all is 100 %."""
    if share is None or isnan(share):
        return NONE
    if share < 1 and figure(100 * share, digits) == figure(100.0, digits):
        return f"> {100 - 10.0 ** (2 - digits):g} %"
    return "100 %" if share == 1 else f"{figure(100 * share, digits)} %"


def size(n_bytes: float | None, digits: int = 3) -> str:
    """Bytes as 512 bytes, 34.0 MB, 2.07 GB."""
    if n_bytes is None or isnan(n_bytes):
        return NONE
    amount, unit = float(n_bytes), 0
    while unit + 1 < len(BYTE_UNITS) and float(f"{abs(amount):.{digits - 1}e}") >= KILO:
        amount, unit = amount / KILO, unit + 1
    return f"{round(amount)} {BYTE_UNITS[unit]}" if unit == 0 else f"{figure(amount, digits)} {BYTE_UNITS[unit]}"


def rate(value: float, seconds: float, unit: str) -> str:
    """So much of a unit a second; where that is less than one, a minute or an hour. Empty where nothing is done yet."""
    if value <= 0 or seconds <= 0:
        return ""
    if unit == "bytes":
        return f"{size(value / seconds)}/s"
    length, name = next(((n, name) for n, name in ((1, "s"), (60, "min")) if n * value >= seconds), (3600, "h"))
    return f"{figure(length * value / seconds)} {unit}/{name}"


def duration(seconds: float) -> str:
    """2 h 05 min, 3 min 20 s, 8 s, 0.3 s."""
    if seconds < 1:
        return f"{figure(seconds, 1)} s" if seconds >= 0.001 else "0 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def setting(value: Any) -> str:
    """The value of a setting in words: yes and no, numbers without the digits that arithmetic left, lists with commas."""
    if value is None or isinstance(value, bool):
        return {None: NONE, True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return count(int(value)) if value.is_integer() and abs(value) < 10**LARGEST else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {setting(inner)}" for name, inner in value.items()) or "none"
    return str(value)
