"""What a page says of a choice: rows by length, correlations of the score, overlap with other ways to choose. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smoltulu.schemas.selection import KeepSettings
from smoltulu.tasks.selection.choice import Ranked, as_uniform, choose, groups, mean_ranks

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Band:
    """Rows of `first` to `last` tokens."""

    first: int
    last: int
    num_rows: int
    num_kept: int
    mean_score: float | None


def length_bands(tokens: np.ndarray, kept: np.ndarray, scores: np.ndarray) -> list[Band]:
    """Rows by their length, in bands that double. Those without a score count as rows; all arrays are (R,)."""
    import numpy as np

    band = np.floor(np.log2(np.maximum(tokens, 1))).astype(int)
    made = []
    for number in np.unique(band).tolist():
        are = band == number
        known = scores[are][~np.isnan(scores[are])]
        made.append(
            Band(
                2**number, 2 ** (number + 1) - 1, int(are.sum()), int(kept[are].sum()),
                float(known.mean()) if len(known) else None,
            )
        )  # fmt: skip
    return made


def spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Rank correlation of the places where both are numbers; None below three of them, or where one never varies."""
    import numpy as np

    both = ~(np.isnan(one) | np.isnan(other))
    if both.sum() < 3:
        return None
    ranks = [mean_ranks(values[both]) for values in (one, other)]
    if any(values.min() == values.max() for values in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def correlations(
    domains: np.ndarray, scores: np.ndarray, others: Mapping[str, np.ndarray]
) -> list[tuple[int | None, dict[str, float | None]]]:
    """Rank correlations of the score with each of `others`: over all rows (None), then within each domain."""
    found = []
    for within in ("all", "domain"):
        for domain, places in groups(domains, within):
            found.append((domain, {name: spearman(scores[places], values[places]) for name, values in others.items()}))
    return found


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Rows that both keep, of those that any of them keeps."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def overlaps(
    keep: KeepSettings, rows: Ranked, kept: np.ndarray, perplexity: np.ndarray, labels: Sequence[str]
) -> list[tuple[str, list[float]]]:
    """Name, and overlap with each of them in order, of this choice and of others that keep as many tokens.

    kept        of `rows`, (R,)
    perplexity  mean loss of each row, (R,); without any number it is left out
    """
    import numpy as np

    budget = int(rows.tokens[kept].sum())
    choices = {"this selection": kept}
    others = {
        "longest": (rows.tokens.astype(np.float64), "highest"),
        "random": (as_uniform(rows.ties), "highest"),
        "lowest perplexity": (perplexity, "lowest"),
    }
    for name, (scores, order) in others.items():
        if np.isnan(scores).any():
            continue
        same = KeepSettings(tokens=max(budget, 1), order=order, within=keep.within)
        try:
            ranked = Ranked(rows.domains, rows.tokens, scores, rows.ties)
            choices[name] = choose(same, ranked, labels)
        except ValueError:  # a domain of which so few tokens keep no row
            continue
    return [(name, [jaccard(one, other) for other in choices.values()]) for name, one in choices.items()]
