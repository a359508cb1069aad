"""Compiled loops for what can be read in two ways, in the mode `normalised`: each takes the second way, in place."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import numpy as np

from smoltulu.tasks.contamination.kernels.compile import inner
from smoltulu.tasks.contamination.kernels.escapes import INVISIBLE, at_point, is_letter, kind_of
from smoltulu.tasks.contamination.kernels.layout import DROP, GAP, LETTER, ZERO_WIDTH

_SPACE = 32
_MAX_PREFIX, _MAX_NUMBER = 32, 6  # characters before the number of a line, and its digits


@inner
def line_number(points, i, n):
    """(number that begins the line at `i`, -1: none; first place of its digits; where it was known)."""
    k = i
    while k < n and k < i + _MAX_PREFIX:
        point = points[k]
        if point == 10 or point == 13 or point >= 0x80 or is_letter(point) or (point >= 48 and point <= 57):
            break
        k += 1
    first, value = k, np.int64(0)
    while k < n and k < first + _MAX_NUMBER and points[k] >= 48 and points[k] <= 57:
        value = value * 10 + np.int64(points[k]) - 48
        k += 1
    is_mark = k < n and (points[k] == 0x3001 or points[k] == 0x3002)  # as in Chinese lists
    if k == first or (
        k < n and not is_mark and (points[k] >= 0x80 or is_letter(points[k]) or (points[k] >= 48 and points[k] <= 57))
    ):
        return np.int64(-1), first, k
    return value, first, k


@inner
def broken_word(points, i, n, tables):
    """Where the word goes on that the hyphen at `i` breaks at the end of its line; `i` where it breaks none."""
    j = i + 1
    while j < n and (points[j] == 32 or points[j] == 9 or points[j] == 13):
        j += 1
    if at_point(points, j, n) != 10 and not (j > i + 1 and points[j - 1] == 13):
        return i
    j += at_point(points, j, n) == 10
    while j < n and points[j] != 10 and points[j] != 13 and kind_of(points[j], tables) == GAP:
        j += 1
    return j if j < n and kind_of(points[j], tables) == LETTER else i


@inner
def part_by_zero_width(points, n, tables):
    """Blanks for zero-width characters, in place."""
    for i in range(n):
        if points[i] >= 0x80 and kind_of(points[i], tables) == ZERO_WIDTH:
            points[i] = _SPACE


@inner
def holds_zero_width(points, n, tables):
    """Whether there is any."""
    for i in range(n):  # noqa: SIM110
        if points[i] >= 0x80 and kind_of(points[i], tables) == ZERO_WIDTH:
            return True
    return False


@inner
def join_words(points, n, tables):
    """Make words whole that a hyphen breaks at the end of a line, in place; whether there was any."""
    is_changed = False
    last = GAP  # kind of the point before
    i = 0
    while i < n:
        point = points[i]
        end = i
        if last == LETTER and (point == 45 or point == 0xAD or point == 0x2010 or point == 0x2011):
            end = broken_word(points, i, n, tables)
        if end > i:
            points[i:end] = INVISIBLE
            is_changed = True
            i = end
            continue
        if point < 0x80:
            last = LETTER if is_letter(point) else GAP  # or a digit, which breaks no word either
        else:
            kind = kind_of(point, tables)
            last = last if kind == DROP else kind
        i += 1
    return is_changed


@inner
def drop_line_numbers(points, n):
    """Take out numbers that begin lines and count on, in place; whether there was any."""
    is_changed = False
    before, before_first, before_last = np.int64(-9), 0, 0
    for i in range(n):
        if i > 0 and points[i - 1] != 10 and points[i - 1] != 13:
            continue
        value, first, end = line_number(points, i, n)
        if value >= 0:
            if value == before + 1:
                points[before_first:before_last] = _SPACE
                points[first:end] = _SPACE
                is_changed = True
            before, before_first, before_last = value, first, end
    return is_changed
