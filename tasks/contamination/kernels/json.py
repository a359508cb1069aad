"""Compiled reader of normalised rows in JSON lines: takes the wanted turns out without making Python objects.

It knows the form that the dataset stage writes, with any spacing, key order and further keys. What it does not know it
leaves to `json`, line by line, so that nothing is guessed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import numpy as np

from smoltulu.tasks.contamination.kernels.compile import inner, kernel
from smoltulu.tasks.contamination.kernels.layout import ROLES
from smoltulu.tasks.contamination.kernels.text import encode

_QUOTE, _BACKSLASH, _NEWLINE, _COMMA, _COLON = 0x22, 0x5C, 0x0A, 0x2C, 0x3A
_OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_LIST, _CLOSE_LIST = 0x7B, 0x7D, 0x5B, 0x5D
_SLASH, _B, _F, _N, _R, _T, _U = 0x2F, 0x62, 0x66, 0x6E, 0x72, 0x74, 0x75


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


_ID, _ROLE, _CONTENT = _bytes("id"), _bytes("role"), _bytes("content")
_MESSAGES, _PROMPT, _CHOSEN, _REJECTED = _bytes("messages"), _bytes("prompt"), _bytes("chosen"), _bytes("rejected")
_SYSTEM, _USER, _ASSISTANT = (_bytes(role) for role in ROLES)

# One bit per byte of a word, for eight bytes at a time.
_LOW = np.uint64(0x0101010101010101)
_HIGH = np.uint64(0x8080808080808080)
_QUOTES, _BACKSLASHES, _CONTROLS = (
    np.uint64(0x2222222222222222),
    np.uint64(0x5C5C5C5C5C5C5C5C),
    np.uint64(0x2020202020202020),
)
_NOTHING = np.uint64(0)


@inner
def is_word(data, begin, end, word):
    """Whether data[begin:end] is `word`."""
    if end - begin != len(word):
        return False
    for k in range(len(word)):  # noqa: SIM110
        if data[begin + k] != word[k]:
            return False
    return True


@inner
def skip_space(data, i, end):
    """The next byte that is no space of JSON; a line feed, which ends the row, is none here."""
    while i < end and (data[i] == 0x20 or data[i] == 0x09 or data[i] == 0x0D):
        i += 1
    return i


@inner
def string_end(data, words, i, end):
    """(closing quote of the string whose text begins at `i`, whether it has escapes); -1 for no such string."""
    has_escape = False
    while i < end:
        # Eight bytes at a time where none of them is a quote, a backslash or a control character.
        while i & 7 == 0 and i + 8 <= end:
            word = words[i >> 3]
            quotes, backslashes = word ^ _QUOTES, word ^ _BACKSLASHES
            special = ((quotes - _LOW) & ~quotes) | ((backslashes - _LOW) & ~backslashes) | ((word - _CONTROLS) & ~word)
            if special & _HIGH != _NOTHING:
                break
            i += 8
        if i >= end:
            break
        c = data[i]
        if c == _QUOTE:
            return i, has_escape
        if c < 0x20:
            break
        if c == _BACKSLASH:
            has_escape = True
            i += 1
        i += 1
    return -1, has_escape


@inner
def skip_value(data, words, i, end):
    """The byte behind the value at `i`, -1 if it does not end in this line."""
    depth = 0
    while i < end:
        c = data[i]
        if c == _QUOTE:
            i, _ = string_end(data, words, i + 1, end)
            if i < 0:
                return -1
            i += 1
        elif c == _OPEN_OBJECT or c == _OPEN_LIST:  # noqa: SIM109
            depth += 1
            i += 1
        elif c == _CLOSE_OBJECT or c == _CLOSE_LIST:  # noqa: SIM109
            if depth == 0:
                return i
            depth -= 1
            i += 1
        elif c == _NEWLINE:
            return -1
        elif c == _COMMA and depth == 0:
            return i
        else:
            i += 1
            continue
        if depth == 0:
            return i
    return -1


@inner
def hexadecimal(data, i, end):
    """Value of the four digits at `i`, -1 if they are not."""
    if i + 4 > end:
        return -1
    value = np.int64(0)
    for k in range(4):
        c = np.int64(data[i + k])
        if c >= 0x30 and c <= 0x39:
            value = value * 16 + c - 0x30
        elif c | 0x20 >= 0x61 and c | 0x20 <= 0x66:
            value = value * 16 + (c | 0x20) - 0x57
        else:
            return -1
    return value


@inner
def unescape(data, i, end, out, n):
    """Text of the string data[i:end] to out[n:]; where the next byte goes, -1 for what is none."""
    while i < end:
        c = data[i]
        if c != _BACKSLASH:
            out[n] = c
            n += 1
            i += 1
            continue
        c = data[i + 1]
        i += 2
        if c == _U:
            point = hexadecimal(data, i, end)
            if point < 0:
                return -1
            i += 4
            if point >= 0xD800 and point < 0xDC00 and i + 6 <= end and data[i] == _BACKSLASH and data[i + 1] == _U:
                low = hexadecimal(data, i + 2, end)
                if low >= 0xDC00 and low < 0xE000:
                    point = 0x10000 + ((point - 0xD800) << 10) + low - 0xDC00
                    i += 6
            if point >= 0xD800 and point < 0xE000:
                return -1  # half a pair: no UTF-8
            n = encode(point, out, n)
            continue
        if c == _N:
            c = _NEWLINE
        elif c == _T:
            c = 0x09
        elif c == _R:
            c = 0x0D
        elif c == _B:
            c = 0x08
        elif c == _F:
            c = 0x0C
        elif c != _QUOTE and c != _BACKSLASH and c != _SLASH:
            return -1
        out[n] = c
        n += 1
    return n


@inner
def copy_string(data, i, end, has_escape, out, n):
    """As `unescape`, fast where there is nothing to unescape."""
    if has_escape:
        return unescape(data, i, end, out, n)
    for k in range(end - i):
        out[n + k] = data[i + k]
    return n + end - i


@inner
def read_messages(data, words, i, end, wanted, row, index, text, n, turn_start, turn_end, turn_row, turn_index, turn):
    """Take the wanted turns of the list at `i`: (byte behind it or -1, next index, next n, next turn)."""
    if i >= end or data[i] != _OPEN_LIST:
        return -1, index, n, turn
    i = skip_space(data, i + 1, end)
    if i < end and data[i] == _CLOSE_LIST:
        return i + 1, index, n, turn
    while True:
        if i >= end or data[i] != _OPEN_OBJECT:
            return -1, index, n, turn
        i = skip_space(data, i + 1, end)
        role = -1
        begin, stop, has_escape = -1, -1, False
        while True:
            if i >= end or data[i] != _QUOTE:
                return -1, index, n, turn
            key = i + 1
            key_end, key_escape = string_end(data, words, key, end)
            if key_end < 0 or key_escape:
                return -1, index, n, turn
            i = skip_space(data, key_end + 1, end)
            if i >= end or data[i] != _COLON:
                return -1, index, n, turn
            i = skip_space(data, i + 1, end)
            is_role = is_word(data, key, key_end, _ROLE)
            if is_role or is_word(data, key, key_end, _CONTENT):
                if i >= end or data[i] != _QUOTE or (role >= 0 if is_role else begin >= 0):
                    return -1, index, n, turn  # not text, or given twice
                value_end, escaped = string_end(data, words, i + 1, end)
                if value_end < 0:
                    return -1, index, n, turn
                if is_role:
                    if escaped:
                        return -1, index, n, turn
                    role = 0
                    if is_word(data, i + 1, value_end, _USER):
                        role = 2
                    elif is_word(data, i + 1, value_end, _ASSISTANT):
                        role = 4
                    elif is_word(data, i + 1, value_end, _SYSTEM):
                        role = 1
                else:
                    begin, stop, has_escape = i + 1, value_end, escaped
                i = value_end + 1
            else:
                i = skip_value(data, words, i, end)
                if i < 0:
                    return -1, index, n, turn
            i = skip_space(data, i, end)
            if i < end and data[i] == _CLOSE_OBJECT:
                break
            if i >= end or data[i] != _COMMA:
                return -1, index, n, turn
            i = skip_space(data, i + 1, end)
        if role < 0 or begin < 0:
            return -1, index, n, turn
        if role & wanted:
            behind = copy_string(data, begin, stop, has_escape, text, n)
            if behind < 0:
                return -1, index, n, turn
            turn_start[turn], turn_end[turn], turn_row[turn], turn_index[turn] = n, behind, row, index
            n = behind
            turn += 1
        index += 1
        i = skip_space(data, i + 1, end)
        if i < end and data[i] == _CLOSE_LIST:
            return i + 1, index, n, turn
        if i >= end or data[i] != _COMMA:
            return -1, index, n, turn
        i = skip_space(data, i + 1, end)


@kernel
def read_rows(
    data, words, wanted, at, text, turn_start, turn_end, turn_row, turn_index, line_start, line_end, ids, id_end
):
    """Rows of data[at[0]:] in order; False at a row that only `json` can judge, of which nothing is kept.

    `at` is read and moved on: byte, row, turn, bytes of `text`, bytes of `ids`.
    """
    end = len(data)
    i, row, turn, n, num_id_bytes = at[0], at[1], at[2], at[3], at[4]
    while True:
        at[0], at[1], at[2], at[3], at[4] = i, row, turn, n, num_id_bytes
        first = i
        i = skip_space(data, i, end)
        if i >= end:
            at[0] = end
            return True
        if data[i] == _NEWLINE:
            i += 1
            continue
        if data[i] != _OPEN_OBJECT:
            return False
        i = skip_space(data, i + 1, end)
        last_part, index = -1, 0  # parts come as messages, prompt, chosen, rejected, whatever the order in the line
        has_id = False
        while True:
            if i >= end or data[i] != _QUOTE:
                return False
            key = i + 1
            key_end, has_escape = string_end(data, words, key, end)
            if key_end < 0 or has_escape:
                return False
            i = skip_space(data, key_end + 1, end)
            if i >= end or data[i] != _COLON:
                return False
            i = skip_space(data, i + 1, end)
            part = -1
            if is_word(data, key, key_end, _MESSAGES):
                part = 0
            elif is_word(data, key, key_end, _PROMPT):
                part = 1
            elif is_word(data, key, key_end, _CHOSEN):
                part = 2
            elif is_word(data, key, key_end, _REJECTED):
                part = 3
            if part >= 0:
                if part <= last_part:
                    return False
                last_part = part
                i, index, n, turn = read_messages(
                    data, words, i, end, wanted, row, index, text, n, turn_start, turn_end, turn_row, turn_index, turn
                )
            elif is_word(data, key, key_end, _ID):
                if has_id or i >= end or data[i] != _QUOTE:
                    return False
                has_id = True
                value_end, has_escape = string_end(data, words, i + 1, end)
                if value_end < 0:
                    return False
                num_id_bytes = copy_string(data, i + 1, value_end, has_escape, ids, num_id_bytes)
                if num_id_bytes < 0:
                    return False
                i = value_end + 1
            else:
                i = skip_value(data, words, i, end)
            if i < 0:
                return False
            i = skip_space(data, i, end)
            if i < end and data[i] == _CLOSE_OBJECT:
                break
            if i >= end or data[i] != _COMMA:
                return False
            i = skip_space(data, i + 1, end)
        i = skip_space(data, i + 1, end)
        if (i < end and data[i] != _NEWLINE) or not has_id or last_part < 0:
            return False
        i = min(i + 1, end)
        line_start[row], line_end[row], id_end[row + 1] = first, i, num_id_bytes
        row += 1
