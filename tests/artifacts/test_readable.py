"""Numbers as people read them, by hand and at their edges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.artifacts.readable import count, duration, number, percent, score, seconds_between, size

HOUR, DAY = 3600, 86_400


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.0004, "< 1 ms"), (0.045, "45 ms"), (0.0994, "99 ms"), (0.0996, "0.1 s"), (3.44, "3.4 s"),
        (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (75, "1 min 15 s"), (372, "6 min 12 s"),
        (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"), (3629, "1 h 00 min"), (3631, "1 h 01 min"),
        (3_900, "1 h 05 min"), (5 * HOUR + 12 * 60, "5 h 12 min"), (DAY - 31, "23 h 59 min"), (DAY - 29, "1 d 0 h"),
        (55 * HOUR + 33 * 60, "2 d 8 h"), (187_200, "2 d 4 h"),
        (2 * DAY - 1801, "1 d 23 h"), (2 * DAY - 1799, "2 d 0 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0.001, 1e8))
def test_a_duration_is_right_to_its_last_unit_and_never_60_of_one(seconds: float) -> None:
    units = {"ms": 0.001, "s": 1, "min": 60, "h": HOUR, "d": DAY}
    words = duration(seconds).split()
    parts = {unit: float(amount) for amount, unit in zip(words[::2], words[1::2], strict=True)}
    last = units[list(parts)[-1]]
    exact = 0.1 if "." in words[-2] else 1
    total = sum(amount * units[unit] for unit, amount in parts.items())
    assert total == pytest.approx(seconds, abs=0.501 * last * exact)
    assert parts.get("s", 0) < 60 and parts.get("min", 0) < 60 and parts.get("h", 0) < 24 and parts.get("ms", 0) < 100


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (100, "100 B"), (999, "999 B"), (1000, "1 kB"), (1023, "1.02 kB"), (1024, "1.02 kB"),
        (999_499, "999 kB"), (999_500, "1 MB"), (3_809_736, "3.81 MB"), (82.1e9, "82.1 GB"), (999.96e9, "1 TB"),
        (1e12, "1 TB"), (2e12, "2 TB"), (3.5e15, "3.5 PB"),
    ],
)  # fmt: skip
def test_sizes(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_counts() -> None:
    assert [count(v) for v in (0, 998, 999.6, 12_345, 486e6, 999.4e9, 999.6e9, 1.05e19)] == [
        "0", "998", "1k", "12.3k", "486M", "999G", "1.00e+12", "1.05e+19",
    ]  # fmt: skip


@given(st.integers(1, 10**17))
def test_counts_and_sizes_keep_three_digits(value: int) -> None:
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    text = count(value)
    counted = float(text[:-1]) * units[text[-1]] if text[-1] in units else float(text)
    assert counted == pytest.approx(value, rel=0.0051)
    amount, unit = size(value).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit]
    assert float(amount) * scale == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"), (0.0, "0"), (-2.5, "-2.5"), (19_957.0, "19,957"), (0.41237, "0.4124"), (21_043.5, "21,044"),
        (999.94, "999.9"), (999.96, "1,000"), (1_000.4, "1,000"), (0.000012, "1.20e-05"), (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_shares_that_are_not_0_never_read_as_0() -> None:
    assert [percent(share) for share in (0.0, 0.00001, 0.00006, 0.0125, 0.7998, 1.0)] == [
        "0 %", "< 0.01 %", "0.01 %", "1.25 %", "79.98 %", "100.00 %",
    ]  # fmt: skip


def test_scores_and_times() -> None:
    assert score(0.7018, 0.02) == "0.702 ± 0.020" and score(61.04, None) == "61.0"
    assert seconds_between("2026-11-21T07:04:12+00:00", "2026-11-21T08:04:12.5+00:00") == 3600.5
    assert seconds_between("2026-11-21T07:04:12", "2026-11-21T07:04:11") is None
    assert seconds_between("2026-11-21T07:04:12", "") is None and seconds_between(None, "yesterday") is None
