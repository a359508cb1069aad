"""Hits and best scores of texts in memory, for tests that compare them with a rule."""

from __future__ import annotations

from typing import NamedTuple


class Hit(NamedTuple):
    """One instance found in one text."""

    turn: int
    instance: int
    score: float
    text: str


def scan_texts(index, texts, threshold=0.5):
    """Hits by text and instance."""
    from smoltulu.tasks.contamination.scan import scan_texts

    hits, _ = scan_texts(index, texts, threshold)
    return [Hit(row["row"], row["instance"], row["score"], row["text"]) for row in hits.to_pylist()]


def best_scores(index, texts, threshold=0.5):
    """Best score of each instance; in n-gram mode those at or below the threshold too."""
    from smoltulu.tasks.contamination.scan import scan_texts

    return scan_texts(index, texts, threshold)[1]
