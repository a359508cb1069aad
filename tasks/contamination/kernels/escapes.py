"""Compiled loops that undo escapes and markup, for the mode `normalised`: HTML, JSON, URLs, LaTeX, Markdown.

All work in place on code points and on where each begins in the source.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import numpy as np

from smoltulu.tasks.contamination.kernels.compile import inner
from smoltulu.tasks.contamination.kernels.layout import (
    DROP,
    ENTITY,
    GAP,
    LAST_HAN,
    MARKUP,
    NAMED_ESCAPE,
    NUM_POINTS,
    SINGLE,
    TAG,
)

_SPACE = 32
INVISIBLE = 0x34F  # a point that is dropped, in place of one that is taken out
_REPLACEMENT = 0xFFFD
_MAX_NAME = 31
_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
#: cp1252 of the numeric entities &#128; to &#159;, as browsers read them.
_WINDOWS = np.array([ord(bytes([byte]).decode("cp1252", "replace")) for byte in range(128, 160)], dtype=np.int32)


@inner
def is_letter(point):
    """ASCII letter."""
    lower = point | 32
    return lower >= 97 and lower <= 122


@inner
def hex_value(point):
    """Value of a hexadecimal digit, -1 for any other character."""
    if point >= 48 and point <= 57:
        return point - 48
    lower = point | 32
    return lower - 87 if lower >= 97 and lower <= 102 else -1


@inner
def at_point(points, i, n):
    """Point `i`, -1 behind the end."""
    return np.int64(points[i]) if i < n else np.int64(-1)


@inner
def kind_of(point, tables):
    """Kind of any code point."""
    if point < NUM_POINTS:
        return np.int64(tables.kind[point])
    if point <= LAST_HAN:
        return np.int64(SINGLE)
    return np.int64(DROP) if point >= 0xE0000 and point < 0xE1000 else np.int64(GAP)


@inner
def named(points, begin, end, category, tables):
    """What the name points[begin:end] is in this category, -1: unknown. Tags and commands of looks: in any case."""
    if end == begin or end - begin > _MAX_NAME:
        return np.int64(-1)
    is_any_case = category in (TAG, MARKUP)
    h = _FNV_OFFSET ^ np.uint64(category << 40)  # above all characters
    for k in range(begin, end):
        point = points[k]
        h = (h ^ np.uint64(point | 32 if is_any_case and is_letter(point) else point)) * _FNV_PRIME
    mask = len(tables.keys) - 1
    slot = np.int64(h) & mask
    while tables.values[slot] >= 0:
        if tables.keys[slot] == h:
            return tables.values[slot]
        slot = (slot + 1) & mask
    return np.int64(-1)


@inner
def hex_run(points, i, n, length):
    """Value of `length` hexadecimal digits at `i`, -1 if they are not there."""
    value = np.int64(0)
    for k in range(i, i + length):
        digit = hex_value(at_point(points, k, n))
        if digit < 0:
            return np.int64(-1)
        value = value * 16 + digit
    return value


@inner
def valid(point):
    """The code point, or U+FFFD for what is none: NUL, surrogates, too large."""
    if point <= 0 or point > 0x10FFFF or (point >= 0xD800 and point < 0xE000):
        return np.int64(_REPLACEMENT)
    return point


@inner
def byte_escape(points, i, n):
    """(byte, size) of %XX or \\xXX at `i`, (-1, 0) for anything else."""
    j = i
    if at_point(points, j, n) == 37:
        j += 1
    else:
        while at_point(points, j, n) == 92:
            j += 1
        if j == i or at_point(points, j, n) != 120:
            return np.int64(-1), 0
        j += 1
    value = hex_run(points, j, n, 2)
    return value, j + 2 - i if value >= 0 else 0


@inner
def utf8_escape(points, i, n):
    """(code point, size) of escaped bytes that are UTF-8, (-1, 0) where they are not."""
    lead, size = byte_escape(points, i, n)
    if lead < 0:
        return np.int64(-1), 0
    if lead < 0x80:
        return valid(lead), size
    if lead < 0xC2 or lead > 0xF4:
        return np.int64(-1), 0
    num_more = 1 + (lead >= 0xE0) + (lead >= 0xF0)
    point = lead & (0x3F >> num_more)
    for _ in range(num_more):
        byte, more = byte_escape(points, i + size, n)
        if byte & 0xC0 != 0x80:  # -1 & 0xC0 is 0xC0
            return np.int64(-1), 0
        point, size = (point << 6) | (byte & 0x3F), size + more
    if (num_more == 2 and point < 0x800) or (num_more == 3 and point < 0x10000) or valid(point) != point:
        return np.int64(-1), 0
    return point, size


@inner
def unicode_escape(points, j, n):
    """(code point, size) of uXXXX, u{X}, UXXXXXXXX at `j`, behind a backslash; (-1, 0) for anything else."""
    letter = at_point(points, j, n)
    if letter == 85:
        value = hex_run(points, j + 1, n, 8)
        return (valid(value), 9) if value >= 0 else (np.int64(-1), 0)
    if letter != 117:
        return np.int64(-1), 0
    if at_point(points, j + 1, n) == 123:
        k, value = j + 2, np.int64(0)
        while k < j + 8 and hex_value(at_point(points, k, n)) >= 0:
            value = value * 16 + hex_value(at_point(points, k, n))
            k += 1
        if k > j + 2 and at_point(points, k, n) == 125:
            return valid(value), k + 1 - j
        return np.int64(-1), 0
    value = hex_run(points, j + 1, n, 4)
    if value >= 0xD800 and value < 0xDC00:  # half a pair
        k = j + 5
        while at_point(points, k, n) == 92:
            k += 1
        if k > j + 5 and at_point(points, k, n) == 117:
            low = hex_run(points, k + 1, n, 4)
            if low >= 0xDC00 and low < 0xE000:
                return 0x10000 + ((value - 0xD800) << 10) + (low - 0xDC00), k + 5 - j
    return (valid(value), 5) if value >= 0 else (np.int64(-1), 0)


@inner
def entity(points, i, n, tables):
    """(code point, second code point or 0, size) of an HTML entity at `i`, whatever it was escaped by; (-1, 0, 0)."""
    j = i + 1
    while (
        at_point(points, j, n) == 97
        and at_point(points, j + 1, n) == 109
        and at_point(points, j + 2, n) == 112
        and at_point(points, j + 3, n) == 59
    ):
        j += 4
    k = j
    if at_point(points, j, n) == 35:
        value = np.int64(0)
        if at_point(points, j + 1, n) | 32 == 120:
            k = j + 2
            while k < j + 10 and hex_value(at_point(points, k, n)) >= 0:
                value = value * 16 + hex_value(at_point(points, k, n))
                k += 1
            has_digits = k > j + 2
        else:
            k = j + 1
            while k < j + 9 and at_point(points, k, n) >= 48 and at_point(points, k, n) <= 57:
                value = value * 10 + at_point(points, k, n) - 48
                k += 1
            has_digits = k > j + 1
        if has_digits and at_point(points, k, n) == 59:
            if value >= 128 and value < 160:
                value = np.int64(_WINDOWS[value - 128])
            return valid(value), np.int64(0), k + 1 - i
    else:
        while k < j + _MAX_NAME and (
            is_letter(at_point(points, k, n)) or (at_point(points, k, n) >= 48 and at_point(points, k, n) <= 57)
        ):
            k += 1
        if at_point(points, k, n) == 59:
            value = named(points, j, k, ENTITY, tables)
            if value >= 0:
                return value & 0x1FFFFF, value >> 21, k + 1 - i
    if j > i + 1:
        return np.int64(38), np.int64(0), j - i
    return np.int64(-1), np.int64(0), 0


@inner
def unescape(points, begins, n, tables):
    """Undo the outermost escapes, in place: (number of points left, whether there may be more)."""
    m = 0
    i = 0
    is_changed = False
    while i < n:
        point, begin = np.int64(points[i]), begins[i]
        second, size = np.int64(0), 0
        if point == 38:
            point, second, size = entity(points, i, n, tables)
            is_changed |= size > 0
        elif point == 37:
            point, size = utf8_escape(points, i, n)
            is_changed |= size > 0
        elif point == 92:
            j = i + 1
            while j < n and points[j] == 92:
                j += 1
            point, size = unicode_escape(points, j, n)
            if size > 0:
                size += j - i
            else:
                point, size = utf8_escape(points, i, n)
                if size == 0:
                    byte, size = byte_escape(points, i, n)
                    point = valid(byte)
            if size > 0:
                is_changed = True
            else:
                # A line feed, a tab or a return, or the first letter of a LaTeX command.
                after = at_point(points, j, n)
                point, size = np.int64(92), j - i
                if after == 110 or after == 114 or after == 116:
                    k = j
                    while k < n and k <= j + _MAX_NAME and is_letter(points[k]):
                        k += 1
                    if named(points, j, k, NAMED_ESCAPE, tables) < 0:
                        point = np.int64(10 if after == 110 else (13 if after == 114 else 9))
                        size += 1
        if size == 0:
            point, size = np.int64(points[i]), 1
        points[m], begins[m] = point, begin
        m += 1
        if second > 0:
            points[m], begins[m] = second, begin
            m += 1
        i += size
    points[m], begins[m] = _SPACE, begins[n]
    return m, is_changed


@inner
def is_blank(point):
    """Blank, tab, line feed or return."""
    return point == 32 or (point >= 9 and point <= 13)


@inner
def tag_end(points, i, n, tables):
    """(where the HTML tag at `i` ends, whether it parts words); (i, False) where there is none of a known name."""
    j = i + 1
    if at_point(points, j, n) == 47:
        j += 1
    k = j
    while k < j + _MAX_NAME and (is_letter(at_point(points, k, n)) or hex_value(at_point(points, k, n)) >= 0):
        k += 1
    what = named(points, j, k, TAG, tables)
    if what < 0:
        return i, False
    while k < n:
        j = k
        while k < n and is_blank(points[k]):
            k += 1
        point = at_point(points, k, n)
        if point == 47 and at_point(points, k + 1, n) == 62:
            return k + 2, what == 1
        if point == 62:
            return k + 1, what == 1
        if j == k:  # no blank before an attribute
            return i, False
        j = k
        while k < n and (
            is_letter(points[k])
            or points[k] == 45
            or points[k] == 58
            or points[k] == 95
            or (k > j and (points[k] == 46 or (points[k] >= 48 and points[k] <= 57)))
        ):
            k += 1
        if j == k or at_point(points, k, n) != 61:
            return i, False
        k += 1
        quote = at_point(points, k, n)
        if quote == 34 or quote == 39:
            k += 1
            while k < n and points[k] != quote and points[k] != 60:
                k += 1
            if at_point(points, k, n) != quote:
                return i, False
            k += 1
        else:
            j = k
            while k < n and not is_blank(points[k]) and points[k] != 60 and points[k] != 62 and points[k] != 61:
                k += 1
            if j == k:
                return i, False
    return i, False


@inner
def target_end(points, i, n):
    """Where the target of a Markdown link ends whose `](` ends before `i`; `i` where none begins there."""
    in_angles = at_point(points, i, n) == 60
    j = i + in_angles
    first, second, third = at_point(points, j, n), at_point(points, j + 1, n), at_point(points, j + 2, n)
    is_address = first == 47 or first == 35 or (first == 46 and second == 47)
    is_address |= first == 104 and second == 116 and third == 116
    is_address |= first == 119 and second == 119 and third == 119
    is_address |= first == 109 and second == 97 and third == 105 and at_point(points, j + 6, n) == 58  # mailto:
    if not is_address:
        return i
    in_parentheses = False
    while j < n and not is_blank(points[j]):
        point = points[j]
        if point == 60 or point == 62 or point == 91 or point == 93 or (point == 40 and in_parentheses):
            break
        if point == 41 and not in_parentheses:
            break
        in_parentheses = point == 40 or (in_parentheses and point != 41)
        j += 1
    if in_parentheses:
        return i
    if in_angles:
        if at_point(points, j, n) != 62:
            return i
        j += 1
    k = j
    while k < n and is_blank(points[k]):
        k += 1
    quote = at_point(points, k, n)
    if k > j and (quote == 34 or quote == 39):  # a title
        k += 1
        while k < n and points[k] != quote and points[k] != 91 and points[k] != 93:
            k += 1
        if at_point(points, k, n) != quote:
            return i
        k += 1
    elif k > j:
        return i
    return k + 1 if at_point(points, k, n) == 41 else i


@inner
def take_out_markup(points, n, tables):
    """Tags, targets of links and LaTeX commands of looks, in place: blanks, or points that are dropped."""
    i = 0
    while i < n:
        point = points[i]
        end = i
        fill = _SPACE
        if point == 60:
            end, parts = tag_end(points, i, n, tables)
            fill = _SPACE if parts else INVISIBLE
        elif point == 93 and at_point(points, i + 1, n) == 40:
            end = target_end(points, i + 2, n)
            if end == i + 2:
                end = i
        elif point == 92:
            k = i + 1
            while k < n and is_letter(points[k]):
                k += 1
            what = named(points, i + 1, k, MARKUP, tables)
            if what >= 0:
                end = k if what == 0 else i + 2
        for k in range(i, end):
            points[k] = fill
        if end > i and point == 60 and fill == _SPACE:
            points[i] = 10  # a block begins a line
        i = max(end, i + 1)
