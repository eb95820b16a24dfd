"""Numbers as people read them: enough digits, none too many, and never one that says something else."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache import figures

finite = st.floats(-1e300, 1e300)


def number(text):
    return float(text.replace(",", ""))


@given(finite, st.integers(1, 6))
def test_a_figure_is_its_number_to_the_digits_it_has(value, digits):
    shown = number(figures.figure(value, digits))
    assert shown == pytest.approx(value, rel=0.5000001 * 10 ** (1 - digits), abs=5e-324)


@given(finite, st.integers(1, 6))
def test_a_figure_has_as_many_significant_digits_as_wanted(value, digits):
    mantissa = figures.figure(value, digits).partition("e")[0].replace(",", "").lstrip("-")
    whole, _, decimals = mantissa.partition(".")
    assert mantissa == "0" or len((whole + decimals).lstrip("0")) == max(digits, len(whole.lstrip("0")))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(98629.123, "98,600"), (9.9999, "10.0"), (0.04499, "0.0450"), (9.9e9, "9.90e+09"), (6e-5, "6.00e-05"), (0, "0"),
     (None, "-"), (math.nan, "-"), (math.inf, "infinite"), (-math.inf, "-infinite")],
)  # fmt: skip
def test_figures_of_every_size(value, shown):
    assert figures.figure(value) == shown


@given(st.floats(0, 1))
def test_only_nothing_is_0_percent_and_only_all_is_100(share):
    assert (figures.percent(share) == "0 %") == (share == 0)
    assert (figures.percent(share) == "100 %") == (share == 1)


@pytest.mark.parametrize(
    ("share", "shown"), [(0.123456, "12.3 %"), (0.9996, "> 99.9 %"), (None, "-"), (2e-5, "0.00200 %")]
)
def test_percentages(share, shown):
    assert figures.percent(share) == shown


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (999.6, "1.00 kB"),
        (1e6, "1.00 MB"),
        (2_070_839_736, "2.07 GB"),
        (7.18e15, "7.18 PB"),
    ],
)
def test_bytes_have_the_unit_that_suits_them(n_bytes, shown):
    assert figures.size(n_bytes) == shown


@given(st.floats(0, 9e17))
def test_sizes_below_a_thousand_petabytes_have_no_thousands(n_bytes):
    assert re.fullmatch(r"[0-9.]+ [kMGTP]?(B|bytes)", figures.size(n_bytes))


@pytest.mark.parametrize(
    ("value", "seconds", "unit", "shown"),
    [(2_070_839_736, 1, "bytes", "2.07 GB/s"), (159_864, 19, "tokens", "8,410 tokens/s"), (0, 5, "tokens", ""),
     (5, 0, "tokens", ""), (2, 60, "dialogues", "2.00 dialogues/min")],
)  # fmt: skip
def test_rates_are_never_zero(value, seconds, unit, shown):
    assert figures.rate(value, seconds, unit) == shown


@given(st.integers(1, 10**12), st.floats(1e-3, 1e7))
def test_no_rate_says_that_nothing_happens(value, seconds):
    assert number(re.match(r"[0-9.,]+(e[+-][0-9]+)?", figures.rate(value, seconds, "rows"))[0]) > 0


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.0001, "0.000"), (-10.1234, "-10.12"), (9.9996, "10.00"), (0.1046, "0.105"), (None, "-")]
)
def test_logarithms_have_at_most_three_digits_after_the_point(value, shown):
    assert figures.logarithm(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12.649110640673518, "12.65"), (True, "yes"), (None, "-"), ([], "none"), ([1, 2], "1, 2"), (40.0, "40"), ("unit", "unit"),
     (1048576, "1,048,576"), (5e-05, "5e-05"), ({"a": None}, "a -")],
)  # fmt: skip
def test_settings_in_words(value, shown):
    assert figures.setting(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0 s"), (0.34, "0.3 s"), (59.7, "1 min 00 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, shown):
    assert figures.duration(seconds) == shown
