"""Policy `span`: rows without the passages that hit, instead of without the rows.

Passages are cut until no counting hit is left in a turn. A row goes as a whole where that leaves a turn without a word,
or both completions of a preference row the same, and where a hit is in reasoning, a call or tools: without a part,
those would say something else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smoltulu.schemas.contamination import ContaminationRules
from smoltulu.tasks.contamination.merge import rows_to_remove
from smoltulu.tasks.contamination.scan import Index, ShortRule, spans
from smoltulu.tasks.data.rows import TOOLS, TURNS, WRITE_OPTIONS, given_row, group_starts, open_rows, texts_of, turns_of

_MAX_ROUNDS = 100  # a turn of more copies than this goes with its row


@dataclass
class Turn:
    """A searched turn of a row that hit."""

    row: int  # of its row group
    number: int  # of the message, counted through all columns of turns
    column: str
    place: int  # of the message in the column's values
    text: str
    cuts: list[dict[str, Any]] = field(default_factory=list)  # {turn, begin, text}, in the order in which they were cut


def write_cut(
    dataset: Path, hits_file: Path, index: Index, rules: ContaminationRules, kept: Path, removed: Path
) -> tuple[int, int]:
    """Write the rows of `dataset` without the passages that hit: (number of rows removed, of rows cut).

    `removed` gets a line per row that hit: {"id", "reasons": {benchmark: [rows]}, "action": "cut" or "removed", "why"
    of a removal, "cut": [{"turn", "begin": character at which the passage stood when it was cut, "text"}]}.
    """
    num_removed = num_cut = 0
    short = ShortRule(rules.short_items, rules.min_terms)
    hits = rows_to_remove(hits_file, short)
    next_hit = next(hits, None)
    with (
        removed.open("w", encoding="utf-8") as log,
        open_rows(dataset) as source,
        pq.ParquetWriter(kept, source.schema_arrow, **WRITE_OPTIONS) as output,
    ):
        for group, (start, stop) in enumerate(pairwise(group_starts(source))):
            wanted = {}  # row of the group -> (id, reasons)
            while next_hit is not None and next_hit[0] < stop:
                wanted[next_hit[0] - start] = next_hit[1:]
                next_hit = next(hits, None)
            rows = source.read_row_group(group, use_threads=False)
            if wanted:
                turns = _turns(rows, sorted(wanted), rules.roles)
                _cut(turns, index, rules, short)
                whole = _hit_elsewhere(rows, turns, sorted(wanted), index, rules, short)
                rows, why = _without(rows, turns, sorted(wanted), whole)
                for row, (row_id, reasons) in wanted.items():
                    cut = [each for turn in turns if turn.row == row for each in turn.cuts]
                    num_removed, num_cut = num_removed + (row in why), num_cut + (row not in why)
                    action = {"action": "removed", "why": why[row]} if row in why else {"action": "cut"}
                    record = {"id": row_id, "reasons": reasons, **action, "cut": cut}
                    log.write(json.dumps(record, ensure_ascii=False) + "\n")
            if len(rows):
                output.write_table(rows)
        assert next_hit is None, "the rows file ends before a row that was found in it"
    return num_removed, num_cut


def _turns(rows: pa.Table, wanted: Sequence[int], roles: Sequence[str]) -> list[Turn]:
    """The turns of these rows that are searched."""
    turns = []
    num_before = dict.fromkeys(wanted, 0)
    for name in (name for name in TURNS if name in rows.schema.names):
        column = rows.column(name).combine_chunks()
        role, content = (column.values.field(part) for part in ("role", "content"))
        for row in wanted:
            first, last = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
            for place in range(first, last):
                if role[place].as_py() in roles:
                    number = num_before[row] + place - first
                    turns.append(Turn(row, number, name, place, content[place].as_py()))
            num_before[row] += last - first
    return turns


def _cut(turns: Sequence[Turn], index: Index, rules: ContaminationRules, short: ShortRule) -> None:
    """Cut the counting hits out of the turns, until none is left."""
    left = list(turns)
    for _ in range(_MAX_ROUNDS):
        found: dict[int, list[tuple[int, int]]] = {}
        for number, begin, end in spans(index, [turn.text for turn in left], rules.match_threshold, short):
            found.setdefault(number, []).append((begin, end))
        for number, bounds in found.items():
            turn = left[number]
            for begin, end in reversed(_merged(turn.text, bounds, rules.span_margin)):
                turn.cuts.append({"turn": turn.number, "begin": begin, "text": turn.text[begin:end]})
                turn.text = turn.text[:begin] + turn.text[end:]
        left = [left[number] for number in found]
        if not left:
            return
    for turn in left:
        turn.text = ""  # its row goes


def _hit_elsewhere(
    rows: pa.Table,
    turns: Sequence[Turn],
    wanted: Sequence[int],
    index: Index,
    rules: ContaminationRules,
    short: ShortRule,
) -> dict[int, str]:
    """Rows that still hit, once cut, because a turn has more than its content, and where."""
    if TOOLS not in rows.schema.names:
        return {}
    now = {(turn.row, turn.number): turn.text for turn in turns}
    texts: list[str] = []
    whose: list[tuple[int, str]] = []
    for row in wanted:
        given = given_row(rows.slice(row, 1).to_pylist()[0])
        messages = turns_of(given)
        for number, message in enumerate(messages):
            message["content"] = now.get((row, number), message["content"])
        for number, (role, text) in enumerate(texts_of(given)):
            is_tools = number == len(messages)
            if role in rules.roles and (is_tools or len(messages[number]) > 2):
                texts.append(text)
                whose.append((row, "tools" if is_tools else f"reasoning or a call of turn {number}"))
    found = (whose[number] for number, _, _ in spans(index, texts, rules.match_threshold, short))
    return {row: f"a hit is in {where}" for row, where in found}


def _merged(text: str, bounds: Sequence[tuple[int, int]], margin: int) -> list[tuple[int, int]]:
    """Bounds in bytes as bounds in characters, widened by the margin up to whole words, those that touch as one."""
    encoded = text.encode()
    wider = []
    for begin, end in bounds:
        first, last = (len(encoded[:at].decode()) for at in (begin, end))
        if margin:
            first, last = max(0, first - margin), min(len(text), last + margin)
            while first > 0 and not text[first - 1].isspace():
                first -= 1
            while last < len(text) and not text[last].isspace():
                last += 1
        wider.append((first, last))
    merged: list[tuple[int, int]] = []
    for first, last in sorted(wider):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def _without(
    rows: pa.Table, turns: Sequence[Turn], wanted: Sequence[int], whole: Mapping[int, str]
) -> tuple[pa.Table, dict[int, str]]:
    """The rows with their turns as they are now, without those that a cut has broken, and why each of these goes."""
    why = dict(whole)
    for turn in turns:
        if turn.cuts and not any(map(str.isalnum, turn.text)):
            why.setdefault(turn.row, f"turn {turn.number} is left without a word")
    for name in {turn.column for turn in turns if turn.cuts}:
        texts = {turn.place: turn.text for turn in turns if turn.column == name and turn.cuts}
        rows = rows.set_column(
            rows.schema.get_field_index(name), rows.schema.field(name), _replaced(rows.column(name), texts)
        )
    if "chosen" in rows.schema.names:
        for row in wanted:
            if row not in why and rows.column("chosen")[row] == rows.column("rejected")[row]:
                why[row] = "chosen and rejected are left the same"
    if why:
        rows = rows.filter(pa.array([row not in why for row in range(len(rows))]))
    return rows, why


def _replaced(column: pa.ChunkedArray, texts: Mapping[int, str]) -> pa.ListArray:
    """A column of turns with other contents at these places; every other value is the same."""
    whole = column.combine_chunks()
    struct = whole.values
    is_new = [place in texts for place in range(len(struct))]
    content = struct.field("content")
    new = pa.array([texts[place] for place in sorted(texts)], content.type)
    fields = [
        pc.replace_with_mask(struct.field(part.name), pa.array(is_new), new)
        if part.name == "content"
        else struct.field(part.name)
        for part in struct.type
    ]
    return pa.ListArray.from_arrays(
        whole.offsets, pa.StructArray.from_arrays(fields, fields=list(struct.type)), type=whole.type
    )
