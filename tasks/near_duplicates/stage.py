"""Stage `near_duplicates`: rows that are nearly the same as another one, as one of another set, or as a benchmark's.

docs/near-duplicates.md says what is compared and what the figures mean.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.schemas.near_duplicates import (
    NearDuplicateInputs,
    NearDuplicateOutputs,
    NearDuplicateRules,
    NearDuplicateStageConfig,
)
from smoltulu.tasks.data import rows as rows_file
from smoltulu.tasks.near_duplicates.results import (
    Match,
    Paraphrase,
    count_matches,
    write_clusters,
    write_kept,
    write_pairs,
    write_paraphrases,
)
from smoltulu.tasks.near_duplicates.shingles import compared_text, plain_words, shingles
from smoltulu.tasks.stage import Stage, StageContext

if TYPE_CHECKING:
    import numpy as np

    from smoltulu.tasks.near_duplicates.greedy import Found
    from smoltulu.tasks.near_duplicates.texts import Texts

logger = logging.getLogger("smoltulu")

ITSELF = "itself"
_ROWS_AT_A_TIME = 2048


@dataclass(frozen=True)
class ItemSet:
    """Items of one set: those numbered `first` to `first` + `num_items` - 1.

    rows   row of each item in its set
    ids    id of each item
    """

    name: str
    first: int
    rows: Sequence[int]
    ids: Sequence[str]

    @property
    def num_items(self) -> int:
        """How many there are."""
        return len(self.rows)


def find_near_duplicates(
    config: NearDuplicateStageConfig, inputs: NearDuplicateInputs, context: StageContext
) -> tuple[NearDuplicateOutputs, dict[str, float]]:
    """Write `rows.parquet`, `pairs.parquet` (a line per row and what it is alike to), `clusters.parquet` and a page.

    Raises:
        ValueError: rensa is not installed or makes other signatures, an input is no rows file or no index, there is no
            row, or none would be left.
    """
    from smoltulu.tasks.near_duplicates.minhash import check_signatures
    from smoltulu.tasks.near_duplicates.page import write_page
    from smoltulu.tasks.near_duplicates.texts import Texts

    rules, source = config.settings, Path(inputs.dataset)
    minhash = check_signatures()
    num_rows = rows_file.num_rows(source)
    if num_rows == 0:
        raise ValueError(f"near_duplicates: {source} has no row to compare")
    texts = Texts(context.work / "compared.bin", rules.shingle, rules.shingle_size)
    try:
        matches, without_text, unfinished = _compare(config, inputs, texts, num_rows, context)
    finally:
        texts.close()
    duplicates = sorted({match.row for match in matches})
    removed = duplicates if rules.policy == "remove" else []
    if len(removed) == num_rows:
        raise ValueError(
            f"near_duplicates: all {num_rows} rows are alike to the sets that they are compared with, so none is left; "
            "look at what they hold with policy: report"
        )
    fields = NearDuplicateOutputs.model_fields
    names = {
        name: context.folder / fields[name].default for name in ("file", "pairs_file", "clusters_file", "page_file")
    }
    write_kept(source, names["file"], removed)
    write_pairs(names["pairs_file"], matches, set(removed))
    num_clusters = write_clusters(names["clusters_file"], matches)
    meant = _paraphrases(inputs, rules, set(duplicates)) if rules.paraphrases is not None else None
    if meant is not None:
        write_paraphrases(context.folder / "paraphrases.parquet", meant)
    outputs = NearDuplicateOutputs(
        kind=config.kind,
        policy=rules.policy,
        minhash=minhash,
        num_rows_read=num_rows,
        num_rows=num_rows - len(removed),
        num_removed=len(removed),
        num_near_duplicates=len(duplicates),
        num_clusters=num_clusters,
        num_without_text=without_text,
        num_unfinished=unfinished,
        counts=count_matches(matches),
        paraphrases_file=None if meant is None else "paraphrases.parquet",
        num_paraphrases=None if meant is None else len(meant),
        num_paraphrases_same_numbers=None if meant is None else sum(one.same_numbers for one in meant),
    )
    write_page(names["page_file"], outputs, rules, matches, inputs)
    if unfinished:
        logger.warning(
            "near_duplicates: %s rows have more candidates than are compared; they may have more near-duplicates. A "
            "template that most rows share does this: a greater shingle_size helps",
            f"{unfinished:,}",
        )
    metrics = {
        "num_rows": float(outputs.num_rows),
        "num_removed": float(outputs.num_removed),
        "near_duplicate_share": len(duplicates) / num_rows,
    }
    return outputs, metrics


def _compare(
    config: NearDuplicateStageConfig, inputs: NearDuplicateInputs, texts: Texts, num_rows: int, context: StageContext
) -> tuple[list[Match], int, int]:
    """Matches in the order of rows; number of rows without a word; number of rows not compared with all candidates."""
    import numpy as np

    from smoltulu.tasks.near_duplicates.greedy import near_duplicates
    from smoltulu.tasks.near_duplicates.minhash import band_hashes, signatures

    rules = config.settings
    num_bands, rows_per_band = rules.bands()
    sets: list[ItemSet] = []
    bands: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    hashes = array("Q")
    started = time.monotonic()
    for name, items in _sets(inputs, rules):
        first = len(texts)
        numbers, ids = [], []
        while batch := list(islice(items, _ROWS_AT_A_TIME)):
            made = []
            for row, item_id, text in batch:
                words = plain_words(text)
                hashes.append(texts.add(words))
                made.append(shingles(words, rules.shingle, rules.shingle_size))
                numbers.append(row)
                ids.append(item_id)
            bands.append(band_hashes(signatures(made, rules.num_perm), num_bands, rows_per_band))
            sizes.append(np.array([len(one) for one in made], np.int32))
            speed = len(texts) / max(time.monotonic() - started, 1e-9)
            context.report(min(len(texts), num_rows), num_rows, num_rows=float(len(texts)), rows_per_second=speed)
        sets.append(ItemSet(name, first, numbers, ids))
    texts.finish()
    own = sets[-1]
    is_compared = np.concatenate(sizes) > 0
    all_bands = np.concatenate(bands)
    bands.clear()  # the largest part of what is held
    found = near_duplicates(
        all_bands, is_compared, own.first, _alike(texts, rules), within=config.within, hashes=np.array(hashes)
    )
    return _matches(found, sets, texts), int((~is_compared[own.first :]).sum()), len(found.unfinished)


def _alike(texts: Texts, rules: NearDuplicateRules) -> Callable[[int, int], float | None]:
    def alike(one: int, other: int) -> float | None:
        similarity = texts.jaccard(one, other)
        if similarity < rules.threshold or (rules.same_numbers and not texts.same_numbers(one, other)):
            return None
        return similarity

    return alike


def _sets(
    inputs: NearDuplicateInputs, rules: NearDuplicateRules
) -> Iterator[tuple[str, Iterator[tuple[int, str, str]]]]:
    """(name, items) of every set that is compared with, then of the rows themselves. An item: (row, id, text)."""
    if inputs.index is not None:
        yield from _benchmarks(Path(inputs.index))
    for name, file in sorted(inputs.others.items()):
        yield name, _rows(Path(file), rules)
    yield ITSELF, _rows(Path(inputs.dataset), rules)


def _rows(file: Path, rules: NearDuplicateRules) -> Iterator[tuple[int, str, str]]:
    for number, row in enumerate(rows_file.stored_rows(file)):
        yield number, row["id"], compared_text(row, rules.text)


def _benchmarks(index: Path) -> Iterator[tuple[str, Iterator[tuple[int, str, str]]]]:
    """The instances of every benchmark of an index; of one with several query fields, these joined by line feeds."""
    from pyarrow import parquet

    file = index / "queries.parquet"
    if not file.is_file():
        raise ValueError(f"{index}: no benchmark index (queries.parquet is missing); make it again")
    table = parquet.read_table(file, columns=["benchmark", "row", "fields"])
    instances: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for name, row, fields in zip(*(table.column(column).to_pylist() for column in table.column_names), strict=True):
        instances[name].append((row, str(row), "\n".join(fields)))
    for name, items in sorted(instances.items()):
        yield f"benchmark {name}", iter(items)


def _matches(found: Found, sets: list[ItemSet], texts: Texts) -> list[Match]:
    import bisect

    own, firsts = sets[-1], [one.first for one in sets]
    matches = []
    for pair in found.pairs:
        # The last set that begins at or before the item: empty sets begin where the next one does.
        other = sets[bisect.bisect_right(firsts, pair.other) - 1]
        mine, theirs = pair.item - own.first, pair.other - other.first
        matches.append(
            Match(
                row=own.rows[mine],
                row_id=own.ids[mine],
                other_set=other.name,
                other_row=other.rows[theirs],
                other_id=other.ids[theirs],
                jaccard=pair.jaccard,
                exact=texts.same(pair.item, pair.other),
            )
        )
    return matches


def _paraphrases(inputs: NearDuplicateInputs, rules: NearDuplicateRules, known: set[int]) -> list[Paraphrase]:
    """Of rows that are no near-duplicates, those that mean the same as a text of another set, by their word vectors."""
    import numpy as np

    from smoltulu.tasks.near_duplicates.paraphrases import batches, check_model, embed, most_alike, numbers_of

    assert rules.paraphrases is not None
    check_model()
    if not inputs.others and inputs.index is None:
        logger.warning("near_duplicates.paraphrases: there is no other set and no benchmark to compare the rows with")
    vectors: list[np.ndarray] = []
    places: list[tuple[str, int, str, tuple[str, ...]]] = []
    found: list[Paraphrase] = []
    others = np.zeros((0, 1), np.float16)
    for name, items in _sets(inputs, rules):
        if name == ITSELF and vectors:
            others = np.concatenate(vectors)
        for batch in batches(items):
            made = embed([text for _, _, text in batch])
            if name != ITSELF:
                vectors.append(made.astype(np.float16))
                places += [(name, row, item_id, numbers_of(text)) for row, item_id, text in batch]
            elif vectors:
                for alike in most_alike(made, others, rules.paraphrases):
                    row, row_id, text = batch[alike.number]
                    other_set, other_row, other_id, numbers = places[alike.other]
                    if row not in known:
                        same = numbers_of(text) == numbers
                        found.append(Paraphrase(row, row_id, other_set, other_row, other_id, alike.cosine, same))
    return found


near_duplicates = Stage(
    name="near_duplicates",
    version=1,
    config=NearDuplicateStageConfig,
    inputs=NearDuplicateInputs,
    outputs=NearDuplicateOutputs,
    function=find_near_duplicates,
    keeps_rows=True,
    grows_with_model=False,
)
