"""Arrays of a contamination index, and of a scan over one: the layout that index builder and kernels share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

#: Phrases are looked up by an anchor: a run of so many of their terms, or all of them where there are fewer.
ANCHOR_TERMS = 8

#: Filters of an index: one per anchor length (1 to 8), and one of the first terms of the anchors with so many or more.
HEAD_TERMS = 5
FILTER_HEAD = ANCHOR_TERMS + 1
NUM_FILTERS = ANCHOR_TERMS + 2

#: Lucene, which the reference uses, refuses terms above so many UTF-8 bytes.
MAX_TERM_BYTES = 32_766


class Phrases(NamedTuple):
    """Distinct phrases with the tables that find them."""

    text: np.ndarray  # uint8: normalised bytes of all phrases
    place: np.ndarray  # int64[phrases, 3]: its first byte in the text, its bytes, those of them before its anchor
    filter_words: np.ndarray  # uint64: bits of all filters
    filter_first: np.ndarray  # int64: where each filter begins
    filter_mask: np.ndarray  # uint64: number of words of each filter - 1; no filter: one empty word
    slots: np.ndarray  # uint64[slots, 2]: open addressing; hash of an anchor, number of its phrase + 1 (0: free)


class FullPostings(NamedTuple):
    """Instances by their rarest field, and all their fields."""

    lead_offsets: np.ndarray  # int32: instances led by a phrase
    lead_instance: np.ndarray  # int32
    part_offsets: np.ndarray  # int32: distinct phrases of an instance
    part_phrase: np.ndarray  # int32


class NgramPostings(NamedTuple):
    """Windows of fields by phrase and by field, fields by instance and instances by field."""

    window_offsets: np.ndarray  # int32: windows of a phrase
    window_field: np.ndarray  # int32
    field_offsets: np.ndarray  # int32: windows of a field, by first token
    field_start: np.ndarray  # int32: first token
    field_phrase: np.ndarray  # int32
    field_tokens: np.ndarray  # int32: number of tokens of a field
    user_offsets: np.ndarray  # int32: distinct instances of a field
    user_instance: np.ndarray  # int32
    part_offsets: np.ndarray  # int32: fields of an instance, in order, repeated ones repeated
    part_field: np.ndarray  # int32


class State(NamedTuple):
    """What a thread keeps between blocks. Marks hold the number of the turn that set them, so none is ever cleared."""

    clock: np.ndarray  # int64[1]: turns seen
    seen: np.ndarray  # int32[phrases, 2]: mark, byte of the first occurrence in the turn
    field_mark: np.ndarray  # int32[fields, 3]: mark, number of matched windows, covered tokens (-1: not yet counted)
    instance_mark: np.ndarray  # int32[instances]
    best_score: np.ndarray  # float64[instances]
    best_row: np.ndarray  # int64[instances]: first row of the best score, -1 for none


# The mode `normalised`.

#: Kinds of a code point: what it does to the terms.
GAP, LETTER, DIGIT, SINGLE, DROP, ZERO_WIDTH, SEQUENCE = range(7)
#: Code points in the tables; above them Han by character to the last one below, tags dropped, all else a gap.
NUM_POINTS = 0x30000
LAST_HAN = 0x323AF
#: What a name in the table of names is: category of its hash.
ENTITY, TAG, NAMED_ESCAPE, MARKUP = range(1, 5)


class NormalTables(NamedTuple):
    """What each code point and each name becomes. Of no length where the index is of another mode."""

    kind: np.ndarray  # uint8 by code point
    to: np.ndarray  # int32 by code point: the folded one, or where its sequence begins
    sequences: np.ndarray  # int32: number of points, then (kind, point) of each
    keys: np.ndarray  # uint64: hashes of names
    values: np.ndarray  # int64: what a name is, -1: free
