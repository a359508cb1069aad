"""Which rows are kept, and what the others weigh: from scores alone. Pure, in numpy.

Rows are ranked within their domain (= source) or over all; equal scores are put in order by a hash of the row, so that
neither order nor machine decides. A budget of tokens is split over domains in proportion to the tokens of their rows,
and each domain keeps the beginning of its ranking that comes nearest to its part, which is half a row away at most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smoltulu.schemas.selection import KeepSettings

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Ranked:
    """Rows that can be kept, (R,) each. All have a score.

    domains  number of the source
    tokens   of the rendered row
    scores   as the method has them
    ties     hashes that put equal scores in order
    """

    domains: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray
    ties: np.ndarray


def row_hashes(rows: Iterable[tuple[str, str]], seed: int | None = None) -> np.ndarray:
    """64 bits for each (digest, id), (R,): the same on every machine. With a seed: a draw of its own."""
    import numpy as np

    begin = b"" if seed is None else f"{seed} ".encode()
    made = b"".join(
        hashlib.blake2b(begin + f"{digest} {row_id}".encode(), digest_size=8).digest() for digest, row_id in rows
    )
    return np.frombuffer(made, dtype=">u8").astype(np.uint64)


def as_uniform(hashes: np.ndarray) -> np.ndarray:
    """Hashes as numbers in [0, 1), (R,): the scores of method random."""
    import numpy as np

    made: np.ndarray = (hashes >> np.uint64(11)).astype(np.float64) / 2.0**53
    return made


def ranking(scores: np.ndarray, ties: np.ndarray, order: str) -> np.ndarray:
    """Places of the rows, first ranked first, (R,)."""
    import numpy as np

    made: np.ndarray = np.lexsort((ties, -scores if order == "highest" else scores))
    return made


def groups(domains: np.ndarray, within: str) -> Iterator[tuple[int | None, np.ndarray]]:
    """Domain (None: all rows), and places of the rows that are ranked together."""
    import numpy as np

    if within == "all":
        yield None, np.arange(len(domains))
        return
    if not len(domains):
        return
    order = np.argsort(domains, kind="stable")
    names, starts = np.unique(domains[order], return_index=True)
    yield from zip(names.tolist(), np.split(order, starts[1:]), strict=True)


def choose(keep: KeepSettings, rows: Ranked, labels: Sequence[str]) -> np.ndarray:
    """Whether each row is kept, (R,).

    labels  of the domains, for messages

    Raises:
        ValueError: nothing would be kept, of all or of a domain; a domain of one row, within which nothing can be
            ranked; a threshold or a budget that keeps everything.
    """
    import numpy as np

    name, amount = keep.amount
    kept = np.zeros(len(rows.scores), dtype=bool)
    if not len(kept):
        raise ValueError("selection: no row has a score, so nothing can be chosen")
    if name == "threshold":
        return _above(keep, rows)
    total = int(rows.tokens.sum())
    if name == "tokens" and amount > total:
        raise ValueError(
            f"keep.tokens {amount:,}: the {len(kept):,} rows with a score have {total:,} tokens, so all would be kept; "
            "lower it, or give share: 1"
        )
    fraction = amount / total if name == "tokens" else amount
    for domain, places in groups(rows.domains, keep.within):
        ranked = places[ranking(rows.scores[places], rows.ties[places], keep.order)]
        if fraction < 1 and len(places) == 1:
            raise ValueError(
                f"{_said(domain, labels)} has one row with a score, and a ranking of one row says nothing; leave the "
                "source out, or set keep.within to all"
            )
        count = num_kept(name, fraction, rows.tokens[ranked])
        if not count:
            unit, size = ("tokens", int(rows.tokens[places].sum())) if "token" in name else ("rows", len(places))
            raise ValueError(
                f"keep.{name} {amount:g} keeps no row of {_said(domain, labels)}, which has {size:,} {unit}"
                + (f"; its part is {fraction * size:,.1f} tokens, and its first row has {rows.tokens[ranked[0]]:,}"
                   if unit == "tokens" else "")
                + "; raise it, or set keep.within to all"
            )  # fmt: skip
        kept[ranked[:count]] = True
    return kept


def num_kept(name: str, fraction: float, tokens: np.ndarray) -> int:
    """Rows at the beginning of a ranking that are kept. `tokens`: of the ranked rows, first ranked first, (R,)."""
    import numpy as np

    if fraction == 1:
        return len(tokens)
    if name == "share":
        return min(int(fraction * len(tokens) + 0.5), len(tokens))
    sums = np.concatenate(([0], np.cumsum(tokens, dtype=np.int64)))
    # The first of two that are equally near: the smaller one.
    return int(np.argmin(np.abs(sums - fraction * sums[-1])))


def _above(keep: KeepSettings, rows: Ranked) -> np.ndarray:
    """Rows on the right side of a threshold, (R,)."""
    import numpy as np

    assert keep.threshold is not None
    kept: np.ndarray = rows.scores >= keep.threshold if keep.order == "highest" else rows.scores <= keep.threshold
    if kept.all() or not kept.any():
        low, middle, high = (float(np.quantile(rows.scores, part)) for part in (0, 0.5, 1))
        raise ValueError(
            f"keep.threshold {keep.threshold:g} keeps {'every one' if kept.all() else 'none'} of {len(kept):,} rows: "
            f"they score {low:.4g} to {high:.4g}, half of them above {middle:.4g}; give a threshold between, or a share"
        )
    return kept


def _said(domain: int | None, labels: Sequence[str]) -> str:
    if domain is None:
        return "the set"
    return f"source {domain} ({labels[domain]})" if domain < len(labels) else f"source {domain}"


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value from 0, lowest first, (R,); equal values share the mean of their ranks."""
    import numpy as np

    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    made: np.ndarray = (ends - (counts + 1) / 2)[group]
    return made


def rank_weights(
    scores: np.ndarray, domains: np.ndarray, within: str, order: str, min_weight: float, max_weight: float
) -> np.ndarray:
    """Weights in a straight line over the ranks, (R,): `max_weight` for the first, `min_weight` for the last.

    Equal scores weigh the same. A row that is ranked alone weighs the mean of both.
    """
    import numpy as np

    weights = np.full(len(scores), (min_weight + max_weight) / 2)
    for _, places in groups(domains, within):
        if len(places) > 1:
            part = mean_ranks(scores[places]) / (len(places) - 1)
            weights[places] = min_weight + (max_weight - min_weight) * (part if order == "highest" else 1 - part)
    return weights
