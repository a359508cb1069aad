"""Compiled loops of the contamination scan: the phrases in a turn, and what a turn decides.

Hashes and bit filters only propose places: bytes decide.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import numpy as np

from smoltulu.tasks.contamination.kernels.compile import inner, kernel
from smoltulu.tasks.contamination.kernels.layout import ANCHOR_TERMS, FILTER_HEAD, HEAD_TERMS, MAX_TERM_BYTES
from smoltulu.tasks.contamination.kernels.normal import NEEDS_SLOW, normalise_fast, normalise_slow
from smoltulu.tasks.contamination.kernels.text import extend, filter_bits, hash_terms, mix, normalise_and_hash

_SPACE = 32
PIECE = 1_024  # terms hashed at a time: what is at work stays in the cache, however long the turn
_SIX, _ZERO = np.uint64(6), np.uint64(0)

# Sets of phrases that gave no hit: up to so many phrases, so many sets (the latest of each slot), 150 kB in all.
_MEMO_PHRASES, _MEMO_SETS = 8, 4_096


@inner
def bit(phrases, which, key):
    """1 if the key may be in the filter, 0 if it is not."""
    first = np.uint64(phrases.filter_first[which])
    word = phrases.filter_words[first + ((key >> _SIX) & phrases.filter_mask[which])]
    wanted = filter_bits(key)
    return np.uint8(word & wanted == wanted)


@inner
def ask_filters(phrases, hashes, num_here, heads, filters):
    """Which filters let the runs from each term on pass: bit k - 1 those of k terms, bit HEAD_TERMS - 1 the head.

    Without a branch, and in short loops, so that the memory look-ups of many terms overlap.
    """
    for p in range(num_here):
        h = hashes[p]
        for k in range(1, HEAD_TERMS):
            h = extend(h, hashes[p + k])
        heads[p] = h
    for p in range(num_here):
        filters[p] = bit(phrases, FILTER_HEAD, heads[p]) << (HEAD_TERMS - 1)
    for p in range(num_here):
        h = hashes[p]
        may_be = bit(phrases, 1, h)
        h = extend(h, hashes[p + 1])
        may_be |= bit(phrases, 2, h) << 1
        h = extend(h, hashes[p + 2])
        may_be |= bit(phrases, 3, h) << 2
        h = extend(h, hashes[p + 3])
        filters[p] |= may_be | bit(phrases, 4, h) << 3


@inner
def verify(phrases, key, text, n, at, clock, seen, found, num_found):
    """Mark the phrases with this anchor that do stand at byte `at` of the turn; the number of phrases found so far."""
    mask = len(phrases.slots) - 1
    slot = np.int64(key) & mask
    while phrases.slots[slot, 1] != _ZERO:
        is_here = phrases.slots[slot, 0] == key
        phrase = np.int64(phrases.slots[slot, 1]) - 1
        slot = (slot + 1) & mask
        if not is_here or seen[phrase, 0] == clock:
            continue
        first, length = phrases.place[phrase, 0], phrases.place[phrase, 1]
        begin = at - phrases.place[phrase, 2]
        end = begin + length
        if begin < 0 or end > n or (begin > 0 and text[begin - 1] != _SPACE) or (end < n and text[end] != _SPACE):
            continue
        k = 0
        while k < length and text[begin + k] == phrases.text[first + k]:
            k += 1
        if k == length:
            seen[phrase, 0], seen[phrase, 1] = clock, begin
            found[num_found] = phrase
            num_found += 1
    return num_found


@inner
def find(phrases, text, n, num_terms, longest, clock, seen, found, piece):
    """All phrases of a normalised turn into `found`, each once: (their number, bytes of the longest term).

    num_terms, longest  of the first piece, which has its terms
    """
    starts, hashes, heads, filters, positions = piece
    num_found = 0
    while True:
        # The last terms of a piece are taken again as the first of the next one, with all that follows them.
        is_last = num_terms < PIECE + ANCHOR_TERMS
        num_here = num_terms if is_last else PIECE
        if is_last:
            for k in range(num_terms, num_terms + ANCHOR_TERMS):
                hashes[k] = _ZERO  # runs beyond the end: bytes refuse them
        ask_filters(phrases, hashes, num_here, heads, filters)
        num_candidates = 0
        for p in range(num_here):
            positions[num_candidates] = p
            num_candidates += filters[p] != 0
        for c in range(num_candidates):
            p = positions[c]
            may_be = filters[p]
            h = _ZERO
            for k in range(1, ANCHOR_TERMS + 1):
                h = extend(h, hashes[p + k - 1])
                if (may_be >> (k - 1)) & 1 if k < HEAD_TERMS else bit(phrases, k, h):
                    num_found = verify(phrases, h, text, n, np.int64(starts[p]), clock, seen, found, num_found)
                if k == HEAD_TERMS - 1 and not may_be >> k:
                    break
        if is_last:
            break
        num_terms, longest_here = hash_terms(text, np.int64(starts[PIECE]), n, starts, hashes, PIECE + ANCHOR_TERMS)
        longest = max(longest, longest_here)
    return num_found, longest


@inner
def decide_full(postings, phrases, found, num_found, is_best, state, turn, row, hits, scores, num_hits):
    """Instances of which every field is in the turn, looked up by their rarest field; the number of hits so far."""
    clock = state.clock[0]
    for k in range(num_found):
        leader = found[k]
        for j in range(postings.lead_offsets[leader], postings.lead_offsets[leader + 1]):
            instance = postings.lead_instance[j]
            part, last = postings.part_offsets[instance], postings.part_offsets[instance + 1]
            while part < last and state.seen[postings.part_phrase[part], 0] == clock:
                part += 1
            if part < last:
                continue
            begin = state.seen[leader, 1]
            hits[num_hits, 0], hits[num_hits, 1] = turn, instance
            hits[num_hits, 2], hits[num_hits, 3] = begin, begin + phrases.place[leader, 1]
            scores[num_hits] = 1.0
            num_hits += 1
            if is_best and state.best_score[instance] < 1.0:
                state.best_score[instance], state.best_row[instance] = 1.0, row
    return num_hits


@inner
def cover(postings, field, window, state):
    """Tokens of a field under the windows that are in the turn."""
    covered = 0
    last = -window
    for j in range(postings.field_offsets[field], postings.field_offsets[field + 1]):
        if state.seen[postings.field_phrase[j], 0] == state.clock[0]:
            covered += min(window, postings.field_start[j] - last)
            last = postings.field_start[j]
    return covered


@inner
def decide_ngram(
    postings, phrases, found, num_found, window, threshold, state, turn, row, touched, hits, scores, num_hits
):
    """Instances whose fields are covered above the threshold; the number of hits so far. Keeps the best scores, all."""
    clock = np.int32(state.clock[0])
    num_touched = 0
    for k in range(num_found):
        for j in range(postings.window_offsets[found[k]], postings.window_offsets[found[k] + 1]):
            field = postings.window_field[j]
            if state.field_mark[field, 0] == clock:
                state.field_mark[field, 1] += 1
                continue
            state.field_mark[field, 0], state.field_mark[field, 1], state.field_mark[field, 2] = clock, 1, -1
            for u in range(postings.user_offsets[field], postings.user_offsets[field + 1]):
                instance = postings.user_instance[u]
                if state.instance_mark[instance] != clock:
                    state.instance_mark[instance] = clock
                    touched[num_touched] = instance
                    num_touched += 1
    for k in range(num_touched):
        instance = touched[k]
        first, last = postings.part_offsets[instance], postings.part_offsets[instance + 1]
        # What the windows could cover if none overlapped: where that changes nothing, their places need no look.
        bound = 0.0
        for part in range(first, last):
            field = postings.part_field[part]
            if state.field_mark[field, 0] == clock:
                tokens = postings.field_tokens[field]
                bound += min(tokens, window * state.field_mark[field, 1]) / tokens
        bound /= last - first
        if bound <= threshold and bound <= state.best_score[instance]:
            continue
        score = 0.0
        for part in range(first, last):
            field = postings.part_field[part]
            if state.field_mark[field, 0] == clock:
                if state.field_mark[field, 2] < 0:
                    state.field_mark[field, 2] = cover(postings, field, window, state)
                score += state.field_mark[field, 2] / postings.field_tokens[field]
        score /= last - first
        if score > state.best_score[instance]:
            state.best_score[instance], state.best_row[instance] = score, row
        if score <= threshold:
            continue
        begin, end = np.int64(0x7FFFFFFF), np.int64(0)
        for part in range(first, last):
            field = postings.part_field[part]
            for j in range(postings.field_offsets[field], postings.field_offsets[field + 1]):
                phrase = postings.field_phrase[j]
                if state.seen[phrase, 0] == clock:
                    at = np.int64(state.seen[phrase, 1])
                    begin = min(begin, at)
                    end = max(end, at + phrases.place[phrase, 1])
        hits[num_hits, 0], hits[num_hits, 1], hits[num_hits, 2], hits[num_hits, 3] = turn, instance, begin, end
        scores[num_hits] = score
        num_hits += 1
    return num_hits


@inner
def memo_slot(found, num_found):
    """Sort the phrases, so that their order in the turn does not matter, and say where their set is remembered."""
    key = _ZERO
    for k in range(num_found):
        phrase, j = found[k], k
        while j > 0 and found[j - 1] > phrase:
            found[j] = found[j - 1]
            j -= 1
        found[j] = phrase
    for k in range(num_found):
        key = extend(key, np.uint64(found[k]))
    return np.int64(mix(key) & np.uint64(_MEMO_SETS - 1))


@inner
def is_remembered(memo, slot, found, num_found):
    """Whether these phrases, in full, are the set in the slot."""
    k = 0
    while k < num_found and memo[slot, k] == found[k]:
        k += 1
    return k == num_found and memo[slot, _MEMO_PHRASES] == num_found


@inner
def remember(memo, slot, found, num_found):
    """Put this set in the slot, in place of the one that is there."""
    memo[slot, :num_found] = found[:num_found]
    memo[slot, _MEMO_PHRASES] = num_found


@kernel
def scan(
    source, turn_start, turn_end, turn_row, first_turn, phrases, full, ngram, window, threshold, state, lower_bytes,
    lower_points, normal, ascii_kinds, ascii_to, max_hits,
):  # fmt: skip
    """Turns source[turn_start:turn_end] from `first_turn` on, to the end or to a new row above `max_hits` hits.

    Args: `window` 0 means full mode, or normalised mode where `normal` has tables. Returns (next turn; hits: turn,
    instance, first and last normalised byte of the match; their scores; turns with a term above MAX_TERM_BYTES). The
    next turn is -1 - turn where it is not UTF-8.
    """
    num_turns = len(turn_start)
    num_instances = len(state.best_score)
    room = 0
    for turn in range(first_turn, num_turns):
        room = max(room, turn_end[turn] - turn_start[turn])
    is_normal = len(normal.kind) > 0
    limit = PIECE + ANCHOR_TERMS
    text = np.empty(2 * room + 128 if is_normal else room + room // 2 + 8, np.uint8)
    points, begins, at = np.empty(1, np.int32), np.empty(1, np.int32), np.empty(1, np.int32)
    piece = (
        np.empty(PIECE + ANCHOR_TERMS + 1, np.uint32),  # first byte of each term; a block has less than 2 GiB
        np.empty(PIECE + 2 * ANCHOR_TERMS, np.uint64),  # its hash
        np.empty(PIECE + ANCHOR_TERMS, np.uint64),  # hash of its head: the run of HEAD_TERMS from it on
        np.empty(PIECE + ANCHOR_TERMS, np.uint8),  # which filters let it pass: a bit each
        np.empty(PIECE + ANCHOR_TERMS, np.int64),  # terms that some filter lets pass
    )
    found = np.empty(len(state.seen), np.int32)
    touched = np.empty(num_instances, np.int32)
    hits = np.empty((1_024, 4), np.int64)
    scores = np.empty(1_024, np.float64)
    oversized = np.empty(num_turns - first_turn, np.int64)
    memo = np.zeros((_MEMO_SETS, _MEMO_PHRASES + 1), np.int32)  # phrases in order, and their number; 0: free
    num_hits = num_oversized = 0
    next_turn = num_turns
    for turn in range(first_turn, num_turns):
        if num_hits >= max_hits and turn_row[turn] != turn_row[turn - 1]:
            next_turn = turn
            break
        start, end = turn_start[turn], turn_end[turn]
        if is_normal:
            n = normalise_fast(source, start, end, text, at, 0, normal, ascii_kinds, ascii_to)
            if n == NEEDS_SLOW:
                n, points, begins, text, at = normalise_slow(source, start, end, True, points, begins, text, at, normal)
            num_terms, longest = hash_terms(text, 0, max(n, 0), piece[0], piece[1], limit)
        else:
            n, num_terms, longest = normalise_and_hash(
                source, start, end, text, piece[0], piece[1], limit, lower_bytes, lower_points
            )
        if n < 0:
            next_turn = -1 - turn
            break
        state.clock[0] += 1
        num_found, longest = find(
            phrases, text, n, num_terms, longest, np.int32(state.clock[0]), state.seen, found, piece
        )
        if longest > MAX_TERM_BYTES:
            oversized[num_oversized] = turn
            num_oversized += 1
        if num_found == 0:
            continue
        if num_hits + 2 * num_instances > len(scores):
            room = 2 * (len(scores) + num_instances)
            wider, longer = np.empty((room, 4), np.int64), np.empty(room, np.float64)
            wider[:num_hits], longer[:num_hits] = hits[:num_hits], scores[:num_hits]
            hits, scores = wider, longer
        row = turn_row[turn]
        if window == 0:
            num_hits = decide_full(
                full, phrases, found, num_found, not is_normal, state, turn, row, hits, scores, num_hits
            )
            continue
        if len(full.lead_offsets) > 1:  # instances too short for a window; the caller decides which of them count
            num_hits = decide_full(full, phrases, found, num_found, False, state, turn, row, hits, scores, num_hits)
        # Scores depend on which phrases are in a turn, not on where; places are those of hits only. So a set that gave
        # none gives none again, and the best scores that it gave stand, with the earlier row: a phrase that hundreds of
        # instances share (headers, instructions) costs once, not in every row.
        slot = memo_slot(found, num_found) if num_found <= _MEMO_PHRASES else -1
        if slot >= 0 and is_remembered(memo, slot, found, num_found):
            continue
        num_hits_before = num_hits
        num_hits = decide_ngram(
            ngram, phrases, found, num_found, window, threshold, state, turn, row, touched, hits, scores, num_hits
        )  # fmt: skip
        if slot >= 0 and num_hits == num_hits_before:
            remember(memo, slot, found, num_found)
    return next_turn, hits[:num_hits].copy(), scores[:num_hits].copy(), oversized[:num_oversized].copy()
