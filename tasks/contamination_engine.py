"""Exact matching of benchmark instances against user turns, in the two modes of open-instruct's search.py.

Pure Python, no approximation and no cap on hits. The small benchmark side is indexed once, the training side is
streamed turn by turn. Term = output of `analyze`; token = of spaCy's English tokenizer; turn = one user message;
instance = the query fields of one benchmark row. Rules: docs/contamination.md.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

Terms = tuple[str, ...]
Tokenizer = Callable[[str], list[tuple[int, int]]]  # text -> (start, end) of each token, characters

#: Separators of the index analyzer. Tab, apostrophe, "_", "$", all non-ASCII punctuation and more are not among them.
_TERM = re.compile(r"[^ ,.?!:;()\"\-\n\\]+")

#: Phrases are found by their first so many terms, then compared in full.
_ANCHOR_TERMS = 8


def lower(text: str) -> str:
    """Lower case as Java does it, per code point: two code points differ from Python (İ grows, final Σ is ς)."""
    return text.replace("\u0130", "i").replace("\u03a3", "\u03c3").lower()


def analyze(text: str) -> list[str]:
    """The terms of `text`: split at separators, lower-cased, no stop words; empty pieces leave no gap."""
    return _TERM.findall(lower(text))


@dataclass(frozen=True)
class Hit:
    """One instance found in one turn."""

    instance: int
    score: float  # 1.0 in full mode, mean coverage of the fields in n-gram mode
    start: int  # terms of the turn: from here
    end: int  # up to, not including: the found phrase (full), or first to last matched window (n-gram)


class Matcher(Protocol):
    """What both modes offer to the stage."""

    num_terms: list[int]  # per instance, over its fields
    unmatchable: list[bool]  # per instance: no text at all can make it contaminated

    def hits(self, text: str) -> list[Hit]:
        """Contaminated instances of one turn, each once, by instance."""
        ...


class PhraseIndex:
    """Finds every occurrence of a set of distinct, non-empty phrases in a list of terms."""

    def __init__(self, phrases: Sequence[Terms]) -> None:
        self._phrases = phrases
        self._anchors: dict[Terms, list[int]] = defaultdict(list)
        # First three terms -> bit per anchor length (3..8) that starts so: one look-up rejects most positions.
        self._heads: dict[Terms, int] = defaultdict(int)
        for number, phrase in enumerate(phrases):
            assert phrase, number
            anchor = phrase[:_ANCHOR_TERMS]
            self._anchors[anchor].append(number)
            if len(anchor) >= 3:
                self._heads[anchor[:3]] |= 1 << len(anchor)
        self._lengths = {
            mask: [length for length in range(3, _ANCHOR_TERMS + 1) if mask >> length & 1]
            for mask in set(self._heads.values())
        }

    def find(self, terms: list[str]) -> Iterator[tuple[int, int]]:
        """(phrase number, position of its first term) of every occurrence."""
        anchors, heads, phrases = self._anchors, self._heads, self._phrases
        for length, starts in ((1, zip(terms, strict=True)), (2, pairwise(terms))):
            for position, start in enumerate(starts):
                if start in anchors:
                    assert length == len(start)
                    for number in anchors[start]:
                        yield number, position
        for position, head in enumerate(zip(terms, terms[1:], terms[2:], strict=False)):
            if head not in heads:
                continue
            for length in self._lengths[heads[head]]:
                anchor = tuple(terms[position : position + length])
                if len(anchor) == length and anchor in anchors:
                    for number in anchors[anchor]:
                        phrase = phrases[number]
                        if len(phrase) == length or tuple(terms[position : position + len(phrase)]) == phrase:
                            yield number, position


class FullMatcher:
    """Hit: ONE turn contains EVERY field of the instance as a run of consecutive equal terms.

    A field without terms never matches, so its instance never does.
    """

    def __init__(self, instances: Sequence[tuple[str, ...]]) -> None:
        fields = [[tuple(analyze(field)) for field in instance] for instance in instances]
        self.num_terms = [sum(map(len, phrases)) for phrases in fields]
        self.unmatchable = [not all(phrases) for phrases in fields]
        frequency = Counter(phrase for phrases in fields for phrase in set(phrases))
        # Look for the rarest field of each instance (then the longest); the others only where that one is found.
        self._others: list[list[str]] = []
        self._instances_of: dict[Terms, list[int]] = defaultdict(list)
        for number, phrases in enumerate(fields):
            leader = min(phrases, key=lambda phrase: (frequency[phrase], -len(phrase)))
            self._others.append([_joined(phrase) for phrase in dict.fromkeys(phrases) if phrase != leader])
            if not self.unmatchable[number]:
                self._instances_of[leader].append(number)
        self._leaders = list(self._instances_of)
        self._index = PhraseIndex(self._leaders)

    def hits(self, text: str) -> list[Hit]:
        """Contaminated instances of one turn, each once, by instance."""
        terms = analyze(text)
        found: dict[int, int] = {}
        for phrase, position in self._index.find(terms):
            found.setdefault(phrase, position)
        if not found:
            return []
        whole = _joined(terms)
        return sorted(
            (
                Hit(instance, 1.0, position, position + len(self._leaders[phrase]))
                for phrase, position in found.items()
                for instance in self._instances_of[self._leaders[phrase]]
                if all(other in whole for other in self._others[instance])
            ),
            key=lambda hit: hit.instance,
        )


class NgramMatcher:
    """Hit: the mean over the fields of the share of tokens that matched windows cover is above `threshold`.

    Every window of `n` tokens of a field gives its span text (source slice); its terms must occur as a run in the turn.
    A span text that repeats within a field keeps only its LAST position, and a window without terms matches nothing:
    so the reference does it, and an exact copy can score below 1.
    """

    def __init__(self, instances: Sequence[tuple[str, ...]], tokenize: Tokenizer, n: int, threshold: float) -> None:
        self._n, self._threshold = n, threshold
        field_numbers: dict[str, int] = {}
        self._fields_of: list[list[int]] = [
            [field_numbers.setdefault(field, len(field_numbers)) for field in instance] for instance in instances
        ]
        self._instances_of: list[list[int]] = [[] for _ in field_numbers]
        for instance_number, numbers in enumerate(self._fields_of):
            for number in dict.fromkeys(numbers):
                self._instances_of[number].append(instance_number)

        phrase_numbers: dict[Terms, int] = {}
        self._places: list[list[tuple[int, int]]] = []  # phrase -> (field, first token of the window)
        self._num_tokens: list[int] = []
        coverable: list[float] = []
        terms_of: list[int] = []
        for field_number, field in enumerate(field_numbers):
            spans = tokenize(field)
            last: dict[str, int] = {}
            for first in range(len(spans) - n + 1):
                last[field[spans[first][0] : spans[first + n - 1][1]]] = first
            starts = []
            for window, first in last.items():
                phrase = tuple(analyze(window))
                if phrase:
                    number = phrase_numbers.setdefault(phrase, len(phrase_numbers))
                    if number == len(self._places):
                        self._places.append([])
                    self._places[number].append((field_number, first))
                    starts.append(first)
            self._num_tokens.append(len(spans))
            coverable.append(self._coverage(field_number, starts))
            terms_of.append(len(analyze(field)))
        self._lengths = [len(phrase) for phrase in phrase_numbers]
        self._index = PhraseIndex(list(phrase_numbers))
        self.num_terms = [sum(terms_of[number] for number in numbers) for numbers in self._fields_of]
        # The best that any text can do is to hold every window.
        self.unmatchable = [
            sum(coverable[number] for number in numbers) / len(numbers) <= threshold for numbers in self._fields_of
        ]

    def hits(self, text: str) -> list[Hit]:
        """Contaminated instances of one turn, each once, by instance."""
        terms = analyze(text)
        found: dict[int, int] = {}
        for phrase, position in self._index.find(terms):
            found.setdefault(phrase, position)
        starts: dict[int, list[int]] = defaultdict(list)
        bounds: dict[int, tuple[int, int]] = {}
        for phrase, position in found.items():
            end = position + self._lengths[phrase]
            for field, first in self._places[phrase]:
                starts[field].append(first)
                low, high = bounds.get(field, (position, end))
                bounds[field] = min(low, position), max(high, end)
        coverage = {field: self._coverage(field, positions) for field, positions in starts.items()}
        hits = []
        for instance in sorted({instance for field in coverage for instance in self._instances_of[field]}):
            fields = self._fields_of[instance]
            score = sum(coverage.get(field, 0.0) for field in fields) / len(fields)  # in field order, as the reference
            if score > self._threshold:
                touched = [bounds[field] for field in fields if field in bounds]
                hits.append(Hit(instance, score, min(low for low, _ in touched), max(high for _, high in touched)))
        return hits

    def _coverage(self, field: int, starts: list[int]) -> float:
        """|union of the token positions of the windows at `starts`| / number of tokens of the field."""
        if not starts:
            return 0.0
        ordered = sorted(starts)
        covered = self._n + sum(min(self._n, after - before) for before, after in pairwise(ordered))
        return covered / self._num_tokens[field]


def term_slice(text: str, start: int, end: int) -> str:
    """Source text of terms `start` (included) to `end` (excluded), separators between them included."""
    # Lower-casing keeps every code point in its place here, so the separators are found in the source itself.
    spans = [match.span() for match in _TERM.finditer(text)]
    return text[spans[start][0] : spans[end - 1][1]]


def spacy_tokenizer() -> Tokenizer:
    """Token bounds by spaCy's English tokenizer (that of en_core_web_lg, which needs no model).

    Raises:
        ValueError: spaCy is not installed.
    """
    try:
        import spacy
    except ImportError as error:
        raise ValueError(
            "contamination mode 'ngram' needs spaCy's tokenizer, which is not installed: run "
            "`pip install 'spacy>=3.8,<4'`, or set contamination.mode to 'full'"
        ) from error
    language = spacy.blank("en")
    language.max_length = 1 << 40  # the limit guards parsers, which are not run here
    return lambda text: [(token.idx, token.idx + len(token)) for token in language.make_doc(text)]


def _joined(terms: Sequence[str]) -> str:
    # A term holds no space, so a run of terms is a substring of this form and nothing else is.
    return f" {' '.join(terms)} "
