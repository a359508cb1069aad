"""Compiled loops over text: UTF-8 to terms, and hashes of terms.

A turn is normalised into its terms, lower-cased and joined by one space. A term holds no space, so a phrase occurs in a
turn exactly where its own normalised bytes stand between spaces or ends.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import unicodedata

import numpy as np

from smoltulu.tasks.contamination.kernels.compile import inner, kernel

_SPACE, _LINE_FEED, _RETURN = 32, 10, 13
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)
_NONE, _ONE = np.uint64(0), np.uint64(1)
_LOW_SIX, _TOP_SIX = np.uint64(63), np.uint64(58)

_NUM_TABLED = 0x20000  # no code point above has another lower case (tested for all of Unicode)
_SEPARATORS = ' ,.?!:;()"-\n\\'


def _lower_code_points() -> np.ndarray:
    # Java lower-cases per code point: İ gives i, and Σ gives σ at the end of a word too.
    special = {0x130: ord("i"), 0x3A3: 0x3C3}
    return np.array([special.get(point) or ord(chr(point).lower()) for point in range(_NUM_TABLED)], dtype=np.int32)


def _lower_bytes() -> np.ndarray:
    table = np.arange(256, dtype=np.uint8)
    table[ord("A") : ord("Z") + 1] += 32
    table[[ord(separator) for separator in _SEPARATORS]] = _SPACE
    return table


LOWER_CODE_POINTS, LOWER_BYTES = _lower_code_points(), _lower_bytes()
#: Letters, digits and marks; above the table all are letters (Han).
IS_WORD = np.array([unicodedata.category(chr(point))[0] in "LNM" for point in range(_NUM_TABLED)])


@inner
def decode(source, i, end):
    """(code point, bytes) of the non-ASCII character at `i`, (-1, 0) for what is not UTF-8."""
    b = source[i]
    if b >= 0xC2 and b < 0xE0:
        size, point = 2, np.int64(b & 0x1F)
    elif b >= 0xE0 and b < 0xF0:
        size, point = 3, np.int64(b & 0x0F)
    elif b >= 0xF0 and b < 0xF5:
        size, point = 4, np.int64(b & 0x07)
    else:
        return np.int64(-1), 0
    if i + size > end:
        return np.int64(-1), 0
    for k in range(1, size):
        if source[i + k] & 0xC0 != 0x80:
            return np.int64(-1), 0
        point = (point << 6) | np.int64(source[i + k] & 0x3F)
    if size == 3 and (point < 0x800 or (point >= 0xD800 and point < 0xE000)):
        return np.int64(-1), 0
    if size == 4 and (point < 0x10000 or point > 0x10FFFF):
        return np.int64(-1), 0
    return point, size


@inner
def encode(point, out, n):
    """Write a code point as UTF-8 at out[n:]; where the next byte goes."""
    if point < 0x80:
        out[n] = point
        return n + 1
    if point < 0x800:
        out[n], out[n + 1] = 0xC0 | (point >> 6), 0x80 | (point & 0x3F)
        return n + 2
    if point < 0x10000:
        out[n], out[n + 1], out[n + 2] = 0xE0 | (point >> 12), 0x80 | ((point >> 6) & 0x3F), 0x80 | (point & 0x3F)
        return n + 3
    out[n], out[n + 1] = 0xF0 | (point >> 18), 0x80 | ((point >> 12) & 0x3F)
    out[n + 2], out[n + 3] = 0x80 | ((point >> 6) & 0x3F), 0x80 | (point & 0x3F)
    return n + 4


@inner
def normalise(source, start, end, out, n, lower_bytes, lower_points):
    """Terms of source[start:end] into `out`, joined by one space, behind its `n` bytes; their end, or -1 if not UTF-8.

    `out` has at least 1.5 times the bytes: lower-casing can turn two bytes into three. What stands there already ends
    with a space.
    """
    after_space = True
    i = start
    while i < end:
        b = source[i]
        if b < 0x80:
            c = lower_bytes[b]
            is_space = c == _SPACE
            out[n] = c
            n += not (is_space and after_space)
            after_space = is_space
            i += 1
        else:
            point, size = decode(source, i, end)
            if point < 0:
                return -1
            n = encode(np.int64(lower_points[point]) if point < _NUM_TABLED else point, out, n)
            after_space = False
            i += size
    if after_space and n > 0:
        n -= 1
    return n


@inner
def locate(source, start, end, wanted, order, from_source, to_source, lower_bytes, lower_points, scratch):
    """Where the characters that hold the normalised bytes `wanted` (visited by `order`) begin and end in the source."""
    n = 0
    after_space = True
    i = start
    k = 0
    while i < end and k < len(order):
        b = source[i]
        before, size = n, 1
        if b < 0x80:
            is_space = lower_bytes[b] == _SPACE
            n += not (is_space and after_space)
            after_space = is_space
        else:
            point, size = decode(source, i, end)
            n += encode(np.int64(lower_points[point]) if point < _NUM_TABLED else point, scratch, 0)
            after_space = False
        while k < len(order) and wanted[order[k]] < n:
            if wanted[order[k]] >= before:
                from_source[order[k]], to_source[order[k]] = i, i + size
            k += 1
        i += size


@inner
def mix(h):
    """Spread every bit over all others (the finaliser of MurmurHash3)."""
    h ^= h >> _SHIFT
    h *= _MIX_1
    h ^= h >> _SHIFT
    h *= _MIX_2
    return h ^ (h >> _SHIFT)


@inner
def hash_bytes(text, start, end):
    """Hash of text[start:end]."""
    h = _FNV_OFFSET
    for i in range(start, end):
        h = (h ^ np.uint64(text[i])) * _FNV_PRIME
    return mix(h)


@inner
def normalise_and_hash(source, start, end, out, starts, hashes, limit, lower_bytes, lower_points):
    """`normalise`, with begin and hash of the first `limit` terms as from `hash_terms`, in one go over the bytes.

    (bytes of `out` or -1 if not UTF-8, number of terms, longest in bytes). `starts` needs room for one more.
    """
    # Unsigned, as a signed index could count from the end, which costs a look at each.
    n, num_terms, i = _NONE, _NONE, np.uint64(start)
    h, after_space = _FNV_OFFSET, _ONE
    starts[0] = 0
    while i < np.uint64(end) and num_terms < np.uint64(limit):
        b = source[i]
        if b < 0x80:
            # No branch, as none could be foretold: what is written for a term stands when its space comes.
            c = lower_bytes[b]
            is_space = np.uint64(c == _SPACE)
            out[n] = c
            hashes[num_terms] = h
            starts[num_terms + _ONE] = n + _ONE
            h = _FNV_OFFSET if is_space else (h ^ np.uint64(c)) * _FNV_PRIME
            num_terms += is_space & (after_space ^ _ONE)
            n += (is_space & after_space) ^ _ONE
            after_space = is_space
            i += _ONE
        else:
            point, size = decode(source, np.int64(i), end)
            if point < 0:
                return -1, 0, 0
            behind = encode(np.int64(lower_points[point]) if point < _NUM_TABLED else point, out, np.int64(n))
            for k in range(np.int64(n), behind):
                h = (h ^ np.uint64(out[k])) * _FNV_PRIME
            n, after_space = np.uint64(behind), _NONE
            i += np.uint64(size)
    if not after_space:  # the last term of the text has no space behind it
        hashes[num_terms] = h
        num_terms += _ONE
        starts[num_terms] = n + _ONE
    length = np.int64(n) - np.int64(after_space and n > 0)
    if np.int64(i) < end:
        length = normalise(source, np.int64(i), end, out, np.int64(n), lower_bytes, lower_points)
    return length, np.int64(num_terms), spread(starts, hashes, np.int64(num_terms))


@inner
def hash_terms(text, start, end, starts, hashes, limit):
    """Begin and hash of up to `limit` terms of normalised text[start:end]: (their number, longest in bytes).

    `starts` needs room for one more.
    """
    num_terms, i = _NONE, np.uint64(start)
    h = _FNV_OFFSET
    starts[0] = start
    while i < np.uint64(end) and num_terms < np.uint64(limit):
        byte = text[i]
        i += _ONE
        is_end = np.uint64(byte == _SPACE)
        hashes[num_terms] = h
        starts[num_terms + _ONE] = i
        h = _FNV_OFFSET if is_end else (h ^ np.uint64(byte)) * _FNV_PRIME
        num_terms += is_end
    if start < end and num_terms < np.uint64(limit):
        hashes[num_terms] = h
        num_terms += _ONE
        starts[num_terms] = end + 1
    return np.int64(num_terms), spread(starts, hashes, np.int64(num_terms))


@inner
def spread(starts, hashes, num_terms):
    """Mix the hashes of terms; bytes of the longest."""
    longest = np.int64(0)
    for k in range(num_terms):
        hashes[k] = mix(hashes[k])
        longest = max(longest, np.int64(starts[k + 1]) - 1 - np.int64(starts[k]))
    return longest


@inner
def extend(h, term):
    """Hash of a run of terms, made longer by one; that of none is 0."""
    return h * _MULTIPLIER + term


@inner
def filter_bits(key):
    """The two bits, of one word, that a filter has for a hash; the word comes from the bits between."""
    return (_ONE << (key & _LOW_SIX)) | (_ONE << (key >> _TOP_SIX))


@kernel
def gather_texts(source, begins, ends, max_characters):
    """Slices of the source, cut after `max_characters` (the last one then is "…"), as (bytes, offsets)."""
    room = 0
    for k in range(len(begins)):
        room += min(ends[k] - begins[k], 4 * max_characters) + 3
    out = np.empty(room, np.uint8)
    offsets = np.zeros(len(begins) + 1, np.int64)
    n = 0
    for k in range(len(begins)):
        characters = 0
        before_last = n
        for i in range(begins[k], ends[k]):
            if source[i] & 0xC0 != 0x80:
                characters += 1
                if characters > max_characters:
                    n = before_last
                    out[n], out[n + 1], out[n + 2] = 0xE2, 0x80, 0xA6
                    n += 3
                    break
                if characters == max_characters:
                    before_last = n
            out[n] = source[i]
            n += 1
        offsets[k + 1] = n
    return out[:n], offsets


@kernel
def locate_hits(source, turn_start, turn_end, hits, lower_bytes, lower_points):
    """Source bytes (first, behind the last) of the normalised matches hits[:, 2:4]; their turns hits[:, 0] ascend."""
    num_hits = len(hits)
    begins, ends = np.empty(num_hits, np.int64), np.empty(num_hits, np.int64)
    scratch = np.empty(8, np.uint8)
    first = 0
    while first < num_hits:
        turn = hits[first, 0]
        last = first
        while last < num_hits and hits[last, 0] == turn:
            last += 1
        num_here = last - first
        wanted = np.empty(2 * num_here, np.int64)
        wanted[:num_here], wanted[num_here:] = hits[first:last, 2], hits[first:last, 3] - 1
        from_source, to_source = np.empty(2 * num_here, np.int64), np.empty(2 * num_here, np.int64)
        locate(
            source, turn_start[turn], turn_end[turn], wanted, np.argsort(wanted), from_source, to_source, lower_bytes,
            lower_points, scratch,
        )  # fmt: skip
        begins[first:last], ends[first:last] = from_source[:num_here], to_source[num_here:]
        first = last
    return begins, ends


@inner
def is_line_end(byte):
    """Line feed or return."""
    return byte in (_LINE_FEED, _RETURN)


@kernel
def lines_of(source, turn_start, turn_end, turns):
    """Lines of these turns, without what ends them: (first byte, byte behind the last, turn)."""
    num_lines = len(turns)
    for k in range(len(turns)):
        for i in range(turn_start[turns[k]], turn_end[turns[k]]):
            num_lines += is_line_end(source[i])
    starts, ends, of_turn = np.empty(num_lines, np.int64), np.empty(num_lines, np.int64), np.empty(num_lines, np.int64)
    n = 0
    for k in range(len(turns)):
        begin = turn_start[turns[k]]
        for i in range(begin, turn_end[turns[k]]):
            if is_line_end(source[i]):
                starts[n], ends[n], of_turn[n] = begin, i, turns[k]
                n += 1
                begin = i + 1
        starts[n], ends[n], of_turn[n] = begin, turn_end[turns[k]], turns[k]
        n += 1
    return starts, ends, of_turn


@inner
def word_bytes(source, i, end, is_word):
    """Bytes of the character that begins at `i`, 0 if it is no letter, digit or mark, or if none begins there."""
    byte = source[i]
    if byte < 0x80:
        return np.int64(is_word[byte])
    if byte & 0xC0 == 0x80:
        return np.int64(0)
    point, size = decode(source, i, end)
    return np.int64(size) if point >= _NUM_TABLED or is_word[point] else np.int64(0)


@kernel
def are_most_of_their_lines(source, turn_start, turn_end, turns, begins, ends, is_word):
    """Whether source[begins:ends] has more than half of the letters and digits of the lines that it touches, in bytes.

    Looks no further than it takes to know, nor over more other bytes than eight times its own and 256.
    """
    out = np.zeros(len(turns), np.bool_)
    for k in range(len(turns)):
        inside = 0
        for i in range(begins[k], ends[k]):
            inside += word_bytes(source, i, turn_end[turns[k]], is_word)
        left = 8 * (ends[k] - begins[k]) + 256
        outside = 0
        i = begins[k] - 1
        while i >= turn_start[turns[k]] and not is_line_end(source[i]) and outside < inside and left > 0:
            outside += word_bytes(source, i, turn_end[turns[k]], is_word)
            i -= 1
            left -= 1
        i = ends[k]
        while i < turn_end[turns[k]] and not is_line_end(source[i]) and outside < inside and left > 0:
            outside += word_bytes(source, i, turn_end[turns[k]], is_word)
            i += 1
            left -= 1
        out[k] = outside < inside and left > 0
    return out


@kernel
def stand_as_in_full(source, turn_start, turn_end, places, begins, ends, full, phrases, lower_bytes, lower_points):
    """Whether source[begins:ends] is the one field of the place's instance as full mode has it, between separators."""
    out = np.zeros(len(places), np.bool_)
    scratch = np.empty(64, np.uint8)
    for k in range(len(places)):
        turn, instance = places[k, 0], places[k, 1]
        first = full.part_offsets[instance]
        if full.part_offsets[instance + 1] != first + 1:
            continue
        phrase = full.part_phrase[first]
        begin, end = begins[k], ends[k]
        if begin > turn_start[turn] and lower_bytes[source[begin - 1]] != _SPACE:
            continue
        if end < turn_end[turn] and lower_bytes[source[end]] != _SPACE:
            continue
        if len(scratch) < 2 * (end - begin) + 8:
            scratch = np.empty(4 * (end - begin) + 8, np.uint8)
        n = normalise(source, begin, end, scratch, 0, lower_bytes, lower_points)
        at, length = phrases.place[phrase, 0], phrases.place[phrase, 1]
        i = 0
        while n == length and i < n and scratch[i] == phrases.text[at + i]:
            i += 1
        out[k] = n == length and i == n
    return out
