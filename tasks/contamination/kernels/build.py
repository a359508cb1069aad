"""Compiled loops that make an index: fields to terms, windows to phrases, phrases to anchors, tables and filters."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import numpy as np

from smoltulu.tasks.contamination.kernels.compile import inner, kernel
from smoltulu.tasks.contamination.kernels.layout import ANCHOR_TERMS, HEAD_TERMS
from smoltulu.tasks.contamination.kernels.text import extend, filter_bits, hash_bytes, hash_terms, normalise

_SPACE = 32
_SIX = np.uint64(6)


@kernel
def normalise_all(source, offsets, lower_bytes, lower_points):
    """Normalised texts as (bytes, offsets, number of terms of each)."""
    num_texts = len(offsets) - 1
    text = np.empty(len(source) + len(source) // 2 + 8, np.uint8)
    text_offsets = np.zeros(num_texts + 1, np.int64)
    num_terms = np.zeros(num_texts, np.int32)
    n = 0
    for k in range(num_texts):
        length = normalise(source, offsets[k], offsets[k + 1], text[n:], 0, lower_bytes, lower_points)
        for i in range(n, n + length):
            num_terms[k] += text[i] == _SPACE
        num_terms[k] += length > 0
        n += length
        text_offsets[k + 1] = n
    return text[:n].copy(), text_offsets, num_terms


@inner
def same_bytes(a, i, b, j, length):
    """Whether a[i:i + length] equals b[j:j + length]."""
    for k in range(length):  # noqa: SIM110
        if a[i + k] != b[j + k]:
            return False
    return True


@kernel
def window_phrases(source, bounds, num_tokens, n, lower_bytes, lower_points):
    """Windows of `n` tokens whose text has terms: (phrases: bytes, offsets; windows: field, first token, phrase).

    Of windows with the same source text in a field only the last is kept. Windows come by field and first token.
    """
    num_windows = 0
    most = 0
    longest = 0
    token = 0
    for field in range(len(num_tokens)):
        here = max(0, num_tokens[field] - n + 1)
        num_windows += here
        most = max(most, here)
        for first in range(token, token + here):
            longest = max(longest, bounds[first + n - 1, 1] - bounds[first, 0])
        token += num_tokens[field]

    of_field = np.empty(num_windows, np.int32)
    of_start = np.empty(num_windows, np.int32)
    of_phrase = np.empty(num_windows, np.int32)
    num_kept = 0
    # Span texts of the field at work: first token of the window that holds the slot, marked by field.
    spans = 4
    while spans < 2 * most:
        spans *= 2
    span_field, span_first = np.full(spans, -1, np.int64), np.empty(spans, np.int64)
    # Phrases met so far.
    slots = 4
    while slots < 2 * num_windows:
        slots *= 2
    slot_key, slot_phrase = np.empty(slots, np.uint64), np.full(slots, -1, np.int32)
    offsets = np.zeros(num_windows + 1, np.int64)
    text = np.empty(1 << 16, np.uint8)
    scratch = np.empty(longest + longest // 2 + 8, np.uint8)
    num_phrases = 0
    token = 0
    for field in range(len(num_tokens)):
        first_kept = num_kept
        for start in range(num_tokens[field] - n, -1, -1):
            begin, end = bounds[token + start, 0], bounds[token + start + n - 1, 1]
            slot = np.int64(hash_bytes(source, begin, end) & np.uint64(spans - 1))
            is_known = False
            while span_field[slot] == field and not is_known:
                other = span_first[slot]
                is_known = bounds[other + n - 1, 1] - bounds[other, 0] == end - begin and same_bytes(
                    source, bounds[other, 0], source, begin, end - begin
                )
                slot = (slot + 1) & (spans - 1)
            if is_known:
                continue
            span_field[slot], span_first[slot] = field, token + start
            length = normalise(source, begin, end, scratch, 0, lower_bytes, lower_points)
            if length == 0:
                continue
            key = hash_bytes(scratch, 0, length)
            slot = np.int64(key & np.uint64(slots - 1))
            while slot_phrase[slot] >= 0:
                phrase = slot_phrase[slot]
                if (
                    slot_key[slot] == key
                    and offsets[phrase + 1] - offsets[phrase] == length
                    and same_bytes(text, offsets[phrase], scratch, 0, length)
                ):
                    break
                slot = (slot + 1) & (slots - 1)
            if slot_phrase[slot] < 0:
                slot_key[slot], slot_phrase[slot] = key, num_phrases
                at = offsets[num_phrases]
                if at + length > len(text):
                    wider = np.empty(2 * (at + length), np.uint8)
                    wider[:at] = text[:at]
                    text = wider
                text[at : at + length] = scratch[:length]
                num_phrases += 1
                offsets[num_phrases] = at + length
            of_field[num_kept], of_start[num_kept], of_phrase[num_kept] = field, start, slot_phrase[slot]
            num_kept += 1
        of_start[first_kept:num_kept] = of_start[first_kept:num_kept][::-1].copy()
        of_phrase[first_kept:num_kept] = of_phrase[first_kept:num_kept][::-1].copy()
        token += num_tokens[field]
    return (
        text[: offsets[num_phrases]].copy(),
        offsets[: num_phrases + 1].copy(),
        of_field[:num_kept].copy(),
        of_start[:num_kept].copy(),
        of_phrase[:num_kept].copy(),
    )


@kernel
def run_hashes(text, offsets):
    """Candidates for the anchor of each phrase: the whole of it, or every run of 8 terms of a longer one.

    Returns (offsets by phrase; per run: hash, hash of its first HEAD_TERMS terms, number of terms, first byte).
    """
    num_phrases = len(offsets) - 1
    run_offsets = np.zeros(num_phrases + 1, np.int64)
    most = 0
    for phrase in range(num_phrases):
        num_terms = 1
        for i in range(offsets[phrase], offsets[phrase + 1]):
            num_terms += text[i] == _SPACE
        most = max(most, num_terms)
        run_offsets[phrase + 1] = run_offsets[phrase] + max(1, num_terms - ANCHOR_TERMS + 1)
    num_runs = run_offsets[num_phrases]
    keys, heads = np.zeros(num_runs, np.uint64), np.zeros(num_runs, np.uint64)
    lengths, first_byte = np.zeros(num_runs, np.int32), np.zeros(num_runs, np.int64)
    starts, hashes = np.empty(most + 1, np.int64), np.empty(most, np.uint64)
    run = 0
    for phrase in range(num_phrases):
        num_terms, _ = hash_terms(text, offsets[phrase], offsets[phrase + 1], starts, hashes, most)
        length = min(num_terms, ANCHOR_TERMS)
        for first in range(num_terms - length + 1):
            h = np.uint64(0)
            for k in range(1, length + 1):
                h = extend(h, hashes[first + k - 1])
                if k == HEAD_TERMS:
                    heads[run] = h
            keys[run] = h
            lengths[run], first_byte[run] = length, starts[first] - offsets[phrase]
            run += 1
    return run_offsets, keys, heads, lengths, first_byte


@kernel
def fill_filter(words, first, mask, keys):
    """Set the bits of the keys in the filter that begins at `first`."""
    for key in keys:
        words[first + np.int64((key >> _SIX) & mask)] |= filter_bits(key)


@kernel
def fill_slots(keys, num_slots):
    """Open-addressing table: (hash, number of the phrase + 1) per slot. Phrases may share a hash."""
    slots = np.zeros((num_slots, 2), np.uint64)
    for phrase in range(len(keys)):
        slot = np.int64(keys[phrase]) & (num_slots - 1)
        while slots[slot, 1] != 0:
            slot = (slot + 1) & (num_slots - 1)
        slots[slot, 0], slots[slot, 1] = keys[phrase], phrase + 1
    return slots
