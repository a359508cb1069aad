"""Which heads copy, and whether that can be believed: the choice, its random controls and its gates. Pure."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from smoltulu.schemas.selection import HeadSettings
from smoltulu.tasks.selection.attention import HeadPlace

#: Below so many heads, a share of them is a handful, and copying is spread over more: the threshold is the rule.
FEW_HEADS = 200
MIN_ACCURACY = 0.5
MIN_SCORE = 0.1
MIN_KEPT = 0.8

Rule = Literal["threshold", "top_share", "union"]
#: (num_layers, num_heads)
Scores = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Choice:
    """heads   by score, highest first
    tied    heads that are not chosen and have the score of one that is: chance drew the line between them
    """

    rule: Rule
    heads: list[HeadPlace]
    tied: list[HeadPlace]


def choose_heads(scores: Scores, settings: HeadSettings) -> Choice:
    """The heads that copy, by the rule of the settings.

    ValueError where all scores are zero: then any head would be as good as any other, and the highest ones of a list of
    zeros are only those that a sort happens to put first.
    """
    ranked = sorted(
        ((score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row)),
        key=lambda one: (-one[0], one[1:]),
    )
    if ranked[0][0] <= 0:
        raise ValueError(
            "no head copies: all retrieval scores are zero, so the selector model cannot do the probes at all. Give "
            "selection.model a model that can (of the size of SmolLM2-135M, or one made with base_model.scratch.texts "
            "copying), make the probes easier (selection.probes.max_tokens, key_length), or choose selection.method "
            "rds_plus or length, which need no heads"
        )
    rule: Rule = settings.rule or ("threshold" if len(ranked) < FEW_HEADS else "union")
    above = sum(score >= settings.threshold for score, *_ in ranked)
    share = max(1, round(settings.top_share * len(ranked)))
    count = {"threshold": above, "top_share": share, "union": max(above, share)}[rule]
    chosen, rest = ranked[:count], ranked[count:]
    tied = [(layer, head) for score, layer, head in rest if chosen and score == chosen[-1][0]]
    return Choice(rule, [(layer, head) for _, layer, head in chosen], tied)


#: With fewer random sets than these a control says nothing.
MIN_SETS = 2


def random_sets(
    chosen: Sequence[HeadPlace], num_layers: int, num_heads: int, num_sets: int, seed: int
) -> list[list[HeadPlace]]:
    """Different sets of unchosen heads, as many heads in each layer as are chosen there.

    Where a layer has too few unchosen heads, or only one set can be drawn, the nearest layers help out, those above
    first: a lower layer may feed the chosen heads, which makes it no neutral control. Fewer sets, or none, where there
    are not so many.
    """
    taken = set(chosen)
    free = {layer: [head for head in range(num_heads) if (layer, head) not in taken] for layer in range(num_layers)}
    if len(chosen) > num_layers * num_heads - len(chosen):
        return []
    rng = random.Random(f"random heads {seed}")
    found: dict[tuple[HeadPlace, ...], None] = {}
    for num_moved in range(len(chosen) + 1):
        for _ in range(50 * num_sets):
            if len(found) == num_sets:
                break
            moved = Counter(layer for layer, _ in rng.sample(list(chosen), num_moved))
            found[tuple(sorted(_draw(rng, Counter(layer for layer, _ in chosen), moved, free)))] = None
        if len(found) >= min(MIN_SETS, num_sets):
            break
    return [list(heads) for heads in found]


def num_elsewhere(heads: Sequence[HeadPlace], chosen: Sequence[HeadPlace]) -> int:
    """How many of a random set's heads are of a layer that has not so many chosen ones."""
    layers = [Counter(layer for layer, _ in one) for one in (heads, chosen)]
    return (layers[0] - layers[1]).total()


def _draw(rng: random.Random, wanted: Counter[int], moved: Counter[int], free: dict[int, list[int]]) -> list[HeadPlace]:
    """`wanted` heads of each layer, of which `moved` come from another one if there is one with heads left."""
    left = {layer: rng.sample(heads, len(heads)) for layer, heads in free.items()}
    drawn: list[HeadPlace] = []
    short: list[int] = []
    for layer, count in sorted(wanted.items()):
        own = min(count - moved[layer], len(left[layer]))
        drawn += [(layer, left[layer].pop()) for _ in range(own)]
        short += [layer] * (count - own)
    for layer in short:
        others = [one for one in left if left[one]]
        nearest = min(others, key=lambda one: (one == layer and moved[layer] > 0, abs(one - layer), one < layer))
        drawn.append((nearest, left[nearest].pop()))
    return drawn


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, ties by mean ranks; 0 where one side is constant."""
    ranks = [_ranks(first), _ranks(second)]
    means = [sum(side) / len(side) for side in ranks]
    centred = [[rank - mean for rank in side] for side, mean in zip(ranks, means, strict=True)]
    products = sum(a * b for a, b in zip(*centred, strict=True))
    squares = [sum(a * a for a in side) for side in centred]
    return products / (squares[0] * squares[1]) ** 0.5 if all(squares) else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda number: values[number])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for number in order[start:end]:
            ranks[number] = (start + end - 1) / 2
        start = end
    return ranks


class Effect(NamedTuple):
    """What masking a set of heads does.

    accuracy     of the probes
    correlation  Spearman between the number of lookups of a graded probe and the influence of the set on it
    """

    heads: list[HeadPlace]
    accuracy: float
    correlation: float


class Gate(NamedTuple):
    """A condition, what was found, and a sentence that has the numbers."""

    name: str
    passed: bool
    sentence: str


def gates(
    accuracy: float,
    scores: Scores,
    choice: Choice,
    chosen: Effect,
    controls: Sequence[Effect],
    num_random_sets: int,
    resampled: Sequence[HeadPlace],
) -> list[Gate]:
    """Every gate, in the order of the design."""
    largest = max(max(row) for row in scores)
    kept = len(set(choice.heads) & set(resampled)) / len(choice.heads) if choice.heads else 0.0
    made = [
        Gate(
            "probe_accuracy",
            accuracy >= MIN_ACCURACY,
            f"the model does {accuracy:.0%} of the probes (at least {MIN_ACCURACY:.0%})",
        ),
        Gate(
            "largest_score",
            largest >= MIN_SCORE,
            f"the largest retrieval score is {largest:.3f} (at least {MIN_SCORE:g})",
        ),
        Gate(
            "no_ties",
            not choice.tied,
            f"{len(choice.tied)} heads that are not chosen tie with a chosen one (none may)"
            if choice.tied
            else "no head ties at the cut",
        ),
    ]
    if len(controls) < min(MIN_SETS, num_random_sets):
        few = f"only {len(controls)} random sets" if controls else "no random set"
        every = sum(map(len, scores))
        sentence = f"{len(choice.heads)} of {every} heads are chosen, so that {few} of equal size can be drawn"
        return [*made, Gate("control", False, sentence), _kept_gate(kept)]
    worst = min(control.accuracy for control in controls)
    num_moved = sum(num_elsewhere(control.heads, choice.heads) for control in controls)
    every = sum(len(control.heads) for control in controls)
    moved = f"; {num_moved} of their {every} heads are of other layers, where the chosen ones leave too few"
    best = max(control.correlation for control in controls)
    return [
        *made,
        Gate(
            "control_accuracy",
            chosen.accuracy < worst,
            f"without the {len(choice.heads)} chosen heads the accuracy is {chosen.accuracy:.0%}, without the worst of "
            f"{len(controls)} random sets {worst:.0%} (the chosen ones must cost more{moved if num_moved else ''})",
        ),
        Gate(
            "control_correlation",
            chosen.correlation > best,
            f"the influence of the chosen heads follows the number of lookups by {chosen.correlation:.2f}, that of the "
            f"best random set by {best:.2f} (rank correlation; must lie above it)",
        ),
        _kept_gate(kept),
    ]


def _kept_gate(kept: float) -> Gate:
    return Gate(
        "resampled", kept >= MIN_KEPT, f"other probes choose {kept:.0%} of the same heads (at least {MIN_KEPT:.0%})"
    )
