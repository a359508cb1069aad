"""Compiled loops of the mode `normalised`: text without its markup, escapes, accents and punctuation, as terms.

Most turns take `normalise_fast`, one pass over the bytes. A turn with an escape, a tag or a place that can be read in
two ways takes `normalise_slow`, which gives the same terms of plain text, and says where each byte comes from.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import numpy as np

from smoltulu.tasks.contamination.kernels.compile import inner, kernel
from smoltulu.tasks.contamination.kernels.escapes import (
    INVISIBLE,
    hex_value,
    is_blank,
    is_letter,
    kind_of,
    take_out_markup,
    unescape,
)
from smoltulu.tasks.contamination.kernels.layout import (
    DIGIT,
    DROP,
    GAP,
    LETTER,
    NUM_POINTS,
    SEQUENCE,
    SINGLE,
    ZERO_WIDTH,
)
from smoltulu.tasks.contamination.kernels.readings import (
    drop_line_numbers,
    holds_zero_width,
    join_words,
    line_number,
    part_by_zero_width,
)
from smoltulu.tasks.contamination.kernels.text import decode, encode

_SPACE = 32
NEEDS_SLOW = -2
#: A term that no text has, so that no phrase crosses from one reading of a turn into the other.
_SENTINEL = 0
_MAX_PASSES = 4  # escapes within escapes
#: Bytes of a turn that is read in more than one way: of a longer one, each way would take hundreds of MB.
_MAX_BYTES_OF_OTHERS = 4 << 20

# ASCII: kinds GAP, LETTER and DIGIT, and LOOK for characters that may begin an escape, a tag, a link or a broken line.
_LOOK = 7


def _ascii_kinds() -> np.ndarray:
    kinds = np.zeros(128, np.uint8)
    kinds[[*range(65, 91), *range(97, 123)]] = LETTER
    kinds[48:58] = DIGIT
    kinds[[ord(character) for character in "\\&<%]-\n\r"]] = _LOOK
    return kinds


def _ascii_to() -> np.ndarray:
    to = np.full(128, _SPACE, np.uint8)
    to[48:58] = np.arange(48, 58)
    to[97:123] = to[65:91] = np.arange(97, 123)
    return to


ASCII_KINDS, ASCII_TO = _ascii_kinds(), _ascii_to()


@inner
def put(kind, point, last, out, n):
    """Write a folded point behind a term or a gap: where the next byte goes. `last`: kind of what was written last."""
    if kind == GAP:
        out[n] = _SPACE
        return n + (last != GAP)
    if last != GAP and (last != kind or kind == SINGLE):
        out[n] = _SPACE
        n += 1
    return encode(point, out, n)


@inner
def put_point(point, last, out, n, tables):
    """Fold a point and write it: (where the next byte goes, kind of what was written last)."""
    kind = kind_of(point, tables)
    if kind in (DROP, ZERO_WIDTH):
        return n, last
    if kind != SEQUENCE:
        return put(kind, np.int64(tables.to[point]) if point < NUM_POINTS else point, last, out, n), kind
    at = np.int64(tables.to[point])
    for k in range(tables.sequences[at]):
        kind = np.int64(tables.sequences[at + 1 + 2 * k])
        n = put(kind, np.int64(tables.sequences[at + 2 + 2 * k]), last, out, n)
        last = kind
    return n, last


@inner
def put_all(points, first, end, out, at, m, tables):
    """Terms of points[first:end] into `out` from `m` on, and of each byte its point: where they end."""
    last = np.int64(GAP)
    kinds, to = tables.kind, tables.to
    for i in range(first, end):
        point = points[i]
        if point < 0x80:  # as in `normalise_fast`, without a branch
            kind = np.int64(kinds[point])
            at[m] = at[m + 1] = i
            out[m] = _SPACE
            m += (kind != last) & (kind != GAP) & (last != GAP)
            out[m] = _SPACE if kind == GAP else to[point]
            m += (kind != GAP) | (last != GAP)
            last = kind
            continue
        before = m
        m, last = put_point(np.int64(points[i]), last, out, m, tables)
        for k in range(before, m):
            at[k] = i
    return m - (last == GAP and m > 0 and out[m - 1] == _SPACE)


@inner
def room_of(points, n, tables):
    """Bytes that the terms of the points may take."""
    room = 0
    for i in range(n):
        point = points[i]
        if point < 0x80:
            room += 2
        elif kind_of(point, tables) == SEQUENCE:
            room += 5 * tables.sequences[tables.to[point]]
        else:
            room += 5
    return room + 8


@inner
def read_points(source, start, end, is_blank_for_zero_width, points, begins, tables):
    """Code points of source[start:end] that are drawn, full-width ASCII as ASCII: (their number or -1, escapes?, zero
    width?). A soft hyphen stays before a blank, where it breaks a word.
    """
    n = 0
    i = start
    has_escape, has_zero_width = False, False
    while i < end:
        point, size = np.int64(source[i]), 1
        if point >= 0x80:
            point, size = decode(source, i, end)
            if point < 0:
                return -1, False, False
            if point >= 0xFF01 and point <= 0xFF5E:
                point -= 0xFEE0
            kind = kind_of(point, tables)
            if kind == ZERO_WIDTH:
                has_zero_width = True
                if is_blank_for_zero_width:
                    point, kind = np.int64(_SPACE), np.int64(GAP)
            is_kept = kind != DROP and kind != ZERO_WIDTH
            is_kept |= point == 0xAD and i + size < end and is_blank(source[i + size])
            if not is_kept:
                i += size
                continue
        has_escape |= point == 92 or point == 38 or point == 37
        points[n], begins[n] = point, i - start
        n += 1
        i += size
    points[n], begins[n] = _SPACE, end - start
    return n, has_escape, has_zero_width


@inner
def undo(points, begins, n, has_escape, tables):
    """Undo escapes and take out markup, in place: number of points left."""
    for _ in range(_MAX_PASSES):
        if not has_escape:
            break
        n, has_escape = unescape(points, begins, n, tables)
    take_out_markup(points, n, tables)
    return n


@inner
def longer(array, size):
    """The array, or a longer one that begins with it."""
    if len(array) >= size:
        return array
    more = np.empty(size + min(size // 2, 1 << 20), array.dtype)
    more[: len(array)] = array
    return more


@inner
def normalise_slow(source, start, end, with_others, points, begins, out, at, tables):
    """Terms of source[start:end] joined by one space, and behind sentinels once more for each way to read it otherwise.

    Returns (bytes, or -1 if not UTF-8; points, their begins, terms, the point of each byte): the arrays are those
    given, or longer ones. Begins count from `start`. Behind the last point of a reading stands a blank.
    """
    size = end - start + 1
    points, begins = longer(points, size), longer(begins, size)
    n, has_escape, has_zero_width = read_points(source, start, end, False, points, begins, tables)
    if n < 0:
        return -1, points, begins, out, at
    n = undo(points, begins, n, has_escape, tables)
    room = room_of(points, n, tables)
    out, at = longer(out, room), longer(at, room)
    m = put_all(points, 0, n, out, at, 0, tables)
    if not with_others or size > _MAX_BYTES_OF_OTHERS:
        return m, points, begins, out, at
    has_zero_width |= holds_zero_width(points, n, tables)
    first, num_points = 0, n  # of the reading that the others are made of
    behind = n + 1
    for which in range(4):  # without zero-width characters; words joined; without line numbers; both
        if which == 0:
            if not has_zero_width:
                continue
            points, begins = longer(points, behind + size), longer(begins, behind + size)
            count, _, _ = read_points(source, start, end, True, points[behind:], begins[behind:], tables)
            count = undo(points[behind:], begins[behind:], count, has_escape, tables)
            part_by_zero_width(points[behind:], count, tables)
            first, num_points = behind, count
        else:
            count = num_points
            points, begins = longer(points, behind + count + 1), longer(begins, behind + count + 1)
            points[behind : behind + count + 1] = points[first : first + count + 1]
            begins[behind : behind + count + 1] = begins[first : first + count + 1]
            is_changed = which == 1 or drop_line_numbers(points[behind:], count)
            if not is_changed or (which != 2 and not join_words(points[behind:], count, tables)):
                continue
        room = m + 4 + room_of(points[behind:], count, tables)
        out, at = longer(out, room), longer(at, room)
        if m > 0:
            out[m] = _SPACE
            m += 1
        out[m], out[m + 1] = _SENTINEL, _SPACE
        m = put_all(points, behind, behind + count, out, at, m + 2, tables)
        behind += count + 1
    return m, points, begins, out, at


@inner
def normalise_fast(source, start, end, out, at, limit, tables, ascii_kinds, ascii_to):
    """The same of a turn without escapes, tags and ambiguous places; -1 if not UTF-8, NEEDS_SLOW for other turns.

    `out` has at least twice the bytes and 128 more; so has `at`, which gets the place of each byte up to byte
    `limit`, where that is not 0; the rest of the turn is then not read.
    """
    n = 0
    last = np.int64(GAP)
    i = start
    number = np.int64(-9)
    is_start = True
    while i < end:
        if is_start:
            value, first, k = line_number(source, i, end)
            if value >= 0 and value == number + 1:
                return NEEDS_SLOW
            if value >= 0:
                number = value
            elif k < end and (source[k] == 0xEF or (source[k] == 0xE3 and k > first)):  # may be full-width, or a mark
                return NEEDS_SLOW
            is_start = False
        byte = source[np.uintp(i)]
        if byte < 0x80:
            kind = np.int64(ascii_kinds[byte])
            if kind == _LOOK:
                kind = np.int64(GAP)
                after = np.int64(source[i + 1]) if i + 1 < end else np.int64(-1)
                if byte == 10 or byte == 13:
                    is_start = True
                elif byte == 45:
                    if last == LETTER and (is_blank(after) or after >= 0x80):
                        k = i + 1
                        while k < end and (source[k] == 32 or source[k] == 9):
                            k += 1
                        if k < end and (source[k] == 10 or source[k] == 13 or source[k] >= 0x80):
                            return NEEDS_SLOW
                elif (
                    byte == 92
                    or after >= 0x80
                    or (byte == 38 and (is_letter(after) or after == 35))
                    or (byte == 60 and (is_letter(after) or after == 47))
                    or (byte == 37 and hex_value(after) >= 0)
                    or (byte == 93 and after == 40)
                ):
                    return NEEDS_SLOW
            # No branch: what is written for a boundary or a gap stands only where there is one.
            if limit > 0:
                if n > limit:
                    return n
                at[n] = at[n + 1] = i - start
            place = np.uintp(n)  # a signed index could count from the end, which costs a look at each
            out[place] = _SPACE
            place += np.uintp((kind != last) & (kind != GAP) & (last != GAP))
            out[place] = ascii_to[byte]
            n = np.int64(place) + ((kind != GAP) | (last != GAP))
            last = kind
            i += 1
            continue
        point, size = decode(source, i, end)
        if point < 0:
            return -1
        kind = kind_of(point, tables)
        if kind in (ZERO_WIDTH, DROP) or point == 0x2010 or point == 0x2011:
            return NEEDS_SLOW
        if point >= 0xFF01 and point <= 0xFF5E and (kind == DIGIT or ascii_kinds[point - 0xFEE0] == _LOOK):
            return NEEDS_SLOW
        if kind == SEQUENCE and n + 128 + 2 * (end - i) > (min(len(out), len(at)) if limit > 0 else len(out)):
            return NEEDS_SLOW
        before = n
        n, last = put_point(point, last, out, n, tables)
        if limit > 0:
            at[before:n] = i - start
        i += size
    return n - (last == GAP and n > 0)


@kernel
def normalise_fields(source, offsets, tables):
    """Normal forms of texts as (bytes, offsets, number of terms of each)."""
    num_texts = len(offsets) - 1
    points, begins = np.empty(1_024, np.int32), np.empty(1_024, np.int32)
    out, at = np.empty(4_096, np.uint8), np.empty(4_096, np.int32)
    text = np.empty(2 * len(source) + 8, np.uint8)
    text_offsets, num_terms = np.zeros(num_texts + 1, np.int64), np.zeros(num_texts, np.int32)
    n = 0
    for k in range(num_texts):
        length, points, begins, out, at = normalise_slow(
            source, offsets[k], offsets[k + 1], False, points, begins, out, at, tables
        )
        if n + length > len(text):
            wider = np.empty(2 * (n + length), np.uint8)
            wider[:n] = text[:n]
            text = wider
        text[n : n + length] = out[:length]
        for i in range(length):
            num_terms[k] += out[i] == _SPACE
        num_terms[k] += length > 0
        n += length
        text_offsets[k + 1] = n
    return text[:n].copy(), text_offsets, num_terms


@kernel
def locate_normalised(source, turn_start, turn_end, hits, tables, ascii_kinds, ascii_to):
    """Source bytes (first, behind the last) of the normalised matches hits[:, 2:4]; their turns hits[:, 0] ascend."""
    begins_of, ends_of = np.empty(len(hits), np.int64), np.empty(len(hits), np.int64)
    points, begins = np.empty(1_024, np.int32), np.empty(1_024, np.int32)
    out, at = np.empty(4_096, np.uint8), np.empty(4_096, np.int32)
    turn = np.int64(-1)
    is_slow = False
    for hit in range(len(hits)):
        if hits[hit, 0] != turn:
            turn = hits[hit, 0]
            start, end = turn_start[turn], turn_end[turn]
            out, at = longer(out, 2 * (end - start) + 128), longer(at, 2 * (end - start) + 128)
            limit = np.int64(1)
            k = hit
            while k < len(hits) and hits[k, 0] == turn:
                limit = max(limit, hits[k, 3])
                k += 1
            is_slow = normalise_fast(source, start, end, out, at, limit, tables, ascii_kinds, ascii_to) == NEEDS_SLOW
            if is_slow:
                _, points, begins, out, at = normalise_slow(source, start, end, True, points, begins, out, at, tables)
        start = turn_start[turn]
        first, last = np.int64(at[hits[hit, 2]]), np.int64(at[hits[hit, 3] - 1])
        if not is_slow:
            begins_of[hit] = start + first
            last += start + 1
            while last < turn_end[turn] and source[last] & 0xC0 == 0x80:
                last += 1
            ends_of[hit] = last
            continue
        behind = last + 1
        # Marks of the last character belong to it; so does the second half of an entity.
        while points[behind] != INVISIBLE and (
            kind_of(points[behind], tables) == DROP or begins[behind] == begins[last]
        ):
            behind += 1
        begins_of[hit], ends_of[hit] = start + begins[first], start + begins[behind]
    return begins_of, ends_of
