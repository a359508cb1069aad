"""Both detectors on the same rows: how often each names a language, and where they differ. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from smoltulu.schemas.languages import OTHER, Detector, DetectorComparison, DetectorDifference

UNDETERMINED = "undetermined"
_NUM_IDS = 5


def spread_rows(num_rows: int, num_wanted: int) -> list[int]:
    """Numbers of `num_wanted` rows, evenly spread over `num_rows`; all where there are no more."""
    count = min(num_rows, num_wanted)
    return [number * num_rows // count for number in range(count)]


def named(language: str | None, languages: Sequence[str]) -> str | None:
    """A detected language as the table has it: one of `languages`, `other`, or none."""
    return language if language is None or language in languages else OTHER


def compare_detectors(
    judged: Sequence[tuple[str, str | None, str | None]], languages: Sequence[str], detector: Detector, version: str
) -> DetectorComparison:
    """What two detectors say of the same rows.

    judged    (id, language by the detector of the table, language by the other one), as they were detected
    detector  the other one, with its version
    """
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    same = 0
    differ: Counter[tuple[str | None, str | None]] = Counter()
    ids: dict[tuple[str | None, str | None], list[str]] = defaultdict(list)
    for row_id, ours, theirs in judged:
        pair = (named(ours, languages), named(theirs, languages))
        for place, language in enumerate(pair):
            counts[language or UNDETERMINED][place] += 1
        if pair[0] == pair[1]:
            same += 1
            continue
        differ[ours, theirs] += 1
        if len(ids[ours, theirs]) < _NUM_IDS:
            ids[ours, theirs].append(row_id)
    return DetectorComparison(
        detector=detector,
        detector_version=version,
        num_rows=len(judged),
        num_same=same,
        counts={
            language: (both[0], both[1])
            for language, both in sorted(counts.items(), key=lambda item: (-max(item[1]), item[0]))
        },
        differences=tuple(
            DetectorDifference(language=pair[0], other_language=pair[1], num_rows=count, ids=tuple(ids[pair]))
            for pair, count in sorted(differ.items(), key=lambda item: (-item[1], item[0][0] or "", item[0][1] or ""))
        ),
    )
