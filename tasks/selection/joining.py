"""Rows of a set with the scores that belong to them by content. Columns are numpy arrays.

Repeats of a mixture, and rows that are the same, have the same digest and so the same score.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.schemas.selection import SCORER, Method
from smoltulu.tasks.data import rows as rows_file
from smoltulu.tasks.selection.choice import as_uniform, row_hashes
from smoltulu.tasks.selection.scores_file import open_scores, read_scores, row_digest, scorer_of

if TYPE_CHECKING:
    import numpy as np

#: Rows without a score of which none is said by its scores file.
_UNSAID = "no score"
#: Of the number of a source.
_MAX_DIGITS = 6
_NUMBERS = ("num_tokens", "num_trained_tokens", "num_characters", "repetition", "loss", "score")


@dataclass(frozen=True)
class Scored:
    """Rows of a set, (R,) each; not a number where nothing was measured.

    sources   number of the source
    ties      hash that puts equal scores in order
    lines     line of its scores file
    problems  place in `reasons` of why a row has no score; -1: it has one
    """

    sources: np.ndarray
    ties: np.ndarray
    lines: np.ndarray
    num_tokens: np.ndarray
    num_trained_tokens: np.ndarray
    num_characters: np.ndarray
    repetition: np.ndarray
    loss: np.ndarray
    scores: np.ndarray
    problems: np.ndarray
    reasons: list[str] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.sources)


def join(
    dataset: Path,
    scores: Mapping[str, str],
    method: Method,
    seed: int,
    labels: Sequence[str],
    report: Callable[[int], None] = lambda num_rows: None,
) -> Scored:
    """Every row with its score.

    Raises:
        ValueError: a scores file of another scorer or that cannot be read, a row whose source has no scores file or
            that its scores file does not know, an id without a number of a source.
    """
    import numpy as np

    files = _checked(scores, method, labels)
    sources, digests, ties, draws = _rows(dataset, seed if method == "random" else None, report)
    unknown = sorted(set(np.unique(sources).tolist()) - files.keys())
    if unknown:
        raise ValueError(
            f"selection: {dataset} has rows of source {', '.join(map(str, unknown))}, and there are scores of "
            f"{', '.join(map(str, files)) or 'none'}; score each source of the set"
        )
    columns = {name: np.full(len(sources), np.nan) for name in _NUMBERS}
    lines = np.zeros(len(sources), dtype=np.int64)
    problems = np.full(len(sources), -1, dtype=np.int16)
    reasons: list[str] = []
    for number, file in files.items():
        own = np.flatnonzero(sources == number)
        if not len(own):
            continue
        table = read_scores(file, ("digest", "problem", *_NUMBERS))
        places = _places(_as_numbers(table["digest"].to_pylist()), digests[own])
        if (missing := own[places < 0]).size:
            raise ValueError(_of_another_set(dataset, file, number, labels, missing, len(own)))
        lines[own] = places
        for name in _NUMBERS:
            columns[name][own] = table[name].to_numpy()[places]
        said = table["problem"].combine_chunks().dictionary_encode()
        reasons += [reason for reason in said.dictionary.to_pylist() if reason and reason not in reasons]
        codes = [reasons.index(reason) if reason else -1 for reason in said.dictionary.to_pylist()]
        problems[own] = np.array(codes, dtype=np.int16)[said.indices.to_numpy()[places]]
    found = {"length": columns["num_tokens"], "random": draws}.get(method, columns["score"])
    unsaid = np.isnan(found) & (problems < 0)
    if unsaid.any():
        reasons.append(_UNSAID)
        problems[unsaid] = len(reasons) - 1
    counts = {name: columns[name].astype(np.int64) for name in _NUMBERS[:3]}
    return Scored(
        sources, ties, lines, **counts, repetition=columns["repetition"], loss=columns["loss"],
        scores=np.where(problems < 0, found, np.nan), problems=problems, reasons=reasons,
    )  # fmt: skip


def _checked(scores: Mapping[str, str], method: Method, labels: Sequence[str]) -> dict[int, Path]:
    """Number of the source -> its scores file. ValueError where another scorer made it."""
    files = {}
    for number, name in sorted(scores.items(), key=lambda item: int(item[0])):
        file = Path(name)
        with open_scores(file) as opened:
            scorer = scorer_of(opened)
        if scorer != SCORER[method]:
            raise ValueError(
                f"selection: the scores of source {_label(int(number), labels)} were made by {scorer} ({file}), and "
                f"method {method} needs those of {SCORER[method]}; score the rows by it, or choose its method"
            )
        files[int(number)] = file
    return files


def _rows(
    dataset: Path, seed: int | None, report: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Source, digest, hash for ties and draw in [0, 1) of every row, (R,) each. Holds a row group of texts."""
    import numpy as np

    sources, digests, ties, draws = array("i"), array("Q"), array("Q"), array("d")
    with rows_file.open_rows(dataset) as opened:
        starts = rows_file.group_starts(opened)
    for start, end in itertools.pairwise(starts):
        named = []
        for row in rows_file.stored_rows(dataset, start, end - start):
            before, colon, _ = row["id"].partition(":")
            if not colon or not before.isdecimal() or len(before) > _MAX_DIGITS:
                raise ValueError(
                    f"selection: {dataset}: row id {row['id']!r:.80} does not begin with the number of a source, as "
                    "3:17 does; take rows of the stage dataset"
                )
            sources.append(int(before))
            named.append((row_digest(row), row["id"]))
        digests.extend(int(digest, 16) for digest, _ in named)
        ties.extend(row_hashes(named))
        if seed is not None:
            draws.extend(as_uniform(row_hashes(named, seed)))
        report(end)
    made = [np.array(one) for one in (sources, digests, ties, draws)]
    return made[0], made[1], made[2], made[3]


def _as_numbers(digests: Sequence[str]) -> np.ndarray:
    import numpy as np

    return np.array([int(digest, 16) for digest in digests], dtype=np.uint64)


def _places(there: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The first place of each wanted digest in those that are there, (R,); -1: it is not there."""
    import numpy as np

    if not len(there):
        return np.full(len(wanted), -1)
    order = np.argsort(there, kind="stable")
    at = np.minimum(np.searchsorted(there[order], wanted), len(there) - 1)
    places: np.ndarray = np.where(there[order[at]] == wanted, order[at], -1)
    return places


def _of_another_set(
    dataset: Path, file: Path, number: int, labels: Sequence[str], missing: np.ndarray, num_rows: int
) -> str:
    first = int(missing[0])
    row = rows_file.rows_at(dataset, [first])[first]
    return (
        f"selection: {len(missing):,} of {num_rows:,} rows of source {_label(number, labels)} are not in its scores "
        f"({file}), the first is row {row['id']}: these are scores of another row set, or the rows were changed after "
        "they were scored; score the rows of this source as they are read"
    )


def _label(number: int, labels: Sequence[str]) -> str:
    return f"{number} ({labels[number]})" if number < len(labels) else str(number)
