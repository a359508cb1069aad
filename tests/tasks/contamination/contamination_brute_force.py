"""The contamination rule in its plainest form: without an index or a hash, written from the rule, not the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def terms(text: str) -> list[str]:
    """Pieces between separators, each character lower-cased by itself and to one character, as Java does."""
    pieces = [""]
    for character in text:
        if character in ' ,.?!:;()"-\n\\':
            pieces.append("")
        else:
            pieces[-1] += character.lower()[0]
    return [piece for piece in pieces if piece]


def holds(turn: list[str], phrase: list[str]) -> bool:
    """Whether `phrase`, which must not be empty, is a run of consecutive equal terms of `turn`."""
    return bool(phrase) and any(turn[at : at + len(phrase)] == phrase for at in range(len(turn)))


def full_score(instance: Sequence[str], turn: str) -> float:
    """1 if every field is a run of terms of the turn, else 0."""
    return float(all(holds(terms(turn), terms(field)) for field in instance))


def ngram_score(instance: Sequence[str], turn: str, n: int, tokenize: Callable[[str], list[tuple[int, int]]]) -> float:
    """Mean over the fields of the share of tokens under windows of `n` tokens whose text the turn holds."""
    total = 0.0
    for field in instance:
        tokens = tokenize(field)
        last: dict[str, int] = {}  # a span text that repeats counts at its last place only
        for first in range(len(tokens) - n + 1):
            last[field[tokens[first][0] : tokens[first + n - 1][1]]] = first
        found = [first for span, first in last.items() if holds(terms(turn), terms(span))]
        covered = {token for first in found for token in range(first, first + n)}
        total += len(covered) / len(tokens) if covered else 0.0
    return total / len(instance)
