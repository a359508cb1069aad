"""An index folder, mapped into memory, and the compiled scan over it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from smoltulu.schemas.contamination import BenchmarkIndexOutputs
from smoltulu.tasks.contamination.kernels.layout import FullPostings, NgramPostings, NormalTables, Phrases, State
from smoltulu.tasks.contamination.kernels.normal import ASCII_KINDS, ASCII_TO, locate_normalised
from smoltulu.tasks.contamination.kernels.scan import scan
from smoltulu.tasks.contamination.kernels.text import LOWER_BYTES, LOWER_CODE_POINTS, locate_hits
from smoltulu.tasks.contamination.rows import TurnBlock

_HITS_AT_A_TIME = 1 << 18

#: Of an index of another mode than `normalised`.
NO_TABLES = NormalTables(*(np.empty(0, kind) for kind in (np.uint8, np.int32, np.int32, np.uint64, np.int64)))


@dataclass(frozen=True)
class Weak:
    """Instances of so few terms that their normal form says little: 'fire', '4 3'."""

    is_weak: np.ndarray  # of each instance
    has_word: np.ndarray  # of each instance: a term of several letters
    phrases: Phrases  # of the weak ones in full mode
    full: FullPostings


@dataclass(frozen=True)
class Index:
    """An index folder, mapped into memory: threads and processes share its pages."""

    header: BenchmarkIndexOutputs
    digest: str
    phrases: Phrases
    full: FullPostings
    ngram: NgramPostings
    normal: NormalTables  # of no length in the other modes
    weak: Weak | None  # in the mode `normalised`
    num_terms: np.ndarray  # of each instance, over its fields
    best_possible: np.ndarray  # score of each instance against a text that holds all that can be matched
    is_short: np.ndarray  # n-gram mode: instances looked for as a whole, as no window of theirs can be enough
    benchmark: np.ndarray  # number of each instance's benchmark
    benchmark_row: np.ndarray  # its row there

    @property
    def window(self) -> int:
        """Tokens of a window; 0: full mode."""
        return (self.header.ngram_size or 0) if self.header.mode == "ngram" else 0


def load_index(folder: Path) -> Index:
    """Map an index folder into memory. Raises ValueError if it is none."""
    file = folder / "index.json"
    if not file.is_file():
        raise ValueError(
            f"{folder}: no benchmark index (index.json is missing); make it with the benchmark_index stage"
        )
    header = json.loads(file.read_text(encoding="utf-8"))
    digest = header.pop("digest")

    def array(name: str) -> np.ndarray:
        # Copy on write: compiled loops are made for writable arrays, and nothing is ever written.
        return np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False).view(np.ndarray)

    def postings(mode: str, names: Sequence[str]) -> Iterator[np.ndarray]:
        is_there = (mode == "ngram") == (parsed.mode == "ngram") or (mode == "full" and parsed.short_items)
        return (array(f"{mode}_{name}") if is_there else np.zeros(1, np.int32) for name in names)

    parsed = BenchmarkIndexOutputs.model_validate(header)
    weak = None
    if parsed.mode == "normalised":
        weak = Weak(
            is_weak=array("is_weak"),
            has_word=array("has_word"),
            phrases=Phrases(*(array(f"weak_phrases_{name}") for name in Phrases._fields)),
            full=FullPostings(*(array(f"weak_full_{name}") for name in FullPostings._fields)),
        )
    normal = NO_TABLES
    if parsed.mode == "normalised":
        normal = NormalTables(*(array(f"normal_{name}") for name in NormalTables._fields))
    return Index(
        header=parsed,
        digest=digest,
        phrases=Phrases(*(array(f"phrases_{name}") for name in Phrases._fields)),
        full=FullPostings(*postings("full", FullPostings._fields)),
        ngram=NgramPostings(*postings("ngram", NgramPostings._fields)),
        normal=normal,
        weak=weak,
        num_terms=array("num_terms"),
        best_possible=array("best_possible"),
        is_short=array("is_short") if parsed.short_items else np.zeros(parsed.num_instances, bool),
        benchmark=array("benchmark"),
        benchmark_row=array("benchmark_row"),
    )


def new_state(index: Index) -> State:
    """The state of one scan. Threads must not share it."""
    num_instances = index.header.num_instances
    num_fields = len(index.ngram.field_tokens) if index.window else 0
    return State(
        clock=np.zeros(1, np.int64),
        seen=np.zeros((len(index.phrases.place), 2), np.int32),
        field_mark=np.zeros((num_fields, 3), np.int32),
        instance_mark=np.zeros(num_instances, np.int32),
        best_score=np.zeros(num_instances, np.float64),
        best_row=np.full(num_instances, -1, np.int64),
    )


def scan_turns(
    index: Index,
    state: State,
    text: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    rows: np.ndarray,
    first: int,
    match_threshold: float,
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """The compiled scan of text[starts:ends] from number `first` on."""
    found: tuple[int, np.ndarray, np.ndarray, np.ndarray] = scan(
        text, starts, ends, rows, first, index.phrases, index.full, index.ngram, index.window, match_threshold, state,
        LOWER_BYTES, LOWER_CODE_POINTS, index.normal, ASCII_KINDS, ASCII_TO, _HITS_AT_A_TIME,
    )  # fmt: skip
    return found


def match_bounds(
    index: Index, text: np.ndarray, turn_start: np.ndarray, turn_end: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Source bytes of the matches, in the order of `places`."""
    by_turn = np.argsort(places[:, 0], kind="stable")
    begins, ends = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
    where = (text, turn_start, turn_end, places[by_turn])
    begins[by_turn], ends[by_turn] = (
        locate_normalised(*where, index.normal, ASCII_KINDS, ASCII_TO)
        if len(index.normal.kind)
        else locate_hits(*where, LOWER_BYTES, LOWER_CODE_POINTS)
    )
    return begins, ends


def other_fields(index: Index, block: TurnBlock, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the fields of hits on instances of several fields stand: (turn, first source byte, byte behind the last).

    A hit itself has one place, that of its rarest field. hits[:, :2]: turn and instance, of full or normalised mode.
    """
    offsets, phrases = index.full.part_offsets, index.full.part_phrase
    if len(offsets) > 1:
        hits = hits[offsets[hits[:, 1] + 1] - offsets[hits[:, 1]] > 1]
    if len(offsets) <= 1 or not len(hits):
        none = np.empty(0, np.int64)
        return none, none, none
    # Each phrase as an instance of its own, so that all are found.
    numbers = np.arange(len(index.phrases.place) + 1, dtype=np.int32)
    each = replace(
        index,
        full=FullPostings(numbers, numbers[:-1], numbers, numbers[:-1]),
        header=index.header.model_copy(update={"mode": "full", "num_instances": len(numbers) - 1}),
    )
    turns = np.unique(hits[:, 0])
    wanted = {
        (turn, phrase)
        for turn, instance in hits[:, :2].tolist()
        for phrase in phrases[offsets[instance] : offsets[instance + 1]].tolist()
    }
    state, number, found = new_state(each), 0, [np.empty((0, 4), np.int64)]
    while number < len(turns):
        number, places, _, _ = scan_turns(
            each, state, block.text, block.turn_start[turns], block.turn_end[turns], turns, number, 0.5
        )
        places[:, 0] = turns[places[:, 0]]
        found.append(places)
    places = np.concatenate(found)
    places = places[[pair in wanted for pair in map(tuple, places[:, :2].tolist())]]
    return places[:, 0], *match_bounds(index, block.text, block.turn_start, block.turn_end, places)
