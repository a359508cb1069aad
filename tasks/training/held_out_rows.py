"""Which prompts of RLVR are held out: a split that depends on seed and rows alone, the same for every algorithm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smoltulu.schemas.held_out import MIN_PROMPTS_OF_A_FALL, HeldOutSettings
from smoltulu.tasks.data.held_out import asked_text
from smoltulu.tasks.generation.interface import HELD_OUT_ROWS
from smoltulu.tasks.training.rollouts import shuffled
from smoltulu.tasks.verifiers.kinds import kinds_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class HeldOutRow:
    """A prompt that is not trained on.

    number      its line in all rows, before the split: draws depend on it, so they do not change with `num_prompts`
    row         {"id", "prompt", "verifier", "ground_truth"}
    kind        the held-out kind that it belongs to; None: one like those that are trained on
    """

    number: int
    row: Row
    kind: str | None


@dataclass(frozen=True)
class Split:
    """Lines that are trained on, in their order; rows that are answered, in the order of their lines."""

    trained: list[int]
    held_out: list[HeldOutRow]
    num_left_out: int


def split_rows(settings: HeldOutSettings, seed: int, rows: Sequence[Row]) -> Split:
    """Put prompts aside.

    No row of a held-out kind is trained on; of these at most `num_prompts` are answered, as many of each kind as there
    are. A row with the text of one that is held out is not trained on either: it would be trained on what is asked.

    Raises:
        ValueError: no row is of a held-out kind, or there are fewer different prompts than are to be held out.
    """
    texts = [asked_text(row["prompt"]) for row in rows]
    names = [kinds_of(row["verifier"], row["ground_truth"]) for row in rows]
    kinds = [next((name for name in reversed(of_row) if name in settings.kinds), None) for of_row in names]
    there = {name for of_row in names for name in of_row}
    if missing := sorted(set(settings.kinds) - there):
        raise ValueError(
            f"held_out.kinds: no row is of kind {', '.join(missing)}; there are {', '.join(sorted(there))}. Name kinds "
            "that the prompts have, or leave them out"
        )
    order = shuffled(seed, HELD_OUT_ROWS, (0, 0, 0), len(rows))
    of_kinds = _spread([line for line in _distinct(order, texts) if kinds[line] is not None], kinds)
    texts_of_kinds = {text for text, kind in zip(texts, kinds, strict=True) if kind is not None}
    others = [line for line in _distinct(order, texts) if texts[line] not in texts_of_kinds]
    if len(others) <= settings.num_prompts:
        raise ValueError(
            f"held_out.num_prompts {settings.num_prompts:,} of {len(others):,} different prompts"
            f"{' that are of no held-out kind' if settings.kinds else ''} leave none to train on; lower it, or give "
            "more prompts"
        )
    chosen = sorted(others[: settings.num_prompts]) + sorted(of_kinds[: settings.num_prompts])
    num_of_kinds = len(chosen) - settings.num_prompts
    if settings.max_kinds_drop is not None and num_of_kinds < MIN_PROMPTS_OF_A_FALL:
        raise ValueError(
            f"held_out.max_kinds_drop is about the {num_of_kinds:,} different prompts of held-out kinds, and of fewer "
            f"than {MIN_PROMPTS_OF_A_FALL} even a fall of all is not beyond noise (p < 0.01); hold out more kinds, or "
            "leave it out"
        )
    hidden = texts_of_kinds | {texts[line] for line in chosen}
    trained = [line for line in range(len(rows)) if texts[line] not in hidden]
    held_out = [HeldOutRow(line, rows[line], kinds[line]) for line in chosen]
    return Split(trained, held_out, len(rows) - len(trained))


def _distinct(order: Sequence[int], texts: Sequence[str]) -> list[int]:
    """The first line of every text, in this order."""
    first: dict[str, int] = {}
    for line in order:
        first.setdefault(texts[line], line)
    return list(first.values())


def _spread(lines: Sequence[int], kinds: Sequence[str | None]) -> list[int]:
    """Lines such that each kind has its first before any has its second, and so on; else in their order."""
    seen: Counter[str | None] = Counter()
    turns = []
    for line in lines:
        turns.append(seen[kinds[line]])
        seen[kinds[line]] += 1
    return [line for _, line in sorted(zip(turns, lines, strict=True), key=lambda pair: pair[0])]
