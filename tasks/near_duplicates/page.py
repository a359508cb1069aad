"""The page of near-duplicates: counts, and pairs side by side with the words that differ marked."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from smoltulu.schemas.near_duplicates import NearDuplicateInputs, NearDuplicateOutputs, NearDuplicateRules
from smoltulu.tasks.data.rows import rows_at
from smoltulu.tasks.near_duplicates.results import Match
from smoltulu.tasks.near_duplicates.shingles import compared_text
from smoltulu.tasks.report.render import render

#: Pairs of each set that are shown: those that are least alike, where a threshold is judged.
_PAIRS_PER_SET = 10
_WORDS = 300

#: A text in pieces: (text, whether the other side lacks it).
Pieces = list[tuple[str, bool]]


def write_page(
    file: Path,
    outputs: NearDuplicateOutputs,
    rules: NearDuplicateRules,
    matches: Sequence[Match],
    inputs: NearDuplicateInputs,
) -> None:
    """Write the page, which loads nothing."""
    page = render("near_duplicates.html.jinja", found=outputs, rules=rules, pairs=shown_pairs(matches, rules, inputs))
    file.write_text(page, encoding="utf-8")


def shown_pairs(
    matches: Sequence[Match], rules: NearDuplicateRules, inputs: NearDuplicateInputs, per_set: int = _PAIRS_PER_SET
) -> list[tuple[Match, Pieces, Pieces]]:
    """The least alike pairs of every set, which differ, each with both texts; their order is that of the rows."""
    by_set: dict[str, list[Match]] = defaultdict(list)
    for match in sorted(
        (one for one in matches if not one.exact), key=lambda one: (one.jaccard, one.row, one.other_row)
    ):
        if len(by_set[match.other_set]) < per_set:
            by_set[match.other_set].append(match)
    shown = [match for _, some in sorted(by_set.items()) for match in some]
    own = rows_at(Path(inputs.dataset), [match.row for match in shown])
    texts = _other_texts(shown, rules, inputs)
    made = []
    for match in shown:
        left, right = marked(compared_text(own[match.row], rules.text), texts[match.other_set, match.other_row])
        made.append((match, left, right))
    return made


def _other_texts(
    shown: Sequence[Match], rules: NearDuplicateRules, inputs: NearDuplicateInputs
) -> dict[tuple[str, int], str]:
    """Texts of what the rows are alike to, by set and row."""
    from pyarrow import parquet

    files = {**inputs.others, "itself": inputs.dataset}
    wanted: dict[str, list[int]] = defaultdict(list)
    for match in shown:
        wanted[match.other_set].append(match.other_row)
    texts = {}
    for name, numbers in wanted.items():
        if name in files:
            for number, row in rows_at(Path(files[name]), numbers).items():
                texts[name, number] = compared_text(row, rules.text)
            continue
        assert inputs.index is not None
        benchmark = name.removeprefix("benchmark ")
        table = parquet.read_table(
            Path(inputs.index) / "queries.parquet", filters=[("benchmark", "=", benchmark), ("row", "in", numbers)]
        )
        for row, fields in zip(table.column("row").to_pylist(), table.column("fields").to_pylist(), strict=True):
            texts[name, row] = "\n".join(fields)
    return texts


def marked(one: str, other: str, num_words: int = _WORDS) -> tuple[Pieces, Pieces]:
    """Both texts in pieces, the words that differ marked; of a long text the first `num_words` words."""
    words = [re.findall(r"\s*\S+", text)[: num_words + 1] for text in (one, other)]
    cut = [[*some[:num_words], " …"] if len(some) > num_words else some for some in words]
    plain = [[word.strip().lower() for word in some] for some in cut]
    left: Pieces = []
    right: Pieces = []
    for kind, a_start, a_end, b_start, b_end in SequenceMatcher(None, *plain, autojunk=False).get_opcodes():
        for pieces, words_of, start, end in ((left, cut[0], a_start, a_end), (right, cut[1], b_start, b_end)):
            if start < end:
                pieces.append(("".join(words_of[start:end]), kind != "equal"))
    return left, right
