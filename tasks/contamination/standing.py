"""How a hit on an item of few terms stands in its turn, and when it counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from smoltulu.schemas.contamination import ShortItems
from smoltulu.tasks.contamination.kernels.layout import State
from smoltulu.tasks.contamination.kernels.text import (
    IS_WORD,
    LOWER_BYTES,
    LOWER_CODE_POINTS,
    are_most_of_their_lines,
    lines_of,
    stand_as_in_full,
)
from smoltulu.tasks.contamination.opened import NO_TABLES, Index, Weak, match_bounds, new_state, scan_turns
from smoltulu.tasks.contamination.rows import TurnBlock


@dataclass(frozen=True)
class ShortRule:
    """When a hit on a short instance counts: `short_items` of the rules, and under how many terms one is short."""

    rule: ShortItems = "never"
    min_terms: int = 1


#: The reference's: every hit counts.
ALL_COUNT = ShortRule()


def confirmed(
    index: Index, weak: Weak, state: State, block: TurnBlock, places: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The places that count, their scores and bounds: those of weak instances only where full mode finds them too, or
    where they stand alone as a word.
    """
    where = (block.text, block.turn_start, block.turn_end)
    begins, ends = match_bounds(index, *where, places)
    of_weak = weak.is_weak[places[:, 1]]
    # Nearly all stand in the source as full mode has them: only the others are looked for.
    of_weak[of_weak] = ~stand_as_in_full(
        *(*where, places[of_weak], begins[of_weak], ends[of_weak], weak.full, weak.phrases),
        LOWER_BYTES,
        LOWER_CODE_POINTS,
    )
    if of_weak.any():
        turns = np.unique(places[of_weak, 0])
        faithful = replace(index, phrases=weak.phrases, full=weak.full, normal=NO_TABLES, weak=None)
        starts, stops = block.turn_start[turns], block.turn_end[turns]
        num_instances, known, turn = index.header.num_instances, [np.empty(0, np.int64)], 0
        own = new_state(faithful)
        while turn < len(turns):
            turn, found, _, _ = scan_turns(faithful, own, block.text, starts, stops, np.arange(len(turns)), turn, 0.5)
            known.append(turns[found[:, 0]] * num_instances + found[:, 1])
        standing, instances, _, _ = standing_alone(index, block, places[of_weak], weak.is_weak & weak.has_word)
        known.append(standing * num_instances + instances)
        kept = ~of_weak | np.isin(places[:, 0] * num_instances + places[:, 1], np.concatenate(known))
        places, scores, begins, ends = places[kept], scores[kept], begins[kept], ends[kept]
    first = np.unique(places[:, 1], return_index=True)[1]
    first = first[state.best_score[places[first, 1]] < 1]
    state.best_score[places[first, 1]], state.best_row[places[first, 1]] = 1.0, block.turn_row[places[first, 0]]
    return places, scores, begins, ends


def alone(index: Index, block: TurnBlock, places: np.ndarray, short: ShortRule) -> np.ndarray:
    """Whether each place is of an instance that is not short, or that makes up most of the lines it stands on."""
    instances, num_instances = places[:, 1], index.header.num_instances
    shorts = short_instances(index, short)
    turns, found, _, _ = standing_alone(index, block, places, shorts)
    return ~shorts[instances] | np.isin(places[:, 0] * num_instances + instances, turns * num_instances + found)


def short_instances(index: Index, short: ShortRule) -> np.ndarray:
    """Which instances are short."""
    return np.asarray((index.num_terms < short.min_terms) | index.is_short)


def standing_alone(
    index: Index, block: TurnBlock, places: np.ndarray, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Chosen instances that make up most of their lines: (turn, instance, first byte, byte behind the last).

    Every line of a turn with a hit on one of them is searched by itself too: it may stand alone further down.
    """
    where = (block.text, block.turn_start, block.turn_end)
    places = places[chosen[places[:, 1]]]
    starts, ends, of_turn = lines_of(*where, np.unique(places[:, 0]))
    found = [(places[:, 0], places, where)]
    state, line = new_state(index), 0
    while line < len(starts):
        line, in_lines, _, _ = scan_turns(index, state, block.text, starts, ends, np.arange(len(starts)), line, 0.999)
        assert line >= 0, "what stands between line ends of UTF-8 is UTF-8"
        in_lines = in_lines[chosen[in_lines[:, 1]]]
        found.append((of_turn[in_lines[:, 0]], in_lines, (block.text, starts, ends)))
    columns = []
    for turns, here, around in found:
        bounds = match_bounds(index, *around, here)
        is_most = are_most_of_their_lines(*around, here[:, 0], *bounds, IS_WORD)
        columns.append([turns[is_most], here[is_most, 1], bounds[0][is_most], bounds[1][is_most]])
    turns, instances, begins, ends = map(np.concatenate, zip(*columns, strict=True))
    return turns, instances, begins, ends
